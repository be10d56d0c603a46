"""Reading images: this project's DALI streams against torchvision's DataLoader with the same transforms.

    uv run python -m tests.bench.loading [--data DIR] [--threads N] [--rounds N] [--quick]

`DIR` holds `train/` and `val/` with class folders; its images are read several times in a row, by as many threads
of DALI as workers of the DataLoader. Each side runs in a process of its own, in turns, and is timed from an early
to a late batch, so that it is busy before and after. What counts is seconds of processor, of all threads and
workers, as the machine may be shared. The decoders alone say what bounds either side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from nvidia import dali
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data.dataset import Split, open_dataset
from dist_prune.data.loader import evaluation_stream, training_stream
from tests.bench.timing import Pair, Row, command_line, report, table, write_json
from tests.pictures import One
from tests.ranks import run_alone

RESULT = Path(__file__).parent / "results" / "loading.json"
SPEC, AUGMENT = ImageSpec(), Augment()
GOAL = 1 / 1.5  # of the seconds an image


@dataclass(frozen=True)
class Setting:
    """What is read: the images of `data`, `repeats` times, in batches."""

    data: Path
    threads: int = 2
    batch: int = 32
    repeats: int = 8
    rounds: int = 5

    @property
    def ahead(self) -> int:
        """Batches until both sides deliver as fast as they read: DALI has 2 in stock, a worker 2."""
        return 2 * self.threads + 2


@dataclass(frozen=True)
class Cost:
    """Seconds an image, of all processors together and of the clock."""

    cpu: float
    wall: float


# ── the sides: sizes of batches ────────────────────────────────────────────────────────────────────────────


def dali_training(setting: Setting) -> Iterator[int]:
    split = repeated(open_dataset(setting.data).train, setting.repeats)
    for batch in training_stream(split, SPEC, One(), setting.batch, setting.threads, 0, AUGMENT):
        yield len(batch.images)


def dali_validation(setting: Setting) -> Iterator[int]:
    split = repeated(open_dataset(setting.data).val, setting.repeats)
    for batch in evaluation_stream(split, SPEC, One(), setting.batch, setting.threads):
        yield len(batch.images)


def dali_decoding(setting: Setting) -> Iterator[int]:
    """The decoder alone, as the streams use it."""
    split = open_dataset(setting.data).val
    pipeline = dali.Pipeline(setting.batch, setting.threads, None)
    with pipeline:
        encoded, _ = dali.fn.readers.file(file_root=str(split.root), files=list(split.files), dont_use_mmap=True)
        pixels = dali.fn.decoders.image(encoded, adjust_orientation=False, jpeg_fancy_upsampling=True)
        pipeline.set_outputs(pixels)
    for _ in range(setting.repeats * len(split) // setting.batch):
        yield len(pipeline.run()[0])


def torchvision_training(setting: Setting) -> Iterator[int]:
    crop = transforms.RandomResizedCrop(SPEC.crop, AUGMENT.area, AUGMENT.ratio)
    yield from loaded(setting, "train", crop, transforms.RandomHorizontalFlip(), *normalised())


def torchvision_validation(setting: Setting) -> Iterator[int]:
    cut = transforms.Resize(SPEC.resize), transforms.CenterCrop(SPEC.crop)
    yield from loaded(setting, "val", *cut, *normalised())


def pillow_decoding(setting: Setting) -> Iterator[int]:
    """Pillow's decoder alone, in workers, too."""
    yield from loaded(setting, "val", decoded_size)


def repeated(split: Split, repeats: int) -> Split:
    """Each file several times."""
    return replace(split, files=split.files * repeats, labels=split.labels * repeats)


