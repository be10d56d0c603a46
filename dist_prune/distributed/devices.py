"""Which device each rank computes on: a GPU of its own, or the CPU with cores enough."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.watchdog import RendezvousStore

POLL_S = 1e-4  # while a GPU works
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period


class DeviceError(ValueError):
    """The device asked for is not there."""


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The CPU, or a GPU: the one that this rank would have if there were enough; see `own_device`.

    Raises:
        DeviceError: a GPU was asked for, and there is none.
        ValueError: not a device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {wanted!r}, expected 'auto', 'cpu' or 'cuda'")
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise DeviceError(
            f"device 'cuda' was asked for, but this process sees no GPU (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}): ask the scheduler for one, or pass device 'cpu'"
        )
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def identity_of(device: torch.device) -> str:
    """Which GPU this is, whatever CUDA_VISIBLE_DEVICES shows and in whatever container: its host and its UUID."""
    return f"{host_id()}/{torch.cuda.get_device_properties(device).uuid}"


def host_id() -> str:
    """What all processes of a host have in common, in containers too, and no other host has."""
    try:
        return BOOT_ID.read_bytes().decode().strip()
    except OSError:
        return socket.gethostname()


def sharing(store: RendezvousStore, size: int, gpu: str) -> str:
    """Whether any two ranks have the same GPU, in words and the same on every rank; empty if each has its own.

    Looked at before they connect: NCCL refuses such ranks in words of its own.

    Args:
        store: that all ranks share.
        size: how many ranks there are.
        gpu: of this rank, see `identity_of`.
    """
    if store.add(f"gpu/{gpu}", 1) > 1:
        store.add("gpus shared", 1)
    if store.add("gpus", 1) == size:
        store.set("gpus known", "")
    store.wait(["gpus known"])
    found = size - store.add("gpus shared", 0)
    return f"{size} ranks on {found} GPU{'s' * (found > 1)}, and a GPU takes one" if found < size else ""


def own_device(
    store: RendezvousStore, place: LaunchEnv, wanted: str, device: torch.device
) -> tuple[torch.device, str]:
    """The GPU of this rank, or the CPU where "auto" finds fewer GPUs than ranks, and what to say then.

    On a cluster that is an error: nobody reads the line before the hours are gone.

    Raises:
        DeviceError: on every rank, with both ways out.
    """
    if device.type == "cpu" or not (shared := sharing(store, place.size, identity_of(device))):
        return device, ""
    fewer = f"start as many ranks as GPUs (--nproc-per-node {torch.cuda.device_count()})"
    if wanted == "cuda" or place.source in ("slurm", "submitit"):
        raise DeviceError(f"{shared}: {fewer}, or compute on the CPU (--device cpu)")
    return torch.device("cpu"), f"{shared}: computing on the CPU (as with --device cpu); to use GPUs, {fewer}"


def await_device(device: torch.device, timeout_s: float) -> None:
    """Return once a GPU has done all that it was given; at once where that is a CPU, or where there is no limit.

    Raises:
        TimeoutError: it is not done in time.
    """
    if device.type != "cuda" or math.isinf(timeout_s):
        return
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + timeout_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done in {timeout_s:g} s")
        time.sleep(POLL_S)


# ── the CPU ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Load:
    """Of one rank: its host, the cores it may run on, how many it may keep busy, its threads, and GPUs seen."""

    host: str
    cores: frozenset[int]
    busy: float
    threads: int
    gpus: int = 0


def load_of_this_process() -> Load:
    """With the threads that PyTorch computes with; those that decode images are not counted."""
    cores = frozenset(os.sched_getaffinity(0))
    busy, gpus = min(float(len(cores)), _quota()), torch.cuda.device_count()
    return Load(socket.gethostname(), cores, busy, torch.get_num_threads(), gpus)


def _quota() -> float:
    try:
        busy, period = CPU_QUOTA.read_bytes().split()
        return int(busy) / int(period)
    except (OSError, ValueError):  # not in a container, or one without a limit ("max")
        return float("inf")


def crowding(ranks: Sequence[Load]) -> str:
    """What to say where the ranks of a host compute with more threads than it has cores; empty if none do."""
    for host in sorted({rank.host for rank in ranks}):
        here = [rank for rank in ranks if rank.host == host]
        union = frozenset[int]().union(*(rank.cores for rank in here))
        available = min(len(union), sum({rank.cores: rank.busy for rank in here}.values()))
        if sum(rank.threads for rank in here) > available:
            each = int(available / len(here))
            advice = f"set OMP_NUM_THREADS={each}" if each else f"start at most {max(1, int(available))} rank(s)"
            return (
                f"{len(here)} rank(s) × {here[0].threads} thread(s) on {available:g} core(s) of {host}: they hold "
                f"each other up, and work takes several times as long; {advice}"
            )
    return ""


def hidden_peers(ranks: Sequence[Load]) -> str:
    """What to say where a rank sees fewer GPUs than its host has ranks; empty where all see enough."""
    for host in sorted({rank.host for rank in ranks}):
        here = [rank.gpus for rank in ranks if rank.host == host]
        if min(here) < len(here):
            return (
                f"{len(here)} ranks on {host}, and one sees {min(here)} GPU(s): what is hidden from a rank (by "
                f"--gpus-per-task, --gpu-bind or CUDA_VISIBLE_DEVICES) NCCL may not reach by NVLink or PCIe, but "
                f"through the host's memory; show all GPUs of a node to all its ranks: --gpus-per-node"
            )
    return ""


@contextmanager
def quiet_output() -> Iterator[None]:
    """While open, what libraries print goes nowhere: gloo announces itself on the standard output."""
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard output
        yield
        return
    flush = ctypes.CDLL(None).fflush
    try:
        flush(None)
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
