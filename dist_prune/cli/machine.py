"""The machine that a run would have: packages, devices, collectives, DALI."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from dist_prune.cli.findings import Finding
from dist_prune.config.run import Run
from dist_prune.data.dataset import Split
from dist_prune.data.loader import evaluation_stream
from dist_prune.data.share import Unsharded
from dist_prune.distributed.world import World
from dist_prune.training.trainer import require_possible


def packages(config: Run, world: World) -> Iterator[Finding]:
    """Versions, against those that this version was made for."""
    text = [f"Python {platform.python_version()}"]
    for requirement in requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if requirement.specifier.contains(version or "0", prereleases=True):
            text.append(f"{requirement.name} {version}")
        else:
            found = f"{version} where {requirement.specifier} is expected" if version else "not installed"
            yield Finding(
                requirement.name, "fail", found, f"pip install '{requirement.name}{requirement.specifier}'"
            )
    yield Finding("packages", "ok", ", ".join(text))


def requirements() -> list[Requirement]:
    """What the installed package says that it needs, extras left out; nothing where it is not installed."""
    try:
        lines = metadata.requires("dist-prune") or []
    except metadata.PackageNotFoundError:
        return []
    return [found for line in lines if (found := Requirement(line)).marker is None]


def devices(config: Run, world: World) -> Iterator[Finding]:
    """The device of this rank, and whether it can do what training is asked to."""
    if world.device.type == "cuda":
        free, whole = (number / 2**30 for number in torch.cuda.mem_get_info(world.device))
        text = f"{torch.cuda.get_device_name(world.device)}, {free:.0f} of {whole:.0f} GiB free"
        crowded = free < whole / 2
        yield Finding("device", "warn" if crowded else "ok", text, "another process uses this GPU: see nvidia-smi")
    else:
        text = f"CPU, {len(os.sched_getaffinity(0))} cores for {world.size} rank(s) on {socket.gethostname()}"
        meant = config.device == "cpu"
        no_gpu = "no GPU is seen: ask the scheduler for one; --device cpu says that none is meant"
        advice = world.note or no_gpu
        yield Finding("device", "ok" if meant else "warn", text, advice)
    if crowd := world.crowding():
        yield Finding("cores", "warn", *crowd.rsplit("; ", 1))
    for settings in (config.tuning, config.pretrain):
        require_possible(settings, world.device)


def ranks(config: Run, world: World) -> Iterator[Finding]:
    """A sum over all ranks, of a size as gradients have."""
    numbers = torch.full((2**22,), world.rank + 1.0, device=world.device)
    world.barrier()
    began = time.perf_counter()
    world.sum_(numbers)
    total = numbers.double().sum().item()
    took = time.perf_counter() - began
    sound = total == numbers.numel() * world.size * (world.size + 1) / 2
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    hosts = len(set(world.gather(socket.gethostname())))
    text = f"{world.size} on {hosts} node(s), {backend}: 16 MiB summed in {took:.3f} s"
    yield Finding("ranks", "ok" if sound else "fail", text if sound else f"{text}, wrongly", "see NCCL_DEBUG=INFO")


def decoding(config: Run, world: World) -> Iterator[Finding]:
    """DALI decodes a picture on this rank's device, as Pillow does."""
    with tempfile.TemporaryDirectory() as folder:
        ramp = np.add.outer(np.arange(32), 4 * np.arange(32)) + 30
        path = Path(folder) / "picture.jpg"
        Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1).astype(np.uint8)).save(path, quality=95)
        split = Split(Path(folder), (), (path.name,), (-1,))
        spec = replace(config.images.image, resize=0, crop=32)
        here = Unsharded(world.device, world.local_rank)
        (batch,) = evaluation_stream(split, spec, here, 1, 1).raw()
        expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    off = (batch.images[0].cpu().float() - expected).abs().max().item()
    text = f"decodes JPEG on {world.device.type}, {off:.0f} of 255 off Pillow"
    yield Finding("DALI", "ok" if off <= 16 else "fail", text, "reinstall NVIDIA DALI")
