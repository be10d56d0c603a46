"""What a run says: tables, numbers, curves, and the silence of the other ranks."""

import json
import logging
import math
import re
import resource
from contextlib import closing, nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dist_prune.artifacts import environment as environment_module
from dist_prune.artifacts.environment import environment
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.layers import layers_of
from dist_prune.factorization.layers import load as load_layers
from dist_prune.factorization.layers import save as save_layers
from dist_prune.factorization.plan import Choice, Plan, choose
from dist_prune.factorization.plan_table import plan_table
from dist_prune.network.sites import Survey, survey
from dist_prune.reporting.plots import prediction_figure, spectrum_figure
from dist_prune.reporting.report import Report
from dist_prune.reporting.tensorboard import Curves
from dist_prune.utils.tables import si, table
from tests.commands import shared_commands

NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=2), nn.Flatten(), nn.Linear(256, 4))


def surveyed() -> Survey:
    return survey(NETWORK, torch.zeros(1, 3, 8, 8))


def basis(groups: int, width: int) -> Basis:
    eye = torch.eye(width, dtype=torch.float64).expand(groups, width, width)
    spectrum = 2.0 ** -torch.arange(width, dtype=torch.float64).expand(groups, width)
    return Basis(eye, eye, torch.zeros(groups, width, dtype=torch.float64), spectrum)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_aligned_first_left_others_right() -> None:
    assert table(["site", "rank"], [["conv1", "8"], ["fc", "128"]]) == (
        "site   rank\n"
        "─────  ────\n"
        "conv1     8\n"
        "fc      128"
    )  # fmt: skip


def test_no_line_ends_in_blanks_and_a_table_may_be_empty() -> None:
    text = table(["a", "b"], [["x", ""]])
    assert all(line == line.rstrip() for line in text.splitlines())
    assert table(["a", "long"], []) == "a  long\n─  ────"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (1234, "1.23k"),
        (56_700, "56.7k"),
        (999_400, "999k"),
        (1_814_073_344, "1.81G"),
        (2.5e12, "2.5T"),
        (3e15, "3P"),
    ],
)
def test_large_numbers_keep_three_digits(number: float, text: str) -> None:
    assert si(number) == text


@pytest.mark.parametrize("number", [999.6, 999_600, 999_999, 999_999_999])
def test_a_number_that_rounds_to_a_thousand_takes_the_next_unit(number: float) -> None:
    assert re.fullmatch(r"1(\.0+)?[kMG]", si(number))


def test_the_plan_shows_cost_before_and_after_and_why_a_layer_stays() -> None:
    found = surveyed()
    plan = Plan((Choice("0", 2), Choice("1", None, "costs no less"), Choice("3", 4), Choice("9", None, "skipped")))
    rows = plan_table(layers_of(found, {}), plan, {"0": 12.345}).splitlines()
    assert len({len(line.partition("why")[0]) for line in rows[:1]}) == 1
    conv, grouped, linear, skipped = rows[2:]
    assert conv.split() == ["0", "8×3·3×3", "2/8", "7.78k", "→", "2.52k", "216", "→", "70", "12.3", "%"]
    assert "g2" in grouped and "dense" in grouped and grouped.endswith("costs no less")
    assert linear.split()[:3] == ["3", "4×256", "4/4"]
    assert skipped.split() == ["9", "dense", "skipped"]


# ── curves ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_line_of_metrics_is_json_even_when_a_loss_is_no_number(tmp_path: Path) -> None:
    voice = Report()
    voice.open(tmp_path)
    voice.scalars("train", 3, {"loss": 0.5, "lr": None})
    voice.scalars("train", 4, {"loss": math.nan, "rate": math.inf})
    voice.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in text)
    assert (first["group"], first["step"], first["loss"]) == ("train", 3, 0.5)
    assert "lr" not in first
    assert second["loss"] is None and second["rate"] is None
    assert first["time"] <= second["time"]


