"""`dist-prune check`: environment, folders, images and weights of a run, checked before it is queued."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from dist_prune.artifacts import run_directory
from dist_prune.artifacts.lock import LOCK, Lock
from dist_prune.config.help import Usage
from dist_prune.config.recipes import given, parse
from dist_prune.config.run import Run
from dist_prune.data.damage import damaged, decode_fault, find_faults
from dist_prune.data.dataset import Split
from dist_prune.data.loader import Unsharded, evaluation_stream
from dist_prune.data.pretrained_images import adapted
from dist_prune.distributed.launch_env import find_launch_env
from dist_prune.distributed.world import RankError, World, joined
from dist_prune.network import models
from dist_prune.run.prepare import (
    check_images,
    load_network,
    notes_on,
    open_images,
    open_unlabelled,
    require_classes,
)
from dist_prune.training.trainer import require_possible
from dist_prune.utils.console import columns, hanging
from dist_prune.utils.files import CheckpointError, cache_folder, write_text

CHECK = Usage(
    "dist-prune check",
    "Check all that `run` with the same words will need: versions, devices, ranks, DALI, folders, images, "
    "weights. Exit code 1 if anything fails.",
    (
        "dist-prune check resnet18-imagenet --data /imagenet --run-dir /shared/runs/first",
        "srun --nodes 2 --ntasks-per-node 8 dist-prune check resnet18-imagenet --data /imagenet",
    ),
)
Verdict = Literal["ok", "warn", "fail"]
SEVERITY: tuple[Verdict, ...] = ("ok", "warn", "fail")
DECODED = 64  # images of each split that are decoded
LOW_GB, FULL_GB = 10.0, 0.5  # free space: a word of warning, too little for any run
PATIENCE_S = 10.0  # for which a shared folder may take to show another node's file
TRY_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, and what to do about it unless it is ok."""

    subject: str
    verdict: Verdict
    text: str
    advice: str = ""


Look = Callable[[Run, World], Iterator[Finding]]


def main(words: Sequence[str]) -> int:
    """Look at everything; 1 if anything fails, else 0."""
    first = find_launch_env(os.environ).rank == 0
    config, verdicts = adapted(parse(words, not first, CHECK), given(words)), set[Verdict]()
    with joined(config.device, config.timeout) as world:
        for subject, look in LOOKS.items():
            for finding in agreed(looked(subject, look, config, world), world):
                verdicts.add(finding.verdict)
                if first:
                    print(shown(finding, columns()), flush=True)
    if first:
        print("something fails: a run would end" if "fail" in verdicts else "ready")
    return int("fail" in verdicts)


def looked(subject: str, look: Look, config: Run, world: World) -> list[Finding]:
    """What a look finds on this rank; an error that ends it is a finding, too."""
    found: list[Finding] = []
    try:
        found.extend(look(config, world))
    except RankError:
        raise
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        found.append(Finding(subject, "fail", str(error)))
    return found


def agreed(found: Sequence[Finding], world: World) -> list[Finding]:
    """The worst that any rank found of each thing; it is named unless it is the first."""
    worst: dict[str, Finding] = {}
    for rank, findings in enumerate(world.gather(list(found))):
        for finding in findings:
            known = worst.get(finding.subject)
            if known is None or SEVERITY.index(finding.verdict) > SEVERITY.index(known.verdict):
                text = f"rank {rank}: {finding.text}" if rank else finding.text
                worst[finding.subject] = replace(finding, text=text)
    return list(worst.values())


def shown(finding: Finding, width: int) -> str:
    """A finding in lines of at most `width` columns."""
    lines = [hanging(f"{finding.verdict:4}  {finding.subject}", finding.text, 22, width)]
    if finding.advice and finding.verdict != "ok":
        lines.append(hanging("", f"→ {finding.advice}", 22, width))
    return "\n".join(lines)


# ── the machine ────────────────────────────────────────────────────────────────────────────────────────────


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
    yield Finding("DALI", "ok" if off <= 16 else "fail", text, "reinstall nvidia-dali-cuda120")


# ── folders ────────────────────────────────────────────────────────────────────────────────────────────────


def space(config: Run, world: World) -> Iterator[Finding]:
    """Free space for the run and for what can be made again."""
    for subject, folder in (("space for runs", home(config)), ("space for cache", existing(cache_folder()))):
        free = shutil.disk_usage(folder).free / 1e9
        verdict: Verdict = "fail" if free < FULL_GB else "warn" if free < LOW_GB else "ok"
        name = "DIST_PRUNE_CACHE" if subject.endswith("cache") else "--run-dir"
        advice = f"make room, or name another place with {name}"
        writable = os.access(folder, os.W_OK)
        text = f"{free:.1f} GB free in {folder}{'' if writable else ', which cannot be written'}"
        yield Finding(subject, verdict if writable else "fail", text, advice)


def run_folder(config: Run, world: World) -> Iterator[Finding]:
    """Whether --run-dir can be taken as it is."""
    folder = run_directory.run_directory(config)
    run_directory.require_free(folder, config)
    yield Finding("run directory", "ok", f"{folder} {'is a run to resume' if folder.exists() else 'is free'}")


