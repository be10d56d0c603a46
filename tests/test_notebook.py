"""The notebook of launch/ runs from top to bottom; it is kept without outputs."""

import json
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.runs import Bench

NOTEBOOK = ROOT / "launch" / "digits.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [c["cell_type"] for c in cells].count("code") > 5
    assert not [c for c in cells if c["cell_type"] == "code" and (c["outputs"] or c["execution_count"])]


def run_cells(folder: str) -> None:
    """All code in one go, in a process of its own; pictures go to files."""
    import matplotlib

    matplotlib.use("Agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    scope: dict[str, object] = {}
    exec("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), scope)
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        pyplot.figure(number).savefig(Path(folder) / f"{number}.png")


def test_its_code_runs_and_draws(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands.succeed(tmp_path, function="tests.test_notebook:run_cells", ranks=0)
    assert "MACs" in done.out and "held-out KL" in done.out
    (text,) = [line for line in done.out.splitlines() if line.startswith("accuracy")]
    before, after = (float(word) for word in text.split() if word.replace(".", "").isdigit())
    assert before > 93 and after > before - 3
    (text,) = [line for line in done.out.splitlines() if "of the MACs, trained:" in line]
    smallest, trained = (float(word) for word in text.partition(":")[2].split() if word[0].isdigit())
    assert before - 10 < smallest <= trained + 1 and trained > before - 3
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.slow
def test_it_runs_as_a_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 3
    assert not [o for o in outputs if o.output_type == "error"]
