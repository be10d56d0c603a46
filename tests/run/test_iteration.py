"""Iterative compression as whole runs: rounds with training in between, and alternation."""

import json
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

from dist_prune import load_compressed
from dist_prune.distributed.fingerprint import digest
from dist_prune.network.factored import Factored
from tests.runs import SITES, Bench, copied, curves, points, result_of

SHRINKING = {"ranks": "uniform:0.4", "step": 0.7, "epochs": 0}
ALTERNATING = {"ranks": "budget:macs=0.5", "method": "fisher", "width": "off", "alternate": 2, "epochs": 1}


@pytest.fixture(scope="module")
def shrunk(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrunk") / "run"
    done = bench.commands.succeed(*bench.words(folder, **SHRINKING), ranks=2)
    assert "rounds to get there, --step 0.7" in done.out
    return folder


@pytest.fixture(scope="module")
def alternated(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alternated") / "run"
    bench.commands.succeed(*bench.words(folder, **ALTERNATING), ranks=2)
    return folder


def of(run_dir: Path, group: str) -> list[dict[str, float]]:
    return [line for line in points(run_dir) if line["group"] == group]


def ranks_of(run_dir: Path) -> dict[str, int]:
    return {c["site"]: c["rank"] for c in json.loads((run_dir / "plan.json").read_text())["choices"]}


def test_the_cost_falls_in_every_round_and_ends_where_it_was_to(
    bench: Bench, shrunk: Path, tmp_path: Path
) -> None:
    bench.commands.succeed(*bench.words(tmp_path / "at once", ranks="uniform:0.4", epochs=0), ranks=2)
    at_once, result = result_of(tmp_path / "at once"), result_of(shrunk)
    costs = [
        result["macs"]["dense"],
        *(line["macs"] for line in of(shrunk, "rounds")),
        result["macs"]["compressed"],
    ]
    assert len(costs) >= 4
    assert all(after < before for before, after in pairwise(costs))
    assert (result["macs"], result["params"]) == (at_once["macs"], at_once["params"])
    plans = [
        json.loads((folder / "plan.json").read_text())["choices"] for folder in (shrunk, tmp_path / "at once")
    ]
    assert [(c["site"], c["rank"]) for c in plans[0]] == [(c["site"], c["rank"]) for c in plans[1]]


@pytest.mark.parametrize("step", [0.7, 0.9])
def test_a_dry_run_foretells_the_rounds(bench: Bench, shrunk: Path, tmp_path: Path, step: float) -> None:
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **(SHRINKING | {"step": step}), dry_run=True))
    line = r"round \d+: \d+ sites factored, .*"
    foretold, text = re.findall(line, done.out), re.findall(line, (shrunk / "log.txt").read_text())
    assert foretold == text if step == SHRINKING["step"] else len(foretold) > len(text)
    assert f"{len(foretold)} rounds to get there, --step {step}" in done.out


def test_a_dry_run_says_that_rounds_follow_from_ranks_that_are_not_known_yet(bench: Bench, tmp_path: Path) -> None:
    flags = {"ranks": "budget:macs=0.5", "step": 0.7, "alternate": 2, "dry_run": True}
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **flags))
    assert "--step 0.7: how many rounds follows from the ranks" in done.out
    assert "--alternate 2: then trained as dense layers and projected again" in done.out


def test_a_site_is_two_layers_however_often_it_was_projected(shrunk: Path) -> None:
    model = load_compressed(shrunk)
    assert digest(model) == result_of(shrunk)["parameter_hash"]
    pairs = {name: m for name, m in model.named_modules() if isinstance(m, Factored)}
    assert set(pairs) == set(SITES)
    for pair in pairs.values():
        assert [type(m) for m in pair.children()] in ([nn.Conv2d] * 2, [nn.Linear] * 2)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 2 * len(SITES)


def test_the_last_round_is_tuned_like_the_others(shrunk: Path) -> None:
    """Without --epochs: for --tune-epochs."""
    result, rounds = result_of(shrunk), of(shrunk, "rounds")
    assert result["tuned"] is not None
    assert set(result["seconds"]) >= {f"round {line['step']}: training" for line in rounds}
    steps = [line["step"] for line in of(shrunk, "rounds/train")]
    assert steps == sorted(set(steps)) and steps[-1] == 5 * len(rounds)


def test_tensorboard_shows_the_rank_of_each_site_over_the_rounds(shrunk: Path) -> None:
    found = curves(shrunk)
    for site, rank in ranks_of(shrunk).items():
        events = found.Scalars(f"rank/{site}")
        assert [e.step for e in events] == list(range(1, len(of(shrunk, "rounds")) + 2))
        assert all(after.value <= before.value for before, after in pairwise(events))
        assert events[-1].value == rank
    assert {"rounds/top1", "rounds/kl", "rounds/macs"} <= set(found.Tags()["scalars"])


def test_alternation_stays_within_the_budget(bench: Bench, alternated: Path) -> None:
    result = result_of(alternated)
    assert result["macs"]["compressed"] <= 0.5 * result["macs"]["dense"]
    assert [line["step"] for line in of(alternated, "rank")] == [1, 2, 3]
    assert digest(load_compressed(alternated)) == result["parameter_hash"]
    assert "train" in {line["group"] for line in points(alternated)}


@pytest.mark.parametrize(
    ("flags", "run", "checkpoint", "place"),
    [
        (SHRINKING, "shrunk", 4, "round 1: training, epoch 1"),
        pytest.param(SHRINKING, "shrunk", 6, "round 2: projection", marks=pytest.mark.slow),
        (ALTERNATING, "alternated", 4, "alternation 1: training, epoch 1"),
        pytest.param(ALTERNATING, "alternated", 5, "alternation 1: training", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_between_rounds_ends_as_if_it_had_not_been(
    bench: Bench,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    flags: dict[str, object],
    run: str,
    checkpoint: int,
    place: str,
) -> None:
    whole = result_of(request.getfixturevalue(run))
    folder = tmp_path / "run"
    words = bench.words(folder, **flags, keep_checkpoints=99)
    done = bench.commands(*words, ranks=2, kill_when=f"{folder}/checkpoints/{checkpoint:08d}.pt.sha256")
    assert done.codes == [-signal.SIGKILL] * 2
    for later in (folder / "checkpoints").glob("*"):  # what it still did before it died
        if int(later.name[:8]) > checkpoint:
            later.unlink()
    folder = copied(folder, tmp_path / "copy")
    words = bench.words(folder, **flags, keep_checkpoints=99, resume=True)
    done = bench.commands.succeed(*words, ranks=2)
    assert f"resuming after {place}" in done.out
    assert result_of(folder)["parameter_hash"] == whole["parameter_hash"]


def test_all_directions_kept_is_the_network_itself(bench: Bench, tmp_path: Path) -> None:
    flags = {"ranks": "uniform:1", "step": 0.5, "alternate": 1, "tune_epochs": 0, "epochs": 0}
    bench.commands.succeed(*bench.words(tmp_path / "run", **flags))
    assert result_of(tmp_path / "run")["projected"]["kl"] < 1e-6


def test_what_projects_nothing_cannot_be_iterated(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", method="random-init", step=0.9))
    assert done.codes == [2]
    assert done.errors == ["error: --method random-init projects nothing: leave out --step and --alternate"]
