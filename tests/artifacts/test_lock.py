"""One process in a folder at a time, also where the kernel's locks do not exist, do not reach, or clocks jump."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dist_prune.artifacts import lock as lock_module
from dist_prune.artifacts.lock import OWNER, Lock
from dist_prune.utils.files import CheckpointError
from tests.runs import Bench, curves, points, result_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.1)
    monkeypatch.setattr(lock_module, "SILENT_S", 4.0)


@contextmanager
def held_on_another_host(folder: Path, refusal: int = 0) -> Iterator[BaseProcess]:
    """By a process that says it is on another host, and gets `refusal` when it asks the kernel."""
    held = multiprocessing.get_context("fork").Process(target=hold, args=(folder, refusal))
    held.start()
    try:
        deadline = time.monotonic() + 30
        while not (folder / OWNER).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield held
    finally:
        held.kill()
        held.join()


def hold(folder: Path, refusal: int) -> None:
    fcntl.lockf = lambda *_: refuse(refusal)
    socket.gethostname = lambda: "another"
    held = Lock(folder)
    while not (folder / "let go").exists():
        time.sleep(0.01)
    held.release()


def refuse(error: int) -> None:
    if error:
        raise OSError(error, "no locks here")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks do not reach other hosts: each host gets one."""
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)


@pytest.mark.parametrize("refusal", [0, errno.ENOLCK, errno.EOPNOTSUPP])
def test_an_owner_that_counts_is_respected_where_locks_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    with held_on_another_host(tmp_path, refusal) as holder:
        monkeypatch.setattr(fcntl, "lockf", lambda *_: refuse(refusal))
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on another: wait for its end"):
            Lock(tmp_path)
        assert time.monotonic() - began < lock_module.SILENT_S, "it need not wait for what it sees counting"
        holder.kill()
        holder.join()
        Lock(tmp_path).release()
    assert not (tmp_path / OWNER).exists()


def test_a_newcomer_may_wait_for_the_owner_s_end(tmp_path: Path, no_kernel: None) -> None:
    with held_on_another_host(tmp_path):
        with pytest.raises(CheckpointError):
            Lock(tmp_path, patience_s=0.5)
        (tmp_path / "let go").touch()
        Lock(tmp_path, patience_s=30).release()


def test_what_an_owner_left_that_died_long_ago_is_waited_for_once_and_taken(
    tmp_path: Path, no_kernel: None
) -> None:
    (tmp_path / OWNER).write_text(json.dumps({"host": "another", "pid": 1, "beat": 9}))
    began = time.monotonic()
    held = Lock(tmp_path)
    assert time.monotonic() - began >= lock_module.SILENT_S
    owner = json.loads((tmp_path / OWNER).read_text())
    assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    held.release()


@pytest.mark.parametrize("year", [0, 1e10], ids=["1970", "2286"])
def test_whether_an_owner_counts_does_not_depend_on_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_kernel: None, year: float
) -> None:
    """Nor on times of files, which the server of a shared file system sets by its own clock."""
    monkeypatch.setattr(time, "time", lambda: year)
    with held_on_another_host(tmp_path) as holder:
        with pytest.raises(CheckpointError, match="in use by"):
            Lock(tmp_path)
        holder.kill()
        holder.join()
        Lock(tmp_path).release()


def test_a_newcomer_never_finds_a_beat_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_kernel: None
) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.0)
    with held_on_another_host(tmp_path) as holder:
        found = {read_of(tmp_path / OWNER, "pid") for _ in range(5000)}
    assert found == {holder.pid}


def read_of(path: Path, key: str) -> object:
    return json.loads(path.read_text() or "{}").get(key)


@pytest.mark.parametrize("left", ["", "{", "[]", '{"host": "another"}'])
def test_a_file_of_the_owner_s_that_is_cut_off_keeps_nobody_out(
    tmp_path: Path, no_kernel: None, left: str
) -> None:
    (tmp_path / OWNER).write_text(left)
    held = Lock(tmp_path)
    assert read_of(tmp_path / OWNER, "pid") == os.getpid()
    held.release()


# ── a whole run under a clock that jumps ───────────────────────────────────────────────────────────────────


def jumping(*words: str) -> int:
    """The program, whose clock goes back by ten years at every second look, and on at every third."""
    from dist_prune.cli import main as cli

    looks, real = iter(range(10**9)), time.time
    jumps = (0, -3e8, 3e8)
    time.time = lambda: real() + jumps[next(looks) % 3]
    return cli.main(words)


def test_a_run_whose_clock_jumps_is_left_taken_up_and_drawn_as_any_other(bench: Bench, tmp_path: Path) -> None:
    flags = {"epochs": 4, "sites": "5", "save_minutes": 0}
    bench.commands.succeed(*bench.words(tmp_path / "steady", **flags), ranks=2)
    folder, clock = tmp_path / "run", {"function": "tests.artifacts.test_lock:jumping", "ranks": 2}
    killed = bench.commands(
        *bench.words(folder, **flags), kill_when=f"{folder}/checkpoints/00000009*.sha256", **clock
    )
    assert set(killed.codes) == {-9}
    done = bench.commands.succeed(*bench.words(folder, **flags, resume=True), **clock)
    assert "resuming after finetune, epoch" in done.out
    assert result_of(folder)["parameter_hash"] == result_of(tmp_path / "steady")["parameter_hash"]
    text = [line["step"] for line in points(folder) if line["group"] == "train"]
    assert text == sorted(set(text)) == [event.step for event in curves(folder).Scalars("train/loss")]
    assert all(0 <= seconds < 1000 for seconds in result_of(folder)["seconds"].values())
