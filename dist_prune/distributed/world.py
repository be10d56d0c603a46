"""Who this process is among its peers, every collective the project uses, and how errors reach all ranks.

Nothing else in the project touches `torch.distributed`. A single process is a world of size 1.
"""

import functools
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dist_prune.distributed.buckets import buckets_of, pack, unpack
from dist_prune.distributed.devices import (
    await_device,
    choose_device,
    crowding,
    hidden_peers,
    host_id,
    load_of_this_process,
    own_device,
    quiet_output,
)
from dist_prune.distributed.launch_env import LaunchEnv, find_launch_env
from dist_prune.distributed.meeting import Meeting, address_towards, gloo_reaching, interface_to_others, meet
from dist_prune.distributed.memory import free_memory
from dist_prune.distributed.watchdog import Alarm, Whereabouts, describe

T = TypeVar("T")
P = ParamSpec("P")

LAUNCHER_S = 10.0  # a launcher's store that cannot be reached for so long has gone with the launcher
NCCL_LATER_S = 60.0  # by which NCCL's own timeout follows ours: it ends the process, where ours is an exception
PANEL = 128  # rows of a symmetric matrix that travel together, from their first diagonal element on


class RankError(RuntimeError):
    """Another rank failed; the message names it and its error."""


@contextmanager
def joined(device: str = "auto", timeout_s: float = 600, place: LaunchEnv | None = None) -> Iterator["World"]:
    """Join the other ranks, lend a `World`, leave together.

    An exception on any rank ends all. A rank that is free to raise gets a `RankError` naming the first
    failure; one that is not (deep in a computation, in a collective that never ends) is ended after some
    seconds with the same message on stderr and exit status 1. An error all ranks share is raised as it is.

    Args:
        device: "auto" (GPUs where each rank has one, else the CPU, see `own_device`), "cpu" or "cuda".
        timeout_s: seconds that ranks wait for each other, when joining and in every collective.
        place: where this process stands; found in the environment by default.

    Raises:
        RankError: another rank failed or died, or the ranks could not meet.
        DeviceError: "cuda" was asked for, and there are fewer GPUs than ranks.
        RuntimeError: this process has already joined.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has already joined a world: pass that World on instead")
    place = place or find_launch_env(os.environ)
    store, meeting = _meet(place, timeout_s)
    where = Whereabouts()
    with Alarm(store, store.clone(), place, where) as alarm:  # type: ignore[attr-defined]
        try:
            chosen, note = _enter(store, place, meeting, device, timeout_s)
            world = World(place, chosen, where, timeout_s=timeout_s)
            world.note = note
            yield world
            world.barrier()  # a rank that is done still has to hear of the others' errors
        except BaseException as error:
            verdict = alarm.raise_for_all(error, _connection_broke(error))
            _leave(broken=True)
            alarm.wait_until_heard()
            if isinstance(error, Exception) and not verdict.endswith(describe(error)):
                raise RankError(verdict) from error
            raise
        _leave()


def existing(device: torch.device) -> "World | None":
    """The ranks of the process group that this process is in, if it is in one; this one computes on `device`."""
    if not dist.is_initialized():
        return None
    place = LaunchEnv(dist.get_rank(), dist.get_world_size(), device.index or 0, "", "present")
    nccl_alone = "cpu:" not in dist.get_backend_config()
    return World(place, device, Whereabouts(), torch.device("cuda") if nccl_alone else None)


def _meet(place: LaunchEnv, timeout_s: float) -> tuple[Store, Meeting]:
    """A store of this start's own, and what the ranks agree on there."""
    store = HashStore() if place.size == 1 else _open_store(place, timeout_s)
    try:
        meeting = meet(store, place, timeout_s)
    except (TimeoutError, ConnectionError) as error:
        raise RankError(str(error)) from error
    except dist.DistError as error:
        raise RankError(f"rank {place.rank}: the store at {place.address} is gone: {_missing(place)}") from error
    return PrefixStore(meeting.name, store), meeting


