import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_prune.distributed import buckets
from dist_prune.distributed import watchdog as alarm_module
from dist_prune.distributed import world as world_module
from dist_prune.distributed.devices import DeviceError
from dist_prune.distributed.fingerprint import digest, fingerprint
from dist_prune.distributed.launch_env import find_launch_env
from dist_prune.distributed.world import RankError, World, joined
from tests.ranks import RanksFailed, free_address, in_turn, run_alone, run_ranks

# --- what ranks do together, at several sizes -----------------------------------------------------


def values(world, *shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + world.rank


def total(world, *shape, dtype=torch.float32):
    return sum(torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + r for r in range(world.size))


def check_sum(world: World):
    world.sum_()
    a, b, c = values(world, 2, 3), values(world, 5, dtype=torch.float64), values(world, dtype=torch.int64)
    part = torch.zeros(4, 6)
    strided = part[:, ::2].T
    strided.copy_(values(world, 3, 4))
    parameter = nn.Parameter(values(world, 3))
    world.sum_(a, b, c, strided, parameter, torch.empty(0))
    assert torch.equal(a, total(world, 2, 3))
    assert torch.equal(b, total(world, 5, dtype=torch.float64))
    assert torch.equal(c, total(world, dtype=torch.int64))
    assert torch.equal(strided, total(world, 3, 4))
    assert torch.equal(parameter, total(world, 3))
    assert parameter.requires_grad
    assert not part[:, 1::2].any()


def check_sum_in_small_buckets(world: World):
    size, buckets.BUCKET_BYTES = buckets.BUCKET_BYTES, 64
    try:
        tensors = [values(world, n) for n in (3, 40, 10, 7, 1)]
        world.sum_(*tensors)
        assert all(torch.equal(t, total(world, len(t))) for t in tensors)
    finally:
        buckets.BUCKET_BYTES = size


def check_sum_symmetric(world: World):
    generator = torch.Generator().manual_seed(world.rank)
    matrices = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(5, 5), (2, 3, 3)]]
    matrices = [matrix + matrix.mT for matrix in matrices]
    plain = [matrix.clone() for matrix in matrices]
    world.sum_(*plain)
    world.sum_symmetric_(*matrices)
    torch.testing.assert_close(matrices, plain)  # not equal: the ring adds in another order at another offset
    assert all(torch.equal(matrix, matrix.mT) for matrix in matrices)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        world.sum_symmetric_(torch.zeros(2, 3))


def check_broadcast(world: World):
    source = world.size - 1
    flag, number = torch.tensor([world.rank == source]), torch.tensor(world.rank)
    parameter = nn.Parameter(values(world, 4, 2))
    strided = values(world, 4, 4)[:, 1:3]
    half = values(world, 3, dtype=torch.bfloat16)
    world.broadcast_(flag, number, parameter, strided, half, source=source)
    assert flag.item() is True
    assert number.item() == source
    assert torch.equal(parameter, torch.arange(8.0).reshape(4, 2) + source)
    assert torch.equal(strided, torch.arange(16.0).reshape(4, 4)[:, 1:3] + source)
    assert torch.equal(half, torch.arange(3, dtype=torch.bfloat16) + source)


def check_objects(world: World):
    assert world.gather({"rank": world.rank}) == [{"rank": rank} for rank in range(world.size)]
    assert world.any(world.rank == world.size - 1) is True
    assert world.any(False) is False
    calls = []
    assert world.from_first(lambda: calls.append(1) or f"from {world.rank}") == "from 0"
    assert len(calls) == int(world.is_first)


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail(error):
    raise error


def check_errors_of_the_first(world: World):
    with pytest.raises(FileNotFoundError, match="no such weights"):
        world.from_first(lambda: fail(FileNotFoundError(2, "no such weights")))
    with pytest.raises(Unpicklable if world.is_first else RankError, match="this and that"):
        world.from_first(lambda: fail(Unpicklable("this", "that")))


def check_require_same(world: World):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    world.broadcast_(*model.parameters(), *model.buffers())
    world.require_same("parameters", fingerprint(model))
    if world.size == 1:
        return
    if world.rank == 1:
        model[0].bias.data[2] += 1e-6
    with pytest.raises(RankError, match=r"parameters must.*rank 1 differs from rank 0 in 1 of \d: 0\.bias$"):
        world.require_same("parameters", fingerprint(model))
    with pytest.raises(RankError, match="rank 1 differs"):
        world.require_same("sites", {"a": "1"} if world.rank != 1 else {})


