"""From launch to the first batch with as many files as ImageNet has, and what is read of them before.

    uv run python -m tests.bench.startup --images DIR [--files N] [--ranks N] [--output FILE]

Hard links to some images of `DIR` stand for the files, in 1,000 class folders of train/ and val/ in a temporary
folder, which is removed. torchrun starts the ranks twice: the second finds in the cache that the files are sound.
Their bytes are in the page cache, as the images are few.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dist_prune.config.recipes import parse
from dist_prune.data.loader import training_stream
from dist_prune.distributed.world import World, joined
from dist_prune.run.images import check_images, open_images
from tests.bench.timing import command_line, heading, write_json

RESULT = Path(__file__).parent / "results" / "startup.json"
CLASSES, COPIES = 1000, 40  # a file takes 65,000 links at most
FILES = 1_331_167  # ILSVRC 2012: 1,281,167 to train, 50,000 to validate


def write_links(images: Path, folder: Path, files: int) -> None:
    """That many files in class folders, a 27th of them in val/."""
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:COPIES]
    copies = []
    for place, path in enumerate(found):
        copies.append(folder / f"{place}.JPEG")
        copies[-1].write_bytes(path.read_bytes())
    val = files * 50_000 // FILES
    for part, count in (("train", files - val), ("val", val)):
        names = (f"n{place % CLASSES:08d}/n{place % CLASSES:08d}_{place}.JPEG" for place in range(count))
        for label in range(CLASSES):
            (folder / "data" / part / f"n{label:08d}").mkdir(parents=True)
        for name, copy in zip(names, cycle(copies), strict=False):
            os.link(copy, folder / "data" / part / name)


def steps(world: World, data: Path) -> Iterator[str]:
    """What a run does until its first batch."""
    config = parse(["resnet18-imagenet", "--data", str(data)])
    yield "joined"
    dataset = world.from_first(lambda: open_images(config))
    yield "listed"
    for split in (dataset.train, dataset.val):
        check_images(config, split, world)
    yield "checked"
    images = config.images
    stream = training_stream(dataset.train, images.image, world, 8, 2, config.seed, images.augment)
    (batch,) = islice(stream.raw(), 1)
    assert len(batch.images) == 8
    yield "first batch"


def rank(data: Path, began: float) -> None:
    """What one rank does; the first one prints seconds since the launch and bytes that all read so far."""
    torch.set_num_threads(1)
    with joined("cpu", 600) as world:
        seconds, read = dict[str, float](), dict[str, int]()
        for step in steps(world, data):
            seconds[step], read[step] = round(time.time() - began, 1), sum(world.gather(bytes_read()))
        if world.is_first:
            print(json.dumps({"seconds": seconds, "read": read["checked"] - read["listed"]}))


def bytes_read() -> int:
    """By this process so far, from the page cache or from disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def launch(data: Path, cache: Path, ranks: int) -> dict[str, object]:
    """One start of all ranks by torchrun."""
    words = ["--standalone", "--nproc-per-node", str(ranks), "-m", "tests.bench.startup", "--images", str(data)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--rank-began", str(time.time())],
        env=os.environ | {"DIST_PRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with some JPEG files, at any depth")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank-began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rank_began:
        rank(options.images, options.rank_began)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_links(options.images, folder, options.files)
        starts = {which: launch(folder / "data", folder / "cache", options.ranks) for which in ("first", "second")}
    result = heading(command_line("tests.bench.startup")) | {
        "files": options.files,
        "ranks": options.ranks,
        **starts,
    }
    print(json.dumps(result, indent=1))
    write_json(options.output, result)


if __name__ == "__main__":
    main()