def test_going_back_takes_later_points_and_half_lines_away(tmp_path: Path) -> None:
    voice = Report()
    voice.open(tmp_path)
    voice.scalars("val", 1, {"top1": 50.0})
    voice.scalars("pretrain", 40, {"loss": 7.0})
    for step in (5, 10, 15):
        if step == 15:
            size = voice.written()
        voice.scalars("train", step, {"loss": step})
    voice.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"group": "train", "st')
    again = Report()
    again.open(tmp_path)
    again.rewind(size)
    again.scalars("train", 15, {"loss": -15})
    again.close()
    assert [(p["group"], p["step"]) for p in lines(tmp_path)] == [
        ("val", 1),
        ("pretrain", 40),
        ("train", 5),
        ("train", 10),
        ("train", 15),
    ]
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 5), (10, 10), (15, -15)]
    assert len(events.Scalars("val/top1")) == len(events.Scalars("pretrain/loss")) == 1


def test_each_layer_gets_its_rank_and_a_picture_of_its_spectrum_and_the_plan_is_a_table(tmp_path: Path) -> None:
    voice = Report()
    voice.open(tmp_path)
    bases = {"0": basis(1, 8), "1": basis(2, 8), "3": basis(1, 4)}
    plan = Plan((Choice("0", 2), Choice("1", None, "kept"), Choice("3", 1)))
    voice.layers(layers_of(surveyed(), bases), plan)
    voice.close()
    events = read(tmp_path)
    ranks = {site: events.Scalars(f"layer/{site}/rank")[0].value for site in "013"}
    assert ranks == {"0": 2, "1": 16, "3": 1}
    assert all(events.Images(f"layer/{site}/spectrum")[0].encoded_image_string for site in "013")
    text = events.Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert text[2:] == [
        "| `0` | 8×3·3×3 | 2/8 | 7.78k → 2.52k | 216 → 70 |  |",
        "| `1` | 16×4·3×3 g2 | dense | 9.22k | 576 | kept |",
        "| `3` | 4×256 | 1/4 | 1.02k → 260 | 1.02k → 260 |  |",
    ]


def test_a_spectrum_shows_each_group_and_what_the_rank_keeps() -> None:
    grouped, whole = layers_of(surveyed(), {"1": basis(2, 8), "0": basis(1, 8)})[1::-1]
    axes = spectrum_figure(grouped, 4).axes[0]
    shares, *_ = (line.get_ydata() for line in axes.lines)
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert len(axes.lines) == 2 + 1
    kept = (1 + 1 / 2) / sum(2.0**-i for i in range(8))
    assert axes.get_title() == f"rank 4 keeps {100 * kept:.2f} %"
    assert len(spectrum_figure(whole, None).axes[0].lines) == 1


def test_a_spectrum_of_zeros_still_draws() -> None:
    empty = basis(1, 8)
    zeros = Basis(empty.encode, empty.decode, empty.mean, torch.zeros_like(empty.spectrum))
    spectrum_figure(layers_of(surveyed(), {"0": zeros})[0], 2).canvas.draw()


def test_predictions_are_drawn_against_measurements_and_named() -> None:
    sites = [
        {"site": "conv1", "rank": 8, "predicted": 0.25, "measured": 0.5},
        {"site": "random", "rank": 8, "predicted": None, "measured": 0.5},
    ]
    axes = prediction_figure(sites, "KL").axes[0]
    assert list(axes.lines[0].get_xydata()[0]) == [0.25, 0.5]
    assert [text.get_text() for text in axes.texts] == ["conv1"]
    prediction_figure([], "KL").canvas.draw()


def test_layers_on_disk_are_what_was_written(tmp_path: Path) -> None:
    found = layers_of(surveyed(), {"1": basis(2, 8)})
    save_layers(tmp_path / "layers.json", found)
    assert load_layers(tmp_path / "layers.json") == found
    for layer, form in product(found, (FORMS["output"], FORMS["tucker"])):
        ranks = (4, 4)[: len(form.full_ranks(layer.site))]
        if not form.why_not(layer.site):
            costs = form.macs(layer.site, ranks), form.params(layer.site, ranks)
            assert layer.costs(choose(layer.site.name, form.name, ranks)) == costs


