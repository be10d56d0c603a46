"""report.html and report.md: what they say, what they are drawn from, and how they look in a browser."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dist_prune.artifacts.environment import start_of
from dist_prune.artifacts.reader import paired_interval
from dist_prune.config.compression import Method
from dist_prune.config.recipes import RECIPES, parse
from dist_prune.config.run import to_dict
from dist_prune.factorization.plan import Choice
from dist_prune.reporting.html.account import METHODS, account
from dist_prune.reporting.html.charts import axis_of, plot, scatter
from dist_prune.reporting.html.page import Row, columns, format_time
from tests.browser import Browser
from tests.commands import PROGRAM, Done
from tests.runs import SITES, WHOLE, Bench, copied, result_of


def report(bench: Bench, *words: object) -> Done:
    return bench.commands("report", *words, ranks=0, function=PROGRAM)


def words_of(page: Path) -> str:
    """What a reader sees of a page."""
    body = page.read_text().partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


# ── what is said ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_tells_every_stage_with_its_intervals(whole_run: Path) -> None:
    result, text = result_of(whole_run), words_of(whole_run / "report.html")
    for stage in ("dense", "projected", "corrected", "distilled", "tuned"):
        assert f"{stage} {result[stage]['top1']:.2f} %" in text
    assert "36 validation images" in text
    gained, lost = result["tuned"]["gained"], result["tuned"]["lost"]
    low, high = paired_interval(gained, lost, 36)
    assert f"{100 * (gained - lost) / 36:+.2f} {low:+.2f} … {high:+.2f}" in text
    assert result["tuned"]["top1"] - result["dense"]["top1"] == pytest.approx(100 * (gained - lost) / 36)


def test_the_page_tells_every_layer_with_its_cost_and_losses(whole_run: Path) -> None:
    text = words_of(whole_run / "report.html")
    measured = {s["site"]: s["measured"] for s in json.loads((whole_run / "sites.json").read_text())["sites"]}
    plan = json.loads((whole_run / "plan.json").read_text())["choices"]
    for choice in plan:
        assert f"{choice['site']} " in text
        if choice["rank"]:
            assert f"{choice['rank']}/{SITES[choice['site']]}" in text
            assert f"{measured[choice['site']]:.3g}" in text
            assert f"{choice['site']}: rank {choice['rank']} keeps" in text, "its spectrum"


def test_the_page_tells_what_was_done_what_was_warned_of_and_how_to_do_it_again(whole_run: Path) -> None:
    text, config = words_of(whole_run / "report.html"), json.loads((whole_run / "config.json").read_text())
    assert "by fisher: their covariance in the metric" in text
    assert "Correction in closed form (regression), from 16 of the training images" in text
    assert "Label-free distillation on: 20 steps" in text
    assert "Fine-tuned with labels for 1 epochs" in text
    assert "Distillation from the dense network was off" in text
    assert result_of(whole_run)["warnings"] and all(
        " ".join(w.split()) in text for w in result_of(whole_run)["warnings"]
    )
    assert config["environment"]["start"] in text
    assert f"torch {config['environment']['packages']['torch']}" in text
    assert result_of(whole_run)["parameter_hash"] in text
    for phase in result_of(whole_run)["seconds"]:
        assert phase in text


def test_the_page_holds_the_predicted_loss_of_the_whole_against_the_measured(whole_run: Path) -> None:
    losses = [choice["loss"] for choice in json.loads((whole_run / "plan.json").read_text())["choices"]]
    measured = json.loads((whole_run / "result.json").read_text())["projected"]["kl"]
    predicted = sum(loss for loss in losses if loss is not None)
    line = f"KL to the dense network {predicted:.3g} predicted, {measured:.3g} measured"
    for page in (words_of(whole_run / "report.html"), (whole_run / "report.md").read_text()):
        assert line in page
    log = (whole_run / "log.txt").read_text()
    assert f"KL to dense {measured:.4f}, predicted {predicted:.4f}" in log


def test_latencies_are_told_where_they_were_measured(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "run")
    bench.commands.succeed("speed", folder, "--batches", 2, "--engines", "eager", ranks=0, function=PROGRAM)
    (measured,) = json.loads((folder / "speed.json").read_text())["passes"]
    assert report(bench, folder).codes == [0]
    assert f"eager 2 {measured['dense']:.3g} ms {measured['compressed']:.3g} ms" in words_of(
        folder / "report.html"
    )
    assert f"×{measured['speedup']:.2f}" in (folder / "report.md").read_text()


def test_markdown_says_the_same(whole_run: Path) -> None:
    result, text = result_of(whole_run), (whole_run / "report.md").read_text()
    assert f"| tuned | {result['tuned']['top1']:.2f} |" in text
    assert all(f"| `{site}` |" in text for site in SITES)
    assert all(f"- {warning}" in text for warning in result["warnings"])
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    widths = [{len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()} for table in tables]
    assert len(tables) == 3 and all(len(each) == 1 for each in widths), "one width for each of three tables"


def test_the_page_needs_nothing_else(whole_run: Path) -> None:
    page = (whole_run / "report.html").read_text()
    assert not re.search(r"https?:|<script|@import|url\(|src=", page)
    assert len(page) < 300_000


def test_the_command_draws_the_same_page_again(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "run")
    before = {name: (folder / name).read_text() for name in ("report.html", "report.md")}
    for name in before:
        (folder / name).unlink()
    done = report(bench, folder)
    assert done.codes == [0], done.err
    assert done.out.split() == [str(folder / name) for name in before]
    assert {name: (folder / name).read_text() for name in before} == before


def test_names_are_escaped(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "<b>&amp;")
    assert report(bench, folder).codes == [0]
    assert "<h1>&lt;b&gt;&amp;amp;</h1>" in (folder / "report.html").read_text()


# ── what it is drawn from ──────────────────────────────────────────────────────────────────────────────────


def test_of_an_unfinished_run_the_page_says_how_far_it_is(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "run")
    for name in ("result.json", "plan.json"):
        (folder / name).unlink()
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step": 4' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + '\n{"group": "tr')
    assert report(bench, folder).codes == [0]
    text = words_of(folder / "report.html")
    assert "not finished. Stages measured so far: dense, projected, corrected, distilled." in text
    assert f"--run-dir {folder} --resume" in text
    assert "What was asked for" in text
    assert "not finished" in (folder / "report.md").read_text()


@pytest.mark.parametrize("name", ["config.json", "result.json", "plan.json", "layers.json", "sites.json"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_a_damaged_file_is_named(bench: Bench, whole_run: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = copied(whole_run, tmp_path / "run")
    (folder / name).write_text(content)
    done = report(bench, folder)
    assert done.codes == [1]
    assert len(done.errors) == 1 and str(folder) in done.errors[0] and "damaged" in done.errors[0]
    if content == "{":
        assert str(folder / name) in done.errors[0]


def test_what_is_not_a_run_is_refused_and_left_alone(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert "is not the directory of a run: it has no config.json" in report(bench, tmp_path / "photos").errors[0]
    assert "there is no such folder" in report(bench, tmp_path / "nothing").errors[0]
    assert list((tmp_path / "photos").iterdir()) == []
    assert "needs the directory of a run" in report(bench).errors[0]
    assert "--output is for several runs" in report(bench, whole_run, "--output", tmp_path / "a.html").errors[0]


def test_what_someone_else_wrote_is_not_replaced(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "run")
    (folder / "report.md").write_text("my own notes")
    assert f"{folder / 'report.md'} was not written by this program" in report(bench, folder).errors[0]
    assert (folder / "report.md").read_text() == "my own notes"


def test_a_page_that_cannot_be_drawn_does_not_cost_the_run(bench: Bench, whole_run: Path, tmp_path: Path) -> None:
    folder = copied(whole_run, tmp_path / "run")
    for name in ("result.json", "report.html", "report.md"):
        (folder / name).unlink()
    (folder / "layers.json").write_text("{")
    done = bench.commands.succeed(*bench.words(folder, **WHOLE, resume=True), ranks=2)
    assert "warning: report.html could not be drawn" in done.out
    assert any("could not be drawn" in warning for warning in result_of(folder)["warnings"])
    assert result_of(folder)["parameter_hash"] == result_of(whole_run)["parameter_hash"]


# ── several runs ───────────────────────────────────────────────────────────────────────────────────────────


def test_one_page_over_several_runs(bench: Bench, runs: dict[int, Path], whole_run: Path, tmp_path: Path) -> None:
    done = report(bench, runs[1], whole_run, "--output", tmp_path / "all.html")
    assert done.codes == [0], done.err
    text = words_of(tmp_path / "all.html")
    for folder, stage in ((runs[1], "tuned"), (whole_run, "tuned")):
        result = result_of(folder)
        assert f"×{result['macs']['compressed'] / result['macs']['dense']:.3f}" in text
        assert f"{stage} {result[stage]['top1']:.2f} %" in text
    assert "method" in text and "fisher" in text and "pca" in text, "settings that differ"
    link = re.search(r'<a href="([^"]*)"', (tmp_path / "all.html").read_text())
    assert link and (tmp_path / link[1]).resolve().is_file()
    assert "| pca |" in (tmp_path / "all.md").read_text()


def test_several_runs_must_be_finished(
    bench: Bench, runs: dict[int, Path], whole_run: Path, tmp_path: Path
) -> None:
    folder = copied(whole_run, tmp_path / "run")
    (folder / "result.json").unlink()
    assert "is not finished (no result.json)" in report(bench, runs[1], folder).errors[0]


# ── in a browser ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pages(bench: Bench, whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, of an unfinished one, and over several."""
    home = tmp_path_factory.mktemp("pages")
    unfinished = copied(whole_run, home / "unfinished")
    (unfinished / "result.json").unlink()
    assert report(bench, unfinished).codes == [0]
    other = copied(whole_run, home / "another-run-with-a-rather-long-name-as-sweeps-have-them")
    assert report(bench, whole_run, other, "--output", home / "all.html").codes == [0]
    return {
        "one": whole_run / "report.html",
        "unfinished": unfinished / "report.html",
        "several": home / "all.html",
    }