def check_replicate(world: World):
    model = nn.Linear(2, 1, bias=False)
    world.broadcast_(model.weight)
    replica = world.replicate(model, broadcast_buffers=False)
    replica(torch.full((1, 2), float(world.rank))).sum().backward()
    assert torch.allclose(model.weight.grad, torch.full((1, 2), (world.size - 1) / 2))


CHECKS = [
    check_sum,
    check_sum_in_small_buckets,
    check_sum_symmetric,
    check_broadcast,
    check_objects,
    check_errors_of_the_first,
    check_require_same,
    check_replicate,
]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size):
    run_ranks(in_turn, size, CHECKS)


@pytest.mark.parametrize("address", ["", free_address()], ids=["file", "tcp"])
def test_a_world_may_be_joined_again(address):
    results = run_ranks(gather_late, 3, address=address, joins=3)
    assert results == [[0, 1, 2]] * 3


def gather_late(world: World):
    time.sleep(0.2 * world.rank)
    return world.gather(world.rank)


# --- errors travel --------------------------------------------------------------------------------

LIMIT_S = 15


def behave(world: World, behaviours):
    """Each rank does what its entry says, all starting together."""
    alarm_module.LOST_S = 3  # more patience is for real runs
    world.barrier()
    behaviours[world.rank](world)


def work(world):
    for _ in range(100_000):
        world.sum_(torch.ones(1000))


def wait_in_collective(world):
    world.sum_(torch.ones(1))


def sleep(world):
    time.sleep(60)


def compute(world):
    while True:
        sum(range(1000))


def finish(world):
    pass


def fail_soon(world):
    time.sleep(0.5)
    raise ValueError(f"bad image on rank {world.rank}")


def be_killed(world):
    time.sleep(1.5)  # by now it has shown that it lives
    os.kill(os.getpid(), signal.SIGKILL)


def all_fail(world):
    raise KeyError("a typo in the recipe")


def stop(world):
    raise SystemExit(3)


def failure_of(*behaviours, address="file"):
    address = free_address() if address == "tcp" else ""
    with pytest.raises(RanksFailed) as caught:
        run_ranks(behave, len(behaviours), behaviours, deadline_s=50, timeout_s=40, address=address)
    failed = caught.value
    print({behaviours[rank].__name__: round(seconds, 1) for rank, seconds in failed.seconds.items()})
    assert set(failed.reports) == set(failed.seconds) == set(range(len(behaviours))), failed
    assert max(failed.seconds.values()) < LIMIT_S, failed
    return failed.reports


@pytest.mark.parametrize(
    "behaviours",
    [(work, fail_soon, sleep), (fail_soon, wait_in_collective, compute), (finish, fail_soon)],
)
def test_an_exception_reaches_all_ranks(behaviours):
    rank = behaviours.index(fail_soon)
    reports = failure_of(*behaviours, address="tcp")
    for report in reports.values():
        assert "exit code 1" in report
        assert f"ValueError: bad image on rank {rank}" in report
    assert all(f"rank {rank} failed" in report for r, report in reports.items() if r != rank)


@pytest.mark.parametrize("behaviours", [(work, work, be_killed), (work, sleep, be_killed)])
def test_a_killed_rank_is_named(behaviours):
    reports = failure_of(*behaviours)
    assert "exit code -9" in reports[2]
    assert all("rank 2 died without a message" in reports[rank] for rank in (0, 1))


def test_the_host_of_the_store_is_killed():
    reports = failure_of(be_killed, wait_in_collective, sleep, address="tcp")
    assert all("rank 0 died without a message" in reports[rank] for rank in (1, 2))


def test_an_error_all_ranks_share_stays_what_it_is():
    reports = failure_of(all_fail, all_fail)
    assert all("KeyError: 'a typo in the recipe'" in report for report in reports.values())
    assert not any("RankError" in report for report in reports.values())


def test_exit_keeps_its_status():
    reports = failure_of(stop, work)
    assert "exit code 3" in reports[0]
    assert "rank 0 failed: SystemExit: 3" in reports[1]


def test_a_rank_that_hangs_is_killed_and_named():
    with pytest.raises(RanksFailed, match="rank 0: hung") as caught:
        run_ranks(behave, 1, (sleep,), deadline_s=3)
    assert "in sleep" in str(caught.value)


# --- one process ----------------------------------------------------------------------------------


def join_twice():
    for _ in range(2):
        with joined("cpu", place=find_launch_env({})) as world:
            assert dist.is_initialized()
            check_sum(world)
            with pytest.raises(RuntimeError, match="already joined"), joined("cpu"):
                pass
            check_sum(world)
        assert not dist.is_initialized()
    assert threading.active_count() == 1