def test_a_tensorboard_folder_that_cannot_be_written_is_told_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    voice = Report()
    voice.open(tmp_path)
    for step in range(3):
        voice.scalars("train", step, {"loss": 1.0})
        voice.flush()
    voice.layers(layers_of(surveyed(), {"0": basis(1, 8)}), Plan((Choice("0", 2),)))
    voice.rewind(voice.written())
    voice.close()
    assert capsys.readouterr().out.count("the run goes on without TensorBoard") == 1
    assert len(voice.warnings) == 1
    assert len(lines(tmp_path)) == 3


def fill(folder: str) -> int:
    said: list[str] = []
    curves = Curves(Path(folder), said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for step in range(400):
        curves.point({"group": "train", "step": step, "time": 0.0, "loss": 1.0})
        if step % 100 == 99:
            curves.flush()
    curves.close()
    print(said)
    return 0


def test_a_disk_that_fills_up_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    done = shared_commands().succeed(tmp_path, ranks=0, function="tests.reporting.test_report:fill")
    assert done.out.count("could not be written ([Errno 27] File too large") == 1


# ── words ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_said_is_on_the_console_and_with_a_time_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = Report()
    voice.say("before there is a folder")
    voice.open(tmp_path)
    voice.say("two\nlines of 100 %s")
    voice.warn("few rows")
    voice.close()
    logging.getLogger("dist_prune").warning("nobody listens any more")
    assert capsys.readouterr().out == "before there is a folder\ntwo\nlines of 100 %s\nwarning: few rows\n"
    logged = (tmp_path / "log.txt").read_text().splitlines()
    shown = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)[1] for line in logged]
    assert shown == ["two", "lines of 100 %s", "warning: few rows"]


def test_the_logger_dist_prune_carries_it_for_handlers_of_others(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Report()) as voice:
        voice.say("a line")
        voice.warn("a concern")
    seen = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert seen == [("dist_prune", "INFO", "a line"), ("dist_prune", "WARNING", "a concern")]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_logged_and_printed_only_where_there_is_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("dist_prune.reporting.progress.is_terminal", lambda *_: terminal)
    monkeypatch.setattr("dist_prune.reporting.progress._Bar.external_write_mode", nullcontext)
    with closing(Report()) as voice:
        voice.open(tmp_path)
        voice.meter.line("   statistics: batch 3 of 5")
        voice.say("done")
    shown = [] if terminal else ["   statistics: batch 3 of 5"]
    assert capsys.readouterr().out.splitlines() == [*shown, "done"]
    assert "statistics: batch 3 of 5" in (tmp_path / "log.txt").read_text()


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    """And is not swallowed, as the standard library's handlers do."""
    (tmp_path / "log.txt").mkdir()
    with closing(Report()) as voice:
        voice.open(tmp_path)
        with pytest.raises(IsADirectoryError):
            voice.say("hello")


def test_the_other_ranks_are_silent_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    voice = Report(speaks=False)
    assert not logging.getLogger("dist_prune").handlers
    voice.say("hello")
    voice.warn("hello")
    voice.scalars("train", 1, {"loss": 1.0})
    voice.layers(layers_of(surveyed(), {}), Plan(()))
    voice.rewind(0)
    with voice.phase("work"):
        pass
    voice.flush()
    voice.close()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert set(voice.seconds) == {"work"}


def test_a_phase_that_comes_twice_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Report()) as voice:
        with voice.phase("tune"):
            pass
        first = voice.seconds["tune"]
        with voice.phase("tune"):
            pass
    assert voice.seconds["tune"] > first > 0
    assert "── tune" in capsys.readouterr().out


def test_the_environment_says_what_one_needs_to_run_it_again() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"]
    assert found["packages"]["safetensors"]
    assert found["command"] and found["python"] and found["host"]
    if (Path(environment_module.__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])


def test_without_a_repository_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        environment_module, "__file__", str(tmp_path / "dist_prune" / "artifacts" / "environment.py")
    )
    assert environment()["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None