def loaded(setting: Setting, part: str, *steps: Callable[[Any], Any]) -> Iterator[int]:
    """Sizes of the batches of a DataLoader over this part of the images; shuffled where it is for training."""
    images = ImageFolder(str(setting.data / part), transforms.Compose(steps))
    many = ConcatDataset([images] * setting.repeats)
    how = {"shuffle": part == "train", "num_workers": setting.threads, "multiprocessing_context": "fork"}
    batches: DataLoader[tuple[Tensor, Tensor]] = DataLoader(many, setting.batch, **how)
    for _, labels in batches:
        yield len(labels)


def normalised() -> tuple[Callable[[Any], Tensor], ...]:
    return transforms.ToTensor(), transforms.Normalize(SPEC.mean, SPEC.std)


def decoded_size(image: Image.Image) -> int:
    return image.width  # `convert` has decoded it


SIDES: dict[str, Callable[[Setting], Iterator[int]]] = {
    "DALI, training": dali_training,
    "torchvision, training": torchvision_training,
    "DALI, validation": dali_validation,
    "torchvision, validation": torchvision_validation,
    "DALI, decoding": dali_decoding,
    "Pillow, decoding": pillow_decoding,
}


# ── the comparison ─────────────────────────────────────────────────────────────────────────────────────────


def cost(side: str, setting: Setting) -> Cost:
    """Seconds an image where batches come steadily; the first and the last ones do not count."""
    torch.set_num_threads(1)
    sizes = SIDES[side](setting)
    counted = setting.repeats * len(open_dataset(setting.data).val) // setting.batch - 2 * setting.ahead
    for _ in islice(sizes, setting.ahead):
        pass
    cpu, wall = processor_seconds(), time.perf_counter()
    images = sum(islice(sizes, counted))
    return Cost((processor_seconds() - cpu) / images, (time.perf_counter() - wall) / images)


def processor_seconds() -> float:
    """Of all threads of this process and of its workers."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children())]
    return sum(t.user + t.system for t in times)


def rows(setting: Setting) -> list[Row]:
    """All sides in turns, then what they come to."""
    taken: dict[str, list[Cost]] = {side: [] for side in SIDES}
    for index in range(setting.rounds):
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            taken[side].append(run_alone(partial(cost, side, setting)))
    against = partial(row, taken, setting)
    return [
        against("DALI, training", "torchvision, training", GOAL),
        against("DALI, validation", "torchvision, validation", GOAL),
        against("DALI, training", "torchvision, training", GOAL, "wall"),
        against("DALI, validation", "torchvision, validation", GOAL, "wall"),
        against("DALI, decoding", "Pillow, decoding", 1),
        against("DALI, decoding", "DALI, validation", 1),
        against("Pillow, decoding", "torchvision, validation", 1),
    ]


def row(
    taken: dict[str, list[Cost]], setting: Setting, ours: str, plain: str, target: float, clock: str = "cpu"
) -> Row:
    """One side's seconds an image ÷ another's, and images a second, of a core where cores are counted."""
    pair = Pair(*(tuple(getattr(c, clock) for c in taken[side]) for side in (ours, plain)), clock)
    unit = "images/s per core" if clock == "cpu" else f"images/s, {setting.threads} threads or workers"
    detail = f"{pair.rates()} {unit}, batches of {setting.batch}"
    return pair.row(f"{ours} ÷ {plain}, {clock} seconds", target, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("photos"), help="folder with train/ and val/")
    parser.add_argument("--threads", type=int, default=Setting.threads, help="of DALI; workers of the DataLoader")
    parser.add_argument("--rounds", type=int, default=Setting.rounds, help="of all sides")
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--output", type=Path, help=f"default: results/{RESULT.name}")
    options = parser.parse_args()
    setting = Setting(options.data.resolve(), options.threads, rounds=options.rounds)
    setting = replace(setting, threads=1, batch=2, repeats=40, rounds=1) if options.quick else setting
    found = rows(setting)
    print(table(found))
    if output := options.output or (None if options.quick else RESULT):
        write_json(output, report(found, command_line("tests.bench.loading")))


if __name__ == "__main__":
    main()