def shared(config: Run, world: World) -> Iterator[Finding]:
    """Files flushed and renamed where runs go: every rank sees all ranks' files, and a lock keeps others out."""
    parent, held = home(config), list[Lock]()
    folder = world.from_first(lambda: _scratch(parent))
    try:
        mine = _fault_in_writing(folder / f"{world.rank}.txt")
        absent = [] if any(world.gather(mine)) else _unseen(folder, world.size)
        world.from_first(lambda: held.append(Lock(folder)))
        hole = _hole_in_lock(folder / LOCK)
        world.barrier()
    finally:
        for lock in held:
            lock.release()
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    advice = "name a folder that all nodes share and may write to: --run-dir"
    text = f"{parent}: written, flushed, renamed, seen by {world.size} rank(s)"
    if absent:
        text = f"{socket.gethostname()} does not see in {parent} what ranks {absent} wrote"
    yield Finding("shared folder", "fail" if mine or absent else "ok", mine or text, advice)
    advice = "only owner.json keeps a second run out of a directory, which takes some seconds"
    yield Finding("locks", "warn" if hole else "ok", hole or f"{parent}: kept out of what another holds", advice)


def _scratch(parent: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".dist_prune-check-", dir=parent))
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be written ({error.strerror}): see --run-dir") from error


def _fault_in_writing(path: Path) -> str:
    try:
        write_text(path, socket.gethostname())
    except (OSError, CheckpointError) as error:
        return f"{socket.gethostname()} cannot write: {error}"
    return ""


def _unseen(folder: Path, size: int) -> list[int]:
    """Ranks whose file does not show up here."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        names = {path.name for path in folder.iterdir()}  # listed again, as network file systems keep old answers
        absent = [rank for rank in range(size) if f"{rank}.txt" not in names]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.1)


def _hole_in_lock(path: Path) -> str:
    """Why another process would get in, though this run holds the lock; nothing if it would not."""
    words = [sys.executable, "-c", TRY_LOCK, str(path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return f"{path.parent.parent}: a process got what another holds"
    said = done.stderr.strip().splitlines()[-1:]
    return "" if "BlockingIOError" in done.stderr else f"{path.parent.parent}: no record locks ({' '.join(said)})"


def home(config: Run) -> Path:
    """The folder that holds run directories, or that will hold the one that does."""
    return existing(run_directory.run_directory(config).parent)


def existing(folder: Path) -> Path:
    """The folder, or the innermost around it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# ── what is read ───────────────────────────────────────────────────────────────────────────────────────────


def images(config: Run, world: World) -> Iterator[Finding]:
    """Both ends of every file, the classes, and some images decoded."""
    if not config.images.data:
        yield Finding("images", "warn", "not looked at", "give --data DIR as the run will have it")
        return
    dataset = world.from_first(lambda: open_images(config))
    unlabelled = world.from_first(lambda: open_unlabelled(config))
    splits = {"train": dataset.train, "val": dataset.val, "calibration": unlabelled}
    for name, split in splits.items():
        if split is not None and split.files:
            check_images(config, split, world)
            yield Finding(name, "ok", f"{len(split):,} images in {split.root}, both ends of each file sound")
    if notes := notes_on(dataset, unlabelled):
        yield Finding("notes", "warn", "; ".join(notes), "see that this is meant")
    require_classes(config, dataset)
    yield Finding("classes", "ok", f"{len(dataset.train.classes):,}, as many as the network has outputs")
    read = sum(_decoded(split, config, world) for split in splits.values() if split is not None and split.files)
    yield Finding("read", "ok", f"{read} images by this rank, as --resize and --crop want them")


def _decoded(split: Split, config: Run, world: World) -> int:
    some = split.subset(min(len(split), DECODED * world.size), config.seed)
    # By Pillow first: some damage inside a file ends DALI's process without a word.
    faults = list(find_faults(some, range(len(some)), decode_fault))
    if faults:
        raise damaged(some, faults)
    stream = evaluation_stream(some, config.images.image, world, DECODED, config.images.threads)
    return sum(len(batch.images) for batch in stream.raw())


def weights(config: Run, world: World) -> Iterator[Finding]:
    """Whether the weights are at hand, and the network they go into."""
    network, epochs = config.network, config.pretrain.epochs
    missing = models.missing_weights(network.arch, network.weights)
    if network.weights == "none":
        text = (
            f"none: the network is trained first, {epochs} epochs" if epochs else "none, and no --pretrain.epochs"
        )
        yield Finding("weights", "ok" if epochs else "fail", text, "give --weights FILE, or --pretrain.epochs N")
    elif missing:
        advice = f"where compute nodes have no network, fetch {missing} and give --weights FILE"
        yield Finding("weights", "warn", f"{network.weights} will be downloaded", advice)
    taken: list[str] = []
    _, everything = load_network(config, world, taken.append, read=not missing)
    if network.weights != "none" and not missing:
        yield Finding("weights", "ok", "; ".join([f"{network.weights} fits {network.arch}", *taken]))
    chosen = len(everything.select(config.compression.sites).sites)
    text = f"{network.arch}: {everything.params / 1e6:.2f} M parameters, {everything.macs / 1e6:.1f} M MACs, "
    yield Finding("network", "ok", f"{text}{chosen} of {len(everything.sites)} layers chosen by --sites")


LOOKS: dict[str, Look] = {
    "packages": packages,
    "device": devices,
    "ranks": ranks,
    "DALI": decoding,
    "space": space,
    "run directory": run_folder,
    "shared folder": shared,
    "images": images,
    "weights": weights,
}
