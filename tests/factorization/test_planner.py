"""Rules that need measurements, as the user starts them: whole runs, dry runs, and what is refused before work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_prune import load_compressed
from tests.commands import shared_commands
from tests.runs import CLASSES, NETWORK, TRAIN, Bench, result_of, write_images, write_weights


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("planning")
    (home / "net.py").write_text(NETWORK)
    data = write_images(home / "images")
    return Bench(shared_commands(), data, home / "net.py", write_weights(home / "weights.pt", data))


def plan_of(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "plan.json").read_text())["choices"]


def test_a_budget_is_kept_and_each_site_is_measured_alone(bench: Bench, tmp_path: Path) -> None:
    flags = {"ranks": "budget:macs=0.6", "method": "fisher", "measure_sites": True, "epochs": 0}
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **flags), ranks=2)
    result, choices = result_of(tmp_path / "run"), plan_of(tmp_path / "run")
    assert result["ranks"] == "budget:macs=0.6"
    assert 0.5 < result["macs"]["compressed"] / result["macs"]["dense"] <= 0.6
    assert all(choice["loss"] is not None for choice in choices)
    assert "predicted KL, summed over sites: " in done.out
    found = json.loads((tmp_path / "run" / "sites.json").read_text())
    ranks = {choice["site"]: choice["rank"] for choice in choices if choice["rank"]}
    assert {s["site"]: s["rank"] for s in found["sites"]} == ranks
    assert found["images"] == TRAIN * len(CLASSES)
    assert all(s["measured"] > 0 for s in found["sites"])
    assert done.out.count("site alone") == 1
    assert sum(p.numel() for p in load_compressed(tmp_path / "run").parameters()) == result["params"]["compressed"]


def test_any_number_of_ranks_finds_the_same_plan(bench: Bench, tmp_path: Path) -> None:
    plans = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        words = bench.words(folder, ranks="budget:params=0.5", epochs=0, method="fisher")
        bench.commands.succeed(*words, ranks=ranks)
        plans.append([(c["site"], c["rank"]) for c in plan_of(folder)])
    assert plans[0] == plans[1]
    assert any(rank for _, rank in plans[0])


def test_energy_keeps_more_where_more_is_asked(bench: Bench, tmp_path: Path) -> None:
    costs = []
    for share in (0.7, 0.95):
        folder = tmp_path / str(share)
        bench.commands.succeed(*bench.words(folder, ranks=f"energy:{share}", epochs=0))
        costs.append(result_of(folder)["macs"]["compressed"])
        assert all(c["loss"] <= 1 - share + 1e-9 for c in plan_of(folder))
    assert costs[0] < costs[1]


def test_a_budget_of_time_is_measured_once_and_told(bench: Bench, tmp_path: Path) -> None:
    words = {"ranks": "budget:latency=1.0", "epochs": 0, "sites": "3,5", "forms": "output"}
    first = bench.commands.succeed(*bench.words(tmp_path / "1", **words), ranks=2)
    cache = bench.commands.home / "cache" / "latency"
    kept = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert len(kept) == 3, "the network and two layers"
    second = bench.commands.succeed(*bench.words(tmp_path / "2", **words), ranks=2)
    assert {p: p.stat().st_mtime_ns for p in cache.iterdir()} == kept
    line = r"predicted latency of a batch of 256, float32: (\S+) ms"
    text = [re.search(line, done.out) for done in (first, second)]
    assert text[0] and text[1] and text[0][0] == text[1][0]


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ("budget:macs=0.5", r"every site is shown dense; the least that can be reached is 0\.\d+ of the dense"),
        ("budget:latency=0.5", "every site is shown dense; what can be reached follows from times that a run"),
        ("energy:0.9", "--ranks energy:0.9: ranks follow from statistics of the data; every site is shown dense"),
    ],
)
def test_a_dry_run_says_what_it_cannot_know(bench: Bench, tmp_path: Path, ranks: str, says: str) -> None:
    words = bench.words(tmp_path / "run", ranks=ranks, dry_run=True, data=None, weights="none")
    done = bench.commands.succeed(*words)
    assert re.search(says, done.out), done.out
    assert done.out.count("its rank follows from the statistics") == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [None, True])
def test_a_budget_out_of_reach_is_refused_before_any_work(bench: Bench, tmp_path: Path, dry_run) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", ranks="budget:macs=0.01", dry_run=dry_run), ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1, done.err
    assert "--ranks budget:macs=0.01: out of reach, the least is 0." in done.errors[0]
    assert "sites at their smallest rank take" in done.errors[0]
    assert not (tmp_path / "run").exists()
