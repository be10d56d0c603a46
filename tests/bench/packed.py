"""Small images read from a folder and from the shards that `dist-prune pack` makes of it.

    uv run python -m tests.bench.packed --data DIR [--rounds N]

`DIR` holds `train/` and `val/` of images that are decoded in no time, such as CIFAR's: reading is what is timed,
once as it is and once with a wait in every opening of a file, as over a network. For training DALI's reader opens
one file after the other, for evaluation several threads do. And counts the classes per batch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data import reading
from dist_prune.data.dataset import open_dataset
from dist_prune.data.loader import evaluation_stream, training_stream
from dist_prune.data.pack import pack
from tests.bench.timing import Pair, Row, command_line, report, table, write_json
from tests.pictures import One

RESULT = Path(__file__).parent / "results" / "packed.json"
AUGMENT = Augment()
SMALL = ImageSpec(resize=0, crop=32)  # images that are decoded in no time: reading is what is timed
DELAY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void opening(const char *path) {
    const char *under = getenv("SLOW_UNDER"), *wait = getenv("SLOW_US");
    if (under && wait && path && !strncmp(path, under, strlen(under))) usleep(atoi(wait));
}
#define OPENS(name) FILE *name(const char *path, const char *mode) { \
    FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, #name); opening(path); return next(path, mode); }
OPENS(fopen)
OPENS(fopen64)
#define OPENS_AS_NUMBER(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
    int (*next)(const char *, int, int) = dlsym(RTLD_NEXT, #name); opening(path); return next(path, flags, mode); }
OPENS_AS_NUMBER(open)
OPENS_AS_NUMBER(open64)
"""


@dataclass(frozen=True)
class Read:
    """A stream, where its images lie, and how many threads open files in an evaluation; DALI's reader has one."""

    stream: Literal["training", "evaluation"]
    source: Literal["folder", "shards"]
    readers: int = reading.THREADS

    def __str__(self) -> str:
        readers = f" by {self.readers}" if (self.stream, self.source) == ("evaluation", "folder") else ""
        return f"{self.stream}, {self.source}{readers}"


TRAINED, UNPACKED = Read("training", "shards"), Read("training", "folder")
SEEN, SEVERAL, SINGLE = Read("evaluation", "shards"), Read("evaluation", "folder"), Read("evaluation", "folder", 1)
GAINS = {  # with and without a wait: seconds an image ÷ those of another, and the most that they should be
    0.0: ((TRAINED, UNPACKED, 1.0), (SEVERAL, SINGLE, 1.0), (SEEN, SEVERAL, 1.0)),
    2.0: ((TRAINED, UNPACKED, 0.2), (SEVERAL, SINGLE, 0.2), (SEEN, SEVERAL, 1.0)),
}


def slow_opens(folder: Path) -> Path:
    """A library that, loaded first, makes `fopen` and `open` wait, by which DALI and Python open files."""
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(DELAY)
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def images_per_second(data: Path, kind: str, readers: int, seconds: float = 5.0) -> float:
    """Of one rank's stream of the training images, with one thread to decode, once it runs; by the clock."""
    torch.set_num_threads(1)
    reading.THREADS = readers
    split, how = open_dataset(data).train, (SMALL, One(), 64, 1)
    stream = training_stream(split, *how, 0, AUGMENT) if kind == "training" else evaluation_stream(split, *how)
    batches = (len(batch.labels) for _ in iter(int, 1) for batch in stream.raw())
    for _ in range(20):
        next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += next(batches)
    return images / (time.perf_counter() - began)


def opened_slowly(read: Read, data: Path, library: Path, wait_ms: float) -> float:
    """`images_per_second`, in a process whose files below `data` take so long to open."""
    slow = {"LD_PRELOAD": str(library), "SLOW_UNDER": f"{data}/", "SLOW_US": str(int(1000 * wait_ms))}
    words = [sys.executable, "-m", "tests.bench.packed", "--rate", read.stream, "--readers", str(read.readers)]
    words += ["--data", str(data)]
    done = subprocess.run(words, env=os.environ | slow, capture_output=True, text=True, check=True, timeout=300)
    return float(done.stdout.split()[-1])


def packed_rows(data: Path, rounds: int) -> list[Row]:
    """All ways to read in turns, with and without the wait."""
    found = []
    with TemporaryDirectory() as scratch:
        library, places = slow_opens(Path(scratch)), {"folder": data, "shards": Path(scratch) / "packed"}
        for part in ("train", "val"):
            pack(data / part, places["shards"] / part, 256 * 2**20, 0, 4, lambda _: None)
        for wait, gains in GAINS.items():
            reads = dict.fromkeys(read for gain in gains for read in gain[:2])
            seconds: dict[Read, list[float]] = {read: [] for read in reads}
            for _ in range(rounds):
                for read in reads:
                    seconds[read].append(1 / opened_slowly(read, places[read.source], library, wait))
            for ours, other, goal in gains:
                pair = Pair(tuple(seconds[ours]), tuple(seconds[other]), "wall")
                detail = f"{pair.rates()} images/s on one rank, one thread to decode, {wait:g} ms to open a file"
                found.append(pair.row(f"{ours} ÷ {other}, {wait:g} ms to open a file, wall seconds", goal, detail))
    return found


def classes_per_batch(batch: int = 256, classes: int = 1000) -> Callable[[Path], float]:
    """Of one epoch of a training stream, were neighbours in the list of one class, as in ImageNet's; the mean."""

    def mean(data: Path) -> float:
        split = open_dataset(data).train
        split = replace(split, labels=tuple(place * classes // len(split) for place in range(len(split))))
        stream = training_stream(split, SMALL, One(), batch, 1, 0, AUGMENT)
        return float(np.mean([len(set(found.labels.tolist())) for found in stream.raw()]))

    return mean


def mixing(data: Path, batch: int = 256, classes: int = 1000) -> dict[str, float]:
    """Classes per batch: of the folder, of its shards, and of a uniform shuffle, by counting."""
    count = len(open_dataset(data).train)
    order, rng = np.arange(count) * classes // count, np.random.default_rng(0)
    shuffled = rng.permutation(order)[: count // batch * batch].reshape(-1, batch)
    mean = classes_per_batch(batch, classes)
    with TemporaryDirectory() as scratch:
        for part in ("train", "val"):
            pack(data / part, Path(scratch) / part, 256 * 2**20, 0, 4, lambda _: None)
        return {
            "uniform": float(np.mean([len(set(row.tolist())) for row in shuffled])),
            "folder": mean(data),
            "shards": mean(Path(scratch)),
        }


def compare_packed(data: Path, rounds: int, output: Path) -> None:
    """Print and write what shards gain, and how well they shuffle."""
    found, mixed = packed_rows(data, rounds), mixing(data)
    print(table(found))
    print(f"classes per batch of 256, of 1,000: {', '.join(f'{name} {mean:.1f}' for name, mean in mixed.items())}")
    write_json(output, report(found, command_line("tests.bench.packed")) | {"classes_per_batch": mixed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--rate", choices=("training", "evaluation"), help="images a second of this stream alone")
    parser.add_argument("--readers", type=int, default=reading.THREADS, help="of an evaluation from a folder")
    options = parser.parse_args()
    if options.rate:
        print(images_per_second(options.data, options.rate, options.readers))
    else:
        compare_packed(options.data.resolve(), options.rounds, options.output)


if __name__ == "__main__":
    main()
