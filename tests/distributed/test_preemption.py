"""Asked to leave: a signal to any rank, in any phase, has all ranks save and leave with a code of its own."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dist_prune.distributed.preemption import PREEMPTED, STUCK, listening, restarts
from tests.pictures import picture, save
from tests.run.test_kills import EVERYTHING, check, places, undisturbed  # noqa: F401  the fixture
from tests.runs import Bench, result_of


def test_signals_set_a_flag_and_the_first_is_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening() as flag:
        assert not flag.signal
        for each in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), each)
        assert flag.signal == "SIGUSR2"
    assert signal.getsignal(signal.SIGTERM) == before


def test_restarts_are_counted_by_torchrun_and_by_slurm() -> None:
    assert restarts({}) == restarts({"SLURM_RESTART_COUNT": ""}) == 0
    assert restarts({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "2"}) == 2
    assert restarts({"TORCHELASTIC_RESTART_COUNT": "1"}) == 1


@pytest.mark.parametrize(
    ("name", "rank", "share"),
    [
        ("SIGTERM", "", 0.25),
        ("SIGUSR1", "1", 0.8),
        pytest.param("SIGUSR2", "0", 0.05, marks=pytest.mark.slow),
        pytest.param("SIGUSR2", "1", 0.5, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "", 0.65, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves_and_the_run_goes_on_to_the_same_bits(
    bench: Bench,
    undisturbed: tuple[dict[str, Any], int],  # noqa: F811
    tmp_path: Path,
    name: str,
    rank: str,
    share: float,
) -> None:
    """After a share of all checkpoints, from the statistics to the last epoch."""
    folder, (expected, checkpoints) = tmp_path / "run", undisturbed
    done = bench.commands(
        *bench.words(folder, **EVERYTHING, resume=True),
        ranks=2,
        kill_when=f"{folder}/checkpoints/{1 + int(share * checkpoints):08d}*",
        kill_rank=rank,
        kill_with=name,
    )
    assert done.codes == [PREEMPTED, PREEMPTED], done.err
    assert f"stopped: asked to stop by {name}; saved" in done.err
    assert "Traceback" not in done.err and "error:" not in done.err
    assert not (folder / "owner.json").exists()
    words = bench.words(folder, **EVERYTHING)  # not a word of resuming: SLURM started it again
    again = bench.commands.succeed(*words, ranks=2, SLURM_RESTART_COUNT="1")
    assert places(folder), again.out
    check(folder, expected)


def test_restarts_that_get_no_further_end_with_a_code_of_their_own(bench: Bench, tmp_path: Path) -> None:
    """Every start fails at the same image, which is sound in the end."""
    folder, data = tmp_path / "run", Path(shutil.copytree(bench.data, tmp_path / "images"))
    image = data / "val" / "d" / "1.png"
    save(image, picture(16, 16))
    sound = image.read_bytes()
    middle = len(sound) // 2  # both ends are as they should be
    image.write_bytes(sound[: middle - 40] + bytes(80) + sound[middle + 40 :])
    words = bench.words(folder, epochs=0, sites="5", data=data)
    for count in range(5):
        done = bench.commands(*words, ranks=2, SLURM_RESTART_COUNT=str(count))
        assert all(done.codes) and (STUCK in done.codes) == (count == 4), count
    assert done.codes == [STUCK, STUCK]
    assert len(done.errors) == 1
    assert "3 restarts in a row began at the same place (the beginning) and got no further" in done.errors[0]
    image.write_bytes(sound)
    bench.commands.succeed(*words, "--resume", ranks=2)
    assert result_of(folder)["projected"]