@functools.cache  # rank 0 serves the store: others may still read its last message, or join the next world
def _open_store(place: LaunchEnv, timeout_s: float) -> Store:
    patience_s = min(timeout_s, LAUNCHER_S) if place.launcher_serves else timeout_s
    try:
        timeout = timedelta(seconds=patience_s)
        found: Store = next(rendezvous(place.address, place.rank, place.size, timeout=timeout))[0]
    except dist.DistError as error:
        raise RankError(
            f"rank {place.rank} of {place.size} met no others at {place.address} in {patience_s:g} s: "
            f"{_missing(place)} ({error})"
        ) from error
    found.set_timeout(timedelta(seconds=timeout_s))
    return found


def _missing(place: LaunchEnv) -> str:
    if place.launcher_serves:
        return "torchrun, which should serve there, is gone or cannot be reached"
    return "start every rank, and check that this is rank 0's address and can be reached"


def _enter(
    store: Store, place: LaunchEnv, meeting: Meeting, wanted: str, timeout_s: float
) -> tuple[torch.device, str]:
    device = choose_device(wanted, place.local_rank)
    agreed = store.compare_set("device", "", device.type).decode()
    if agreed != device.type:
        raise RuntimeError(
            f"rank {place.rank} runs on {device.type}, another rank on {agreed}: "
            "check the GPUs of this node, or pass device 'cpu'"
        )
    device, note = own_device(store, place, wanted, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # batches keep their shape
    on_gpu = device.type == "cuda"
    with quiet_output(), gloo_reaching(interface_to_others(meeting.addresses, address_towards(place.address))):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout_s + NCCL_LATER_S * on_gpu),
            device_id=device if on_gpu else None,
        )
    return device, note


def _leave(broken: bool = False) -> None:
    if not dist.is_initialized():
        return
    if not broken:
        dist.destroy_process_group()
        return
    with suppress(Exception):  # what a broken NCCL says must not take the place of what broke it
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # an orderly NCCL shutdown would wait for the ranks that failed
    with suppress(Exception):
        dist.destroy_process_group()


def _connection_broke(error: BaseException) -> bool:
    timed_out = isinstance(error, dist.DistError | TimeoutError)
    return timed_out or bool(re.search("gloo|nccl|peer", str(error), re.IGNORECASE))


def _collective(method: Callable[P, T]) -> Callable[P, T]:
    """Note where the rank is while it is inside; an error leaves the note for its message."""

    @functools.wraps(method)
    def noted(*args: P.args, **kwargs: P.kwargs) -> T:
        world = cast(World, args[0])
        where = world.where
        outermost = not where.collective
        if outermost:
            where.collective, where.begun = method.__name__, where.begun + 1
        try:
            result = method(*args, **kwargs)
            if outermost:
                await_device(world.device, world.timeout_s)  # NCCL's collectives return before they are done
        except Exception as error:
            if not _connection_broke(error):
                where.collective = ""
            raise
        if outermost:
            where.collective = ""
        return result

    return noted


