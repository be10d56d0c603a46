"""Finished runs side by side; what is refused; and how far accuracies can be trusted."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from dist_prune.artifacts.answers import ANSWERS, Answers, load, save
from dist_prune.artifacts.reader import accuracy_interval, difference_interval, paired_interval, read_run
from dist_prune.reporting.compare import main
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.files import CheckpointError
from tests.runs import Bench


@pytest.mark.parametrize(("right", "images"), [(0, 10), (3, 10), (81, 263), (10, 10)])
def test_an_interval_holds_what_a_score_test_does_not_reject(right: int, images: int) -> None:
    """Its ends are the accuracies p at which |p̂ − p| is 1.96 standard deviations of p's own binomial."""
    for end in accuracy_interval(100 * right / images, images):
        p, deviation = end / 100, math.sqrt(end / 100 * (1 - end / 100) / images)
        assert p == pytest.approx(round(p)) or abs(right / images - p) == pytest.approx(1.959964 * deviation)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10: 56/70 − 48/80 is 0.0524 to 0.3339
    before, after = Metrics(60.0, 100, 0, 80), Metrics(80.0, 100, 0, 70)
    assert difference_interval(before, after) == pytest.approx((5.24, 33.39), abs=0.01)


def right(folder: Path, stage: str) -> list[bool]:
    """Which images that network gets right."""
    return [bool(answer) for answer in load(folder / ANSWERS).right[stage]]


@pytest.fixture(scope="module")
def other(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of other ranks than those of `runs`."""
    folder = tmp_path_factory.mktemp("other") / "run"
    bench.commands.succeed(*bench.words(folder, ranks="sites:3=5,5=8", epochs=None), "--epochs", 0, ranks=1)
    return folder


def test_what_differs_is_shown_and_nothing_else(
    runs: dict[int, Path], other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs[1]), str(other)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (runs[1], other))
    assert ["compression.ranks", "uniform:0.5", "sites:3=5,5=8"] in rows
    assert ["tuning.epochs", "2", "0"] in rows
    assert not [row for row in rows if row and row[0].startswith(("images.", "network."))]
    assert ["0", "4", "dense"] in rows and ["3", "8", "5"] in rows
    assert not [row for row in rows if row and row[0] == "5"]  # rank 8 in both
    for stage in ("dense", "projected"):
        assert [f"{stage}:", "top-1", "%", *(f"{r[stage]['top1']:.2f}" for r in (a, b))] in rows
    assert ["tuned:", "top-1", "%", f"{a['tuned']['top1']:.2f}", "–"] in rows
    gap = b["projected"]["top1"] - a["projected"]["top1"]
    assert ["to", "A,", "points", f"{gap:+.2f}"] in rows
    before, after = (torch.tensor(right(folder, "projected")) for folder in (runs[1], other))
    assert [100 * answers.double().mean().item() for answers in (before, after)] == pytest.approx(
        [r["projected"]["top1"] for r in (a, b)]
    )
    low, high = paired_interval(int((after & ~before).sum()), int((before & ~after).sum()), len(before))
    assert ["95", "%,", "paired", f"{low:+.2f}", "…", f"{high:+.2f}"] in rows
    shares = [r["macs"]["compressed"] / r["macs"]["dense"] for r in (a, b)]
    assert ["of", "the", "dense", "network's", *(f"{share:.3f}" for share in shares)] in rows
    assert ["all", *(f"{sum(r['seconds'].values()):.1f}" for r in (a, b))] in rows


def test_runs_on_other_images_are_not_paired(
    runs: dict[int, Path], other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(other, tmp_path / "copy")
    before = load(copy / ANSWERS)
    save(copy / ANSWERS, Answers("of another list", before.right))
    main([str(runs[1]), str(other), str(copy)])
    assert "paired" not in capsys.readouterr().out
    (copy / ANSWERS).unlink()  # as in a run of an earlier version
    main([str(runs[1]), str(copy)])
    assert "paired" not in capsys.readouterr().out


def test_narrow_terminals_get_the_ends_of_long_settings(
    runs: dict[int, Path], other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    config = json.loads((other / "config.json").read_text())
    config["run"]["network"]["weights"] = f"/a/{'very/' * 20}long/path.pt"
    copy = shutil.copytree(other, other.with_name("copy"))
    (copy / "config.json").write_text(json.dumps(config))
    main([str(other), str(copy)])
    rows = capsys.readouterr().out.splitlines()
    (row,) = [row for row in rows if row.startswith("network.weights")]
    assert row.endswith("long/path.pt") and len(row) <= 60


@pytest.mark.parametrize(
    ("file", "content", "answer"),
    [
        ("config.json", None, "not the directory of a run"),
        ("result.json", None, "not finished .* --resume"),
        ("result.json", "{", "result.json: damaged"),
        ("result.json", "[]", "result.json: damaged, holds a list"),
        ("plan.json", None, "plan.json: damaged or absent"),
        ("plan.json", "{}", "damaged, or of another version .*choices"),
        ("config.json", "{}", "damaged, or of another version .*run"),
    ],
)
def test_what_is_no_finished_run_is_refused_and_named(
    other: Path, tmp_path: Path, file: str, content: str | None, answer: str
) -> None:
    copy = shutil.copytree(other, tmp_path / "copy")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=answer) as refused:
        main([str(other), str(copy)])
    assert str(copy) in str(refused.value)


def test_one_run_or_none_there_is_refused(other: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two finished runs or more"):
        main([str(other)])
    with pytest.raises(CheckpointError, match="no such folder"):
        read_run(tmp_path / "absent")
