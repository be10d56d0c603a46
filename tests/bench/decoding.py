"""Part of the GPU benchmark: JPEG files decoded by GPU and CPU together (DALI's `mixed`), or by the CPU alone."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data.dataset import list_images
from dist_prune.data.loader import Stream, training_stream
from dist_prune.data.share import Unsharded
from tests.bench.figures import Figure, missing, rate, ratio
from tests.bench.phases import Bench
from tests.bench.timing import interleaved
from tests.pictures import picture

MIXED, CPU, BOTH = "mixed, images on the GPU", "CPU, images then copied to the device", "seconds, mixed ÷ CPU"
PIXELS = (500, 375)  # the usual size of ImageNet's photos
DISTINCT = 32


def decoding(bench: Bench) -> Iterator[Figure]:
    """Training images from file to normalised batch on the device, both ways."""
    if text := without_dali():
        why = f"DALI cannot be imported ({text}); all other parts run on synthetic batches anyway"
        yield from (missing(name, why) for name in (MIXED, CPU, BOTH))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), bench.scale.pictures
        write_photos(folder, count)
        places = (bench.device, torch.device("cpu"))
        mixed, cpu = (partial(read, stream(folder, place, bench), bench.device) for place in places)
        has_gpu = bench.device.type == "cuda"
        taken = interleaved(mixed, cpu, bench.scale.rounds, bench.device, "wall", bench.until)
        yield rate(MIXED, count, taken.ours) if has_gpu else missing(MIXED, "no GPU")
        yield rate(CPU, count, taken.plain if has_gpu else taken.ours + taken.plain)
        yield ratio(BOTH, taken, 1.0) if has_gpu else missing(BOTH, "no GPU")


def without_dali() -> str:
    """Why DALI cannot be used; empty where it can."""
    try:
        importlib.import_module("nvidia.dali.plugin.pytorch")
    except ImportError as error:
        return str(error)
    return ""


def stream(folder: Path, place: torch.device, bench: Bench) -> Stream:
    """Random-resized crops as ImageNet's recipes have them, decoded at this place, by all cores."""
    side, size = bench.scale.side, min(bench.scale.images, bench.scale.pictures)
    spec, threads = ImageSpec(max(256, side), side), len(os.sched_getaffinity(0))
    return training_stream(list_images(folder), spec, Unsharded(place, 0), size, threads, 0, Augment())


def read(source: Stream, device: torch.device) -> None:
    """An epoch, every batch on the device."""
    for batch in source:
        batch.images.to(device)


def write_photos(folder: Path, count: int) -> None:
    """So many JPEG files, each of a few smooth pictures many times."""
    for i in range(count):
        path, first = folder / f"{i}.jpg", folder / f"{i % DISTINCT}.jpg"
        if i < DISTINCT:
            picture(PIXELS[0] // 8, PIXELS[1] // 8, i).resize(PIXELS, Image.Resampling.BICUBIC).save(
                path, quality=90
            )
        else:
            shutil.copy(first, path)
