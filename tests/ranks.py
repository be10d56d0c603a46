"""Real processes for tests: `run_ranks(function, size, …)` calls a function on each rank of a gloo world."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.world import World, joined

T = TypeVar("T")


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung.

    `reports` has the exit code and the output, tracebacks included, of each rank that did; `seconds` has the
    time from joining to ending of each rank that did both by itself.
    """

    def __init__(self, reports: dict[int, str], seconds: dict[int, float]) -> None:
        super().__init__("\n".join(f"--- rank {rank}: {report}" for rank, report in reports.items()))
        self.reports = reports
        self.seconds = seconds


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: object,
    deadline_s: float = 60,
    timeout_s: float = 60,
    address: str = "",
    joins: int = 1,
) -> list[Any]:
    """Call `function(world, *args)` on every rank and return the results in rank order.

    The function must be importable and its results picklable. The deadline counts from the first start.
    The ranks meet at `address`, by default in a file; they join and call the function `joins` times.

    Raises:
        RanksFailed: with every failing rank's traceback; a rank past the deadline is killed and named.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = [LaunchEnv(r, size, r, address or f"file://{folder}/meet", "torchrun") for r in range(size)]
        processes = [
            context.Process(target=_run_rank, args=(function, place, timeout_s, folder, args, joins))
            for place in places
        ]
        for process in processes:
            process.start()
        ended = _wait_for(processes, deadline_s)
        _kill([process for rank, process in enumerate(processes) if rank not in ended])
        return _collect(folder, processes, ended, deadline_s)


def run_alone(function: Callable[[], T]) -> T:
    """Call an importable function in a fresh process that has joined no world; return or raise what it does."""
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(function).result(timeout=60)


def _context() -> ForkServerContext:
    # Forked from a server that imported everything but used nothing: fresh processes, without 6 s of imports each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "dist_prune.pipeline"])
    return context


def free_address() -> str:
    """A tcp address on this host that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def in_turn(world: World, functions: Sequence[Callable[[World], object]]) -> list[object]:
    """Call several functions in one world: starting processes takes longer than most of them."""
    return [function(world) for function in functions]


def _run_rank(
    function: Callable[..., Any],
    place: LaunchEnv,
    timeout_s: float,
    folder: Path,
    args: tuple[object, ...],
    joins: int,
) -> None:
    output = os.open(folder / f"{place.rank}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)  # not sys.stdout: C++ and the interpreter's last words belong into the report as well
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    torch.set_num_threads(1)
    for _ in range(joins):
        with joined("cpu", timeout_s, place) as world:
            (folder / f"{place.rank}.joined").write_text(str(time.time()))
            result = function(world, *args)
    (folder / f"{place.rank}.result").write_bytes(pickle.dumps(result))


def _wait_for(processes: Sequence[BaseProcess], deadline_s: float) -> dict[int, float]:
    """Wait for the processes; the time at which each one ended, by rank."""
    deadline = time.monotonic() + deadline_s
    ended: dict[int, float] = {}
    while len(ended) < len(processes) and time.monotonic() < deadline:
        running = [process for rank, process in enumerate(processes) if rank not in ended]
        wait([process.sentinel for process in running], timeout=max(0, deadline - time.monotonic()))
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.time()
    return ended


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        _dump_stack(process)
    for process in processes:
        process.kill()
        process.join()


def _dump_stack(process: BaseProcess) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)


def _collect(
    folder: Path, processes: Sequence[BaseProcess], ended: dict[int, float], deadline_s: float
) -> list[Any]:
    reports: dict[int, str] = {}
    for rank, process in enumerate(processes):
        output = folder / f"{rank}.output"
        text = output.read_text(errors="replace") if output.exists() else ""
        if rank not in ended:
            reports[rank] = f"hung, killed after {deadline_s:g} s, when it stood at\n{text}"
        elif process.exitcode != 0 or not (folder / f"{rank}.result").exists():
            reports[rank] = f"exit code {process.exitcode}\n{text}"
    if reports:
        joins = {rank: folder / f"{rank}.joined" for rank in ended}
        raise RanksFailed(
            reports,
            {rank: ended[rank] - float(path.read_text()) for rank, path in joins.items() if path.exists()},
        )
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(len(processes))]