def test_a_single_process_may_join_again_and_leaves_nothing_behind():
    run_alone(join_twice)


def fail_inside():
    with pytest.raises(ZeroDivisionError), joined("cpu", place=find_launch_env({})):
        _ = 1 / 0
    assert not dist.is_initialized()


def test_an_exception_leaves_no_group_behind():
    run_alone(fail_inside)


def ask_for_cuda():
    with pytest.raises(DeviceError, match=r"'cuda' was asked for.*pass device 'cpu'"), joined("cuda"):
        pass
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_asked_for_and_absent():
    run_alone(ask_for_cuda)


def ask_for_gpu():
    with pytest.raises(ValueError, match="'gpu', expected"), joined("gpu"):
        pass


def test_unknown_device():
    run_alone(ask_for_gpu)


def test_digest_sees_values_names_and_shapes():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    before = digest(model)
    assert before == digest(model)
    assert set(fingerprint(model)) == {"weight", "bias"}
    model.weight.data = model.weight.data.reshape(4, 1)
    assert digest(model) != before
    model.weight.data = model.weight.data.reshape(2, 2)
    assert digest(model) == before
    model.bias.data[0] += 1
    assert digest(model) != before


# --- a rank that hangs ----------------------------------------------------------------------------


def hang_in_one(world: World):
    world.enter("statistics")
    world.barrier()
    if world.rank == 1:
        time.sleep(60)
    world.sum_(torch.ones(1))


def hang_in_a_phase_of_its_own(world: World):
    world.enter("statistics" if world.rank == 1 else "correction")
    time.sleep(1)  # long enough to be seen there
    if world.rank == 1:
        time.sleep(60)
    world.from_first(lambda: None)


@pytest.mark.parametrize(
    ("function", "waited", "elsewhere"),
    [
        (
            hang_in_one,
            "collective #2 (sum_), phase 'statistics'",
            "no collective, phase 'statistics'",
        ),
        (
            hang_in_a_phase_of_its_own,
            "collective #1 (from_first), phase 'correction'",
            "no collective, phase 'statistics'",
        ),
    ],
)
def test_a_timeout_names_the_phase_the_collective_and_who_is_elsewhere(function, waited, elsewhere):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(function, 3, timeout_s=3, deadline_s=40)
    first = caught.value.reports[0]
    assert f"timed out in {waited}" in first
    assert f"rank 1 is in {elsewhere}" in first
    assert all("timed out" in report for report in caught.value.reports.values())
    assert set(caught.value.reports) == {0, 1, 2}


# --- collectives that return before they are done, as NCCL's do --------------------------------------


class Stuck:
    """An event of a GPU that never gets there."""

    def record(self):
        pass

    def query(self):
        return False


def stuck_on_a_gpu(world: World, seconds: float):
    """As if on a GPU: the sum is enqueued, and nothing comes of it, as rank 1 is elsewhere."""
    world.enter("statistics")
    world.barrier()
    world.device, world.timeout_s, torch.cuda.Event = torch.device("cuda", 0), seconds, Stuck
    if world.rank == 1:
        world.report_trouble("DALI failed: CUDA driver error 999")
        time.sleep(60)
    world_module.dist.all_reduce = lambda *_: None
    world.sum_(torch.ones(1))


def test_a_collective_that_a_gpu_never_ends_is_named_like_any_other():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(stuck_on_a_gpu, 2, 2.0, timeout_s=30, deadline_s=40)
    first = caught.value.reports[0]
    assert "rank 0 timed out in collective #2 (sum_), phase 'statistics'; rank 1 is in no collective" in first
    assert "phase 'statistics', after DALI failed: CUDA driver error 999" in first
    assert "TimeoutError: not done in 2 s" in first


def break_while_leaving(world: World):
    def broken():
        raise RuntimeError("NCCL error: unhandled system error")

    world_module.dist.destroy_process_group = broken
    raise ValueError("the cause")


def test_what_goes_wrong_while_ranks_leave_does_not_hide_why_they_do():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(break_while_leaving, 2, deadline_s=40)
    assert all("ValueError: the cause" in report for report in caught.value.reports.values())
    assert not any("unhandled system error" in report for report in caught.value.reports.values())


def be_killed_after_trouble(world: World):
    world.report_trouble("DALI failed: Failed to decode sample #1")
    be_killed(world)


def test_a_killed_rank_is_named_with_the_trouble_it_was_in():
    reports = failure_of(work, be_killed_after_trouble)
    assert "rank 1 died without a message" in reports[0]
    assert "DALI failed: Failed to decode sample #1" in reports[0]
