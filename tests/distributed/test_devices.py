"""One GPU per rank, threads no more than cores, and nothing on the output but what the program says."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from dist_prune.distributed import devices, world
from dist_prune.distributed.devices import DeviceError, Load, choose_device, crowding, hidden_peers, own_device
from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.world import World
from tests.commands import PROGRAM
from tests.ranks import run_ranks
from tests.runs import Bench


def verdicts(
    monkeypatch: pytest.MonkeyPatch, gpus: str, wanted: str = "auto", source: str = "torchrun"
) -> set[str]:
    """What each rank does and is told, all at the store at once."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(devices, "identity_of", lambda device: gpus[device.index])
    pretend(monkeypatch, len(set(gpus)))

    def ask(rank: int) -> str:
        place = LaunchEnv(rank, len(gpus), rank, "", source)  # type: ignore[arg-type]
        try:
            device, note = own_device(store, place, wanted, torch.device("cuda", rank))
        except DeviceError as error:
            return f"error: {error}"
        return f"{device.type}: {note}"

    with ThreadPoolExecutor(len(gpus)) as pool:
        return set(pool.map(ask, range(len(gpus))))


@pytest.mark.parametrize("gpus", ["a", "ab", "abcdefgh"])
def test_ranks_with_a_gpu_each_take_it(monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    assert verdicts(monkeypatch, gpus) == {"cuda: "}


@pytest.mark.parametrize(
    ("gpus", "start"),
    [("aa", "2 ranks on 1 GPU,"), ("aba", "3 ranks on 2 GPUs,"), ("aaaa", "4 ranks on 1 GPU,")],
)
def test_ranks_that_share_a_gpu_are_all_told_the_same_with_both_ways_out(
    monkeypatch: pytest.MonkeyPatch, gpus: str, start: str
) -> None:
    """`auto` takes the CPU and says so; where a GPU was asked for, and in a cluster's jobs, it is an error."""
    for wanted, source, kind in (
        ("auto", "torchrun", "cpu: "),
        ("cuda", "torchrun", "error: "),
        ("auto", "slurm", "error: "),
    ):
        (said,) = verdicts(monkeypatch, gpus, wanted, source)
        assert said.startswith(kind + start)
        assert f"--nproc-per-node {len(set(gpus))}" in said and "--device cpu" in said


def pretend(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    assert [choose_device("auto", rank).index for rank in range(3)] == [0, 1, 0]  # the last is then refused
    assert choose_device("cpu", 0).type == "cpu"
    pretend(monkeypatch, 0)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(DeviceError, match="sees no GPU"):
        choose_device("cuda", 0)


def with_one_gpu(*words: str) -> int:
    """The program where every rank sees the same GPU."""
    from dist_prune.cli.main import main

    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    torch.cuda.device_count = lambda: 1  # type: ignore[method-assign]
    torch.cuda.get_device_name = lambda _=None: "the one"  # type: ignore[method-assign]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid="the one")  # type: ignore[method-assign]
    return main(list(words))


def test_two_ranks_on_one_gpu_end_in_one_line_before_any_work(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", device="cuda")
    done = bench.commands(*words, ranks=2, function="tests.distributed.test_devices:with_one_gpu")
    assert done.codes == [2, 2]
    (line,) = done.errors
    assert line.startswith("error: 2 ranks on 1 GPU, and a GPU takes one: start as many ranks as GPUs")
    assert not (tmp_path / "run").exists()


def test_two_ranks_compute_on_the_cpu_beside_one_gpu_and_say_so(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", epochs=0)
    done = bench.commands.succeed(*words, ranks=2, function="tests.distributed.test_devices:with_one_gpu")
    (line,) = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: 2 ranks on 1 GPU, and a GPU takes one: computing on the CPU")
    assert "2 rank(s) on cpu" in done.out


def seeing(gpus: int, host: str = "n1") -> Load:
    return Load(host, frozenset({0}), 1, 1, gpus)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([seeing(1)], ""),
        ([seeing(2), seeing(2)], ""),
        ([seeing(1, "n1"), seeing(1, "n2")], ""),  # one rank on each host
        ([seeing(1), seeing(1)], "2 ranks on n1, and one sees 1 GPU(s)"),
        ([seeing(8, "n0"), seeing(4), seeing(1)], "2 ranks on n1, and one sees 1 GPU(s)"),
    ],
)
def test_gpus_hidden_from_their_peers_are_warned_of(ranks: list[Load], said: str) -> None:
    """As srun --gpus-per-task=1 does."""
    found = hidden_peers(ranks)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not said or "--gpus-per-task" in found


def test_a_gpu_is_known_by_its_host_and_its_uuid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Virtual GPUs of several hosts may have one UUID; containers of one host share what it booted as."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0000"))
    names = set()
    for boot in "ab":
        (tmp_path / "boot_id").write_text(boot)
        monkeypatch.setattr(devices, "BOOT_ID", tmp_path / "boot_id")
        names.add(devices.identity_of(torch.device("cuda", 0)))
    assert names == {"a/0000", "b/0000"}
    monkeypatch.setattr(devices, "BOOT_ID", tmp_path / "absent")
    assert devices.identity_of(torch.device("cuda", 0)).endswith("/0000")


