"""Several budgets in one command: plain runs from one set of statistics, resumed, compared, refused early."""

import json
import signal
from pathlib import Path

import pytest

from dist_prune import load_compressed
from dist_prune.distributed.fingerprint import digest
from tests.commands import PROGRAM
from tests.runs import Bench, copied, result_of

FAMILY: dict[str, object] = {"method": "fisher", "ranks": "budget:macs=0.7,0.5", "correct": "none", "epochs": 0}
SHARES = (0.5, 0.7)


def member(folder: Path, share: float) -> Path:
    return folder / f"macs={share}"


@pytest.fixture(scope="module")
def family(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "run"
    done = bench.commands.succeed(*bench.words(folder, **FAMILY), ranks=2)
    assert done.out.count("── statistics") == 1, "one set of statistics"
    return folder


@pytest.mark.parametrize("share", SHARES)
def test_each_member_is_what_a_run_by_itself_gives(
    bench: Bench, family: Path, tmp_path: Path, share: float
) -> None:
    words = bench.words(tmp_path / "alone", **FAMILY | {"ranks": f"budget:macs={share}"})
    bench.commands.succeed(*words, ranks=2)
    alone, found = result_of(tmp_path / "alone"), result_of(member(family, share))
    assert found["parameter_hash"] == alone["parameter_hash"]
    assert (found["dense"], found["projected"]) == (alone["dense"], alone["projected"])
    assert found["macs"]["compressed"] <= share * found["macs"]["dense"]
    assert digest(load_compressed(member(family, share))) == found["parameter_hash"]


def test_the_dense_network_is_evaluated_once(bench: Bench, family: Path) -> None:
    """The least budget's run does it: the other's takes no time for it, of the same images."""
    first, second = (result_of(member(family, share))["seconds"]["baseline"] for share in SHARES)
    assert second < first / 3


@pytest.mark.parametrize("ending", ["result.json", "checkpoints/00000002.pt.sha256"])
@pytest.mark.parametrize("share", SHARES)
def test_a_family_that_was_killed_goes_on_where_it_was(
    bench: Bench, family: Path, tmp_path: Path, share: float, ending: str
) -> None:
    folder = tmp_path / "run"
    words = bench.words(folder, **FAMILY)
    done = bench.commands(*words, ranks=2, kill_when=f"{member(folder, share)}/{ending}")
    assert done.codes == [-signal.SIGKILL] * 2 or (share, ending) == (0.7, "result.json")
    again = bench.commands.succeed(*bench.words(folder, **FAMILY, resume=True), ranks=2)
    assert "── statistics" not in again.out
    for each in SHARES:
        assert (
            result_of(member(folder, each))["parameter_hash"]
            == (result_of(member(family, each))["parameter_hash"])
        )


def test_a_family_is_reported_and_compared_as_a_whole(bench: Bench, family: Path, tmp_path: Path) -> None:
    folder = copied(family, tmp_path / "family")
    (folder / "report.html").unlink()
    bench.commands.succeed("report", folder, ranks=0, function=PROGRAM)
    page = (folder / "report.html").read_text()
    assert page == (family / "report.html").read_text(), "it was there already"
    assert "top-1 over parameters" in page and "KL to dense over MACs" in page
    for share in SHARES:
        assert f"macs={share}" in page and f"macs={share}/report.html" in page
    compared = bench.commands.succeed("compare", folder, ranks=0, function=PROGRAM)
    assert all(f"budget:macs={share}" in compared.out for share in SHARES)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ranks": "budget:macs=0.8,0.80"}, "such as budget:macs=0.8,0.5, each once"),
        ({"ranks": "budget:macs=0.8,params=0.5"}, "expected shares of one kind"),
        ({"ranks": "budget:macs=0.8,1.5"}, "a ratio must be above 0 and at most 1, got 1.5"),
        ({"ranks": "budget:macs=0.8,"}, "'' is not a number"),
        ({"ranks": "budget:macs=0.8,0.001"}, "out of reach"),
        ({"ranks": "budget:flops=0.8,0.5"}, "a budget of 'flops' is not known"),
        ({"until": "statistics"}, "--until statistics: statistics are of no budget"),
    ],
)
def test_what_is_no_family_is_refused_before_the_work(
    bench: Bench, tmp_path: Path, flags: dict[str, object], said: str
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", **FAMILY | flags), ranks=2)
    assert done.codes == [2, 2]
    assert any(said in line for line in done.errors), done.err
    assert not (tmp_path / "run").exists()


def test_a_family_is_not_begun_over_another(bench: Bench, family: Path, tmp_path: Path) -> None:
    folder = copied(family, tmp_path / "run")
    done = bench.commands(*bench.words(folder, **FAMILY))
    assert done.codes == [1]
    assert "holds a run" in done.err
    done = bench.commands(*bench.words(folder, **FAMILY | {"ranks": "budget:macs=0.7,0.6"}, resume=True), ranks=2)
    assert "was started with other settings" in done.err
    assert json.loads((folder / "config.json").read_text())["run"]["compression"]["ranks"] == FAMILY["ranks"]


def test_a_dry_run_shows_each_plan(bench: Bench) -> None:
    done = bench.commands.succeed(*bench.words(Path("nowhere"), **FAMILY, dry_run=True))
    assert done.out.count("MACs ") >= len(SHARES)