@pytest.mark.parametrize("which", ["one", "unfinished", "several"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1200, 1400])
def test_a_page_fits_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], which: str, width: int, dark: bool
) -> None:
    address = f"file://{pages[which]}"
    browser.open(address, width=width, dark=dark)
    assert browser.ask("window.innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.ask(cut) == 0, "tables whose last columns are out of sight"
    assert browser.complaints() == []
    assert browser.requests() == [address]
    paper, ink = (
        np.array(re.findall(r"\d+", browser.ask(f"getComputedStyle(document.body).{of}"))[:3], float)
        for of in ("backgroundColor", "color")
    )
    assert (paper.mean() < 60) == dark
    assert contrast(paper, ink) > 7


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2."""

    def luminance(colour: np.ndarray) -> float:
        c = colour / 255
        return float(np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


# ── the parts ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_paired_interval_holds_the_difference_in_95_of_100_draws() -> None:
    rng, n, gain, loss = np.random.default_rng(0), 400, 0.03, 0.07
    draws = rng.multinomial(n, [gain, loss, 1 - gain - loss], 4000)
    found = [paired_interval(g, lost, n) for g, lost, _ in draws.tolist()]
    held = np.mean([low <= 100 * (gain - loss) <= high for low, high in found])
    assert 0.935 < held < 0.97
    assert paired_interval(0, 0, 100)[0] < 0 < paired_interval(0, 0, 100)[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_told(recipe: str) -> None:
    text = " ".join(account(to_dict(replace(RECIPES[recipe], recipe=recipe))))
    assert f"Recipe {recipe}." in text and RECIPES[recipe].compression.ranks in text
    on = "Distillation from the dense network was on, share 0.9 at temperature 4."
    assert (on in text) == recipe.startswith("resnet")


def test_every_method_has_its_words() -> None:
    assert set(METHODS) == set(get_args(Method))


def test_what_did_not_run_is_not_told() -> None:
    settings = to_dict(parse(["digits", "--epochs", "0", "--calibrate-images", "77"]))
    assert "77" in " ".join(account(settings))
    text = account(settings, ["dense", "projected"])
    assert text[-3:] == ["No correction.", "No label-free distillation.", "No fine-tuning."]


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (65, "1:05"), (3723.4, "1:02:03")])
def test_times(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_charts_are_in_per_cent_downwards_and_skip_what_is_no_number() -> None:
    drawn = plot("", {"a": [(0, 1.0), (5, float("nan")), (10, 3.0)]}, "x", "y", mark=5)
    assert drawn.mark == 50
    (line,) = drawn.lines
    (x0, y0), (x1, y1) = (map(float, pair.split()) for pair in line.path[1:].split("L"))
    assert (x0, x1) == (0, 100) and y1 < y0
    assert all(0 <= tick.at <= 100 for tick in (*drawn.x_ticks, *drawn.y_ticks))
    assert axis_of([1, 1000], logarithmic=True)(10**1.5) == pytest.approx(50)
    assert plot("", {}, "x", "y").lines == ()


def test_a_column_without_any_entry_is_left_out() -> None:
    bare = Row("a", None, Choice("a", None, reason="called twice"), (0, 0), (0, 0), None, None)
    assert columns([bare], "KL") == {"form": [bare.form], "why dense": ["called twice"]}
    measured = replace(bare, name="b", measured=0.25)
    assert columns([bare, measured], "KL")["measured KL"] == ["", "0.25"]


def test_points_whose_names_would_overlap_have_none() -> None:
    drawn = scatter("", {"a": (1, 1), "b": (1.01, 1.01), "c": (2, 2)}, "x", "y", joined=["a", "c"], level=3)
    assert [dot.name for dot in drawn.lines[0].dots] == ["a", "", "c"]
    assert drawn.lines[0].path.count("L") == 1 and drawn.guide


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("argv", "environ", "text"),
    [
        (["launch/local.py", "digits"], {}, "python launch/local.py digits"),
        (["/x/bin/dist-prune", "run", "digits"], {}, "dist-prune run digits"),
        (
            ["launch/local.py", "--sites", "a b"],
            TORCHRUN | {"WORLD_SIZE": "8"},
            "torchrun --standalone --nproc-per-node 8 launch/local.py --sites 'a b'",
        ),
        (
            ["/x/bin/dist-prune", "run"],
            TORCHRUN,
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE --nproc-per-node 8 --no-python "
            "dist-prune run",
        ),
        (
            ["launch/local.py"],
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"},
            "srun --nodes 2 --ntasks 4 python launch/local.py",
        ),
    ],
)
def test_the_command_that_starts_it_again(argv: list[str], environ: dict[str, str], text: str) -> None:
    assert start_of(argv, environ) == text