# ── cores ──────────────────────────────────────────────────────────────────────────────────────────────────


def load(threads: int, cores: str = "01", busy: float = 9, host: str = "n1") -> Load:
    return Load(host, frozenset(map(int, cores)), min(busy, len(cores)), threads)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([load(1), load(1)], ""),
        ([load(2)], ""),
        ([load(2), load(2)], "2 rank(s) × 2 thread(s) on 2 core(s) of n1: "),
        ([load(2, "01"), load(2, "23")], ""),  # cores of their own, as srun binds them
        ([load(2, host="n1"), load(2, host="n2")], ""),
        ([load(1), load(1), load(1)], "start at most 2 rank(s)"),
        ([load(4, "0123", 2.0)], "1 rank(s) × 4 thread(s) on 2 core(s)"),  # a container's share
        ([load(4, "0123", 2.0), load(4, "4567", 2.0)], "OMP_NUM_THREADS=2"),
    ],
)
def test_more_threads_than_cores_are_warned_of(ranks: list[Load], expected: str) -> None:
    said = crowding(ranks)
    assert (expected in said) if expected else not said


def test_a_containers_share_of_the_cpu_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CPU_QUOTA", tmp_path / "cpu.max")
    for text, expected in (("150000 100000\n", 1.5), ("max 100000\n", float("inf"))):
        (tmp_path / "cpu.max").write_text(text)
        assert devices._quota() == expected


def crowded(world: World, threads: int) -> str:
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return world.crowding()


def test_ranks_learn_that_they_crowd() -> None:
    said = run_ranks(crowded, 2, 2)
    assert said[0] == said[1] and said[0].startswith("2 rank(s) × 2 thread(s) on 1 core(s) of ")
    assert said[0].endswith("start at most 1 rank(s)")
    assert run_ranks(crowded, 1, 1) == [""]


# ── output ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ranks", [0, 2])
def test_libraries_print_nothing_when_ranks_meet(bench: Bench, ranks: int) -> None:
    done = bench.commands.succeed("plan", "mnist", function=PROGRAM, ranks=ranks)
    assert done.out.startswith("site ") and "loo" not in done.out
    assert not done.err


def test_on_a_gpu_nccl_waits_longer_than_the_program_and_cudnn_searches_for_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no GPU is, what would be started on one."""
    started: list[tuple[str, dict[str, object]]] = []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(world, "choose_device", lambda *_: gpu)
    monkeypatch.setattr(world, "own_device", lambda *_: (gpu, ""))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(world.dist, "init_process_group", lambda backend, **how: started.append((backend, how)))
    place = LaunchEnv(0, 1, 0, "", "single")
    world._enter(HashStore(), place, world.Meeting("one", ("127.0.0.1",)), "auto", 600)
    ((backend, how),) = started
    assert backend == "cpu:gloo,cuda:nccl" and how["device_id"] == gpu
    assert how["timeout"] > timedelta(seconds=600), "NCCL would end the process before its words"
    assert torch.backends.cudnn.benchmark
