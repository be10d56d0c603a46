"""The README's picture and table show the committed figures."""

import json
import re
from pathlib import Path

import pytest

from tests.bench import over_time, picture
from tests.bench.quality import RESULT, TUNING, column

ROWS = json.loads(RESULT.read_text())["rows"]
README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("theme", picture.THEMES)
@pytest.mark.parametrize(("name", "file"), [("accuracy", RESULT), ("time", over_time.RESULT)])
def test_the_committed_pictures_are_drawn_from_the_committed_figures(theme: str, name: str, file: Path) -> None:
    shown = (picture.PICTURES / f"{name}-{theme}.svg").read_text()
    assert picture.source_of(file) in shown, "uv run python -m tests.bench.picture"


def test_drawing_again_writes_all_pictures(tmp_path: Path) -> None:
    picture.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}-{theme}.svg" for name in ("accuracy", "time") for theme in ("light", "dark")
    }


def test_a_curve_has_the_dense_network_and_the_best_row_of_each_budget() -> None:
    def row(way: str, macs: float, drop: float) -> dict:
        return {"way": way, "macs": macs, "drop": drop, "drop_std": 0.5, "tuned": {"long": [drop / 2, 0.1]}}

    curve = picture.Curve("pruning", "pruned", "red", "o")
    rows = [
        row("pruned, a", 0.58, 9),
        row("pruned, b", 0.59, 4),
        row("pruned, a", 0.34, 20),
        row("other", 0.58, 1),
    ]
    assert picture.points(rows, curve) == [(1, 0, 0), (0.59, 4, 0.5), (0.34, 20, 0.5)]
    assert picture.points(rows, curve, "long")[1] == (0.59, 2, 0.1)
    timed = [{**one, "times": {"fast": (one["macs"] + 0.1, 0.5, 0.9)}} for one in rows]
    assert [cost for cost, *_ in picture.points(timed, curve, engine="fast")] == pytest.approx([1, 0.69, 0.44])


def test_each_curve_finds_its_rows_and_those_of_them_that_were_tuned() -> None:
    budgets = (2, 3, 4)  # the dense network, 0.35, and perhaps 0.58 and 0.2
    for curve in picture.CURVES:
        assert len(picture.points(ROWS, curve)) in budgets, curve.label
        own = [row for row in ROWS if row["way"].startswith(curve.begins) and row["way"].endswith(curve.ends)]
        tuned = [row for row in own if row["tuned"]]
        for tuning in (column(2, how) for how in TUNING):
            assert len(picture.points(tuned, curve, tuning)) in (budgets if tuned else (1,)), curve.label
            assert picture.points(ROWS, curve, tuning) == picture.points(tuned, curve, tuning)


def test_the_readmes_table_is_of_the_committed_figures() -> None:
    known = {f"{row['drop']:.2f} ± {row['drop_std']:.2f}" for row in ROWS}
    known |= {f"{drop:.2f} ± {std:.2f}" for row in ROWS for drop, std, *_ in row["tuned"].values()}
    shown = re.findall(r"\d+\.\d+ ± \d+\.\d+", README)
    assert len(shown) > 15 and set(shown) <= known