class World:
    """The ranks of a run and what they do together; every rank calls the same methods in the same order."""

    def __init__(
        self,
        place: LaunchEnv,
        device: torch.device,
        where: Whereabouts,
        carrier: torch.device | None = None,
        timeout_s: float = math.inf,
    ) -> None:
        self.rank = place.rank
        self.carrier = carrier  # where every tensor must lie to travel: NCCL alone takes none from the CPU
        self.size = place.size
        self.local_rank = place.local_rank
        self.device = device
        self.note = ""  # why it is not the device that one would expect
        self.where = where  # for error messages
        self.timeout_s = timeout_s

    def enter(self, phase: str) -> None:
        """Name the phase that the ranks are in, for error messages."""
        self.where.phase = phase

    def report_trouble(self, text: str) -> None:
        """Say what went wrong here before its cause is looked for; others hear of it should this rank not end."""
        self.where.trouble = text

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @_collective
    @torch.no_grad()
    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks, in place. Shapes and dtypes agree between ranks."""
        for bucket in buckets_of(tensors):
            flat = self._aboard(pack(bucket))
            dist.all_reduce(flat)
            unpack(flat, bucket)

    @_collective
    @torch.no_grad()
    def sum_symmetric_(self, *matrices: Tensor) -> None:
        """As `sum_` for symmetric matrices (…, n, n): what is left of panels along the diagonal does not travel.

        Raises:
            ValueError: a tensor is not a stack of square matrices.
        """
        for matrix in matrices:
            if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
                raise ValueError(
                    f"got shape {tuple(matrix.shape)}, expected (…, n, n): use sum_ for other tensors"
                )
        panels = [(matrix, start) for matrix in matrices for start in range(0, matrix.shape[-1], PANEL)]
        self.sum_(*(matrix[..., start : start + PANEL, start:] for matrix, start in panels))
        for matrix, start in panels:
            end = start + PANEL
            matrix[..., end:, start:end] = matrix[..., start:end, end:].mT
            corner = matrix[..., start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).mT)

    @_collective
    @torch.no_grad()
    def broadcast_(self, *tensors: Tensor, source: int = 0) -> None:
        """Overwrite each tensor by that of rank `source`, in place. Shapes and dtypes agree between ranks."""
        for bucket in buckets_of(tensors):
            flat = self._aboard(pack(bucket))
            dist.broadcast(flat.view(torch.uint8), source)  # as bytes: not every backend knows every dtype
            unpack(flat, bucket)

    @_collective
    def gather(self, value: T) -> list[T]:
        """The picklable values of all ranks, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @_collective
    def from_first(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0 and hand its picklable result to all; what it raises, all raise."""
        result: Any = None
        failed: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as error:
                failed = error
        outcome: list[Any] = [(result, failed and _portable(failed))]
        dist.broadcast_object_list(outcome, 0)
        if outcome[0][1]:
            raise failed or outcome[0][1]
        return cast(T, outcome[0][0])

    def on_all(self, function: Callable[[], T]) -> T:
        """Call the function on every rank; what it raises on one, no rank goes on without.

        Raises:
            RankError: it failed on another rank, which is named; where it failed, its own error is raised.
        """
        result: Any = None
        failed: Exception | None = None
        try:
            result = function()
        except Exception as error:
            failed = error
        faults = self.gather(failed and describe(failed))
        if failed:
            raise failed
        for rank, fault in enumerate(faults):
            if fault:
                raise RankError(f"rank {rank}: {fault}")
        return cast(T, result)

    def _aboard(self, tensor: Tensor) -> Tensor:
        return tensor if self.carrier is None else tensor.to(self.carrier)

    @_collective
    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        votes = torch.tensor([int(flag)])
        self.sum_(votes)
        return bool(votes.item())

    def highest(self, value: int) -> Callable[[], int]:
        """Begin to look for the largest value of any rank; calling the result waits for it."""
        votes = self._aboard(torch.tensor([value]))
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)

        return lambda: self._outcome(work, votes)

    @_collective
    def _outcome(self, work: dist.Work | None, votes: Tensor) -> int:
        if work is not None:
            work.wait()
        return int(votes.item())

    def crowding(self) -> str:
        """Whether ranks hold each other up, in words: threads beyond the cores, or hidden GPUs; empty if not."""
        loads = self.gather(load_of_this_process())
        return crowding(loads) if self.device.type == "cpu" else hidden_peers(loads)

    def free_memory(self) -> int:
        """Bytes that every rank may take at once, of its own GPU or of its host: the least of any rank."""
        ranks = self.gather((host_id(), free_memory(self.device)))
        sharing = Counter(host for host, _ in ranks) if self.device.type == "cpu" else {}
        return min(free // sharing.get(host, 1) for host, free in ranks)

    @_collective
    def barrier(self) -> None:
        """Return once every rank has called this."""
        self.any(False)

    @_collective
    def require_same(self, what: str, values: Mapping[str, str]) -> None:
        """Compare named values, such as parameter digests, between ranks.

        Raises:
            RankError: on every rank, if any rank's values differ from rank 0's.
        """
        first, *others = self.gather(dict(values))
        complaints = [
            f"rank {rank} differs from rank 0 in {len(names)} of {len(first)}: {', '.join(names[:3])}"
            for rank, other in enumerate(others, start=1)
            if (names := [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)])
        ]
        if complaints:
            raise RankError(f"{what} must be the same on all ranks, but {'; '.join(complaints)}")

    def replicate(self, model: nn.Module, **options: Any) -> DistributedDataParallel:  # noqa: ANN401
        """Wrap a model that lies on `device`, so that backward averages gradients; options go to DDP."""
        return DistributedDataParallel(model.to(self.device), **options)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling with its message, else a RankError with the same text."""
    with suppress(Exception):
        if describe(pickle.loads(pickle.dumps(error))) == describe(error):
            return error
    return RankError(f"rank 0: {describe(error)}")
