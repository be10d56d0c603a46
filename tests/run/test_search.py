"""Runs that try candidate plans: the same on any number of ranks, resumed anywhere, refused where none are."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.runs import Bench, copied, curves, points, result_of

COUNT = 10  # candidates: a whole generation and a part
SEARCH: dict[str, object] = {
    "method": "fisher",
    "ranks": "budget:params=0.3",
    "width": "off",
    "correct": "regression",
    "calibrate_images": 32,
    "search": COUNT,
    "epochs": 0,
}


@pytest.fixture(scope="module")
def searches(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    home = tmp_path_factory.mktemp("searches")
    for ranks in (1, 2, 3):
        bench.commands.succeed(*bench.words(home / str(ranks), **SEARCH), ranks=ranks)
    return {ranks: home / str(ranks) for ranks in (1, 2, 3)}


def plan_of(run_dir: Path) -> list[tuple[str, str, list[int]]]:
    choices = json.loads((run_dir / "plan.json").read_text())["choices"]
    return [(c["site"], c["form"], c["ranks"]) for c in choices]


def tried(run_dir: Path) -> list[float]:
    lines = [line for line in points(run_dir) if line["group"] == "search"]
    assert [line["step"] for line in lines] == list(range(COUNT))
    return [line["candidate"] for line in lines]


def test_any_number_of_ranks_chooses_the_same_plan(searches: dict[int, Path]) -> None:
    one = tried(searches[1])
    for ranks in (2, 3):
        assert plan_of(searches[ranks]) == plan_of(searches[1])
        assert tried(searches[ranks]) == pytest.approx(one, rel=1e-3)
    assert min(one) < one[0]


def test_the_plan_keeps_to_the_budget_and_is_another_than_predictions_give(
    bench: Bench, searches: dict[int, Path], tmp_path: Path
) -> None:
    result = result_of(searches[1])
    assert 0.25 < result["params"]["compressed"] / result["params"]["dense"] <= 0.3
    for count in (0, 1):
        folder = tmp_path / str(count)
        bench.commands.succeed(*bench.words(folder, **SEARCH | {"search": count}))
        assert plan_of(folder) != plan_of(searches[1])
    without, one = (result_of(tmp_path / str(count)) for count in (0, 1))
    assert plan_of(tmp_path / "0") == plan_of(tmp_path / "1")
    assert without["parameter_hash"] == one["parameter_hash"], "one candidate is no search"


def test_the_curve_is_in_tensorboard_the_log_and_the_report(searches: dict[int, Path]) -> None:
    losses, log = tried(searches[2]), (searches[2] / "log.txt").read_text()
    shown = curves(searches[2])
    assert [e.value for e in shown.Scalars("search/candidate")] == pytest.approx(losses, rel=1e-6)
    least = [min(losses[: n + 1]) for n in range(COUNT)]
    assert [e.value for e in shown.Scalars("search/best")] == pytest.approx(least, rel=1e-6)
    said = re.search(r"on 20 images .*: KL ([\d.]+) of the plan without search, ([\d.]+) the least", log)
    assert said is not None
    assert (float(said[1]), float(said[2])) == pytest.approx((losses[0], min(losses)), abs=1e-4)
    taken = re.search(r"candidate (\d+) is taken, ([\d.]+)", log)
    assert taken is not None and losses[int(taken[1])] == pytest.approx(float(taken[2]), abs=1e-4)
    assert "Search: KL of candidate plans" in (searches[2] / "report.html").read_text()
    assert "10 candidate plans" in (searches[2] / "report.md").read_text()
    assert result_of(searches[2])["seconds"]["search"] > 0


def test_a_search_that_was_killed_in_its_middle_ends_the_same(
    bench: Bench, searches: dict[int, Path], tmp_path: Path
) -> None:
    """After the first generation, and before the second is complete; on as many ranks, and on more."""
    folder, last = tmp_path / "run", 4
    words = bench.words(folder, **SEARCH, keep_checkpoints=99)
    done = bench.commands(*words, ranks=2, kill_when=f"{folder}/checkpoints/{last:08d}*.pt.sha256")
    assert done.codes == [-signal.SIGKILL] * 2
    for later in (folder / "checkpoints").glob("*"):  # what it still did before it died
        if int(later.name[:8]) > last:
            later.unlink()
    elsewhere = copied(folder, tmp_path / "resharded")
    done = bench.commands.succeed(*bench.words(folder, **SEARCH, resume=True), ranks=2)
    assert "resuming after search, plan 2" in done.out
    assert tried(folder) == tried(searches[2])
    assert result_of(folder)["parameter_hash"] == result_of(searches[2])["parameter_hash"]
    bench.commands.succeed(*bench.words(elsewhere, **SEARCH, resume=True, reshard=True), ranks=3)
    assert plan_of(elsewhere) == plan_of(searches[3])


@pytest.mark.parametrize(
    "flags",
    [
        {"width": "on", "ranks": "budget:macs=0.3"},
        {"ranks": "budget:params=0.6", "correct": "none"},
        {"ranks": "budget:latency=1", "method": "pca"},
    ],
    ids=["after widths", "parameters, not corrected", "times of layers"],
)
def test_searches_for_every_budget(bench: Bench, tmp_path: Path, flags: dict[str, object]) -> None:
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **SEARCH | flags), ranks=2)
    result = result_of(tmp_path / "run")
    tried(tmp_path / "run")
    assert "of the plan without search" in done.out
    rule = str(flags["ranks"])
    if "latency" not in rule:
        kind = "macs" if "macs" in rule else "params"
        assert result[kind]["compressed"] <= float(rule.partition("=")[2]) * result[kind]["dense"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ranks": "uniform:0.5"}, "--search 10 with --ranks uniform:0.5 and --forms auto: candidates are plans"),
        ({"search": -1}, "--search -1: expected 0 or more"),
        ({"forms": "dense", "width": "on"}, "--search 10 with --ranks budget:params=0.3 and --forms dense"),
        ({"step": 0.7}, "--search tries plans that are corrected, not trained in rounds: leave out --step"),
        ({"alternate": 1}, "--search tries plans that are corrected, not trained in rounds"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_work(
    bench: Bench, tmp_path: Path, flags: dict[str, object], said: str
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", **SEARCH | flags), ranks=2)
    assert done.codes == [2, 2]
    assert any(said in line for line in done.errors), done.err
    assert not (tmp_path / "run").exists()
