"""One run as a page: report.html, a file that needs nothing else, and report.md."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from dist_prune.artifacts.findings import Findings, read
from dist_prune.artifacts.reader import accuracy_interval, paired_interval
from dist_prune.factorization.layers import Layer
from dist_prune.factorization.plan import Choice
from dist_prune.reporting.html.account import account
from dist_prune.reporting.html.charts import Plot, plot, scatter
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.files import CheckpointError, write_text
from dist_prune.utils.tables import si
from dist_prune.utils.text import read_damaged

HTML, MARKDOWN = "report.html", "report.md"
MARK = "made by dist_prune"  # in every page, so that only pages are replaced
TRAININGS = {
    "pretrain": "training the dense network",
    "rounds/train": "between rounds",
    "distill": "label-free distillation",
    "train": "fine-tuning",
}


@dataclass(frozen=True)
class Span:
    """An accuracy with its 95 % interval, and the interval of its difference to the dense network's, in points."""

    stage: str
    metrics: Metrics
    interval: tuple[float, float] | None
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class Row:
    """What became of a layer; `layer` is None where it could not be factored."""

    name: str
    layer: Layer | None
    choice: Choice
    before: tuple[int, int]
    after: tuple[int, int]
    predicted: float | None
    measured: float | None

    @property
    def rank(self) -> int | None:
        """The smallest of its ranks; None where it stays dense."""
        return self.choice.rank

    @property
    def form(self) -> str:
        """Form and ranks, beside the outputs where they are directions of these."""
        if self.layer is None or self.rank is None or self.choice.form != "output":
            return self.choice.label
        return f"{self.rank}/{self.layer.site.outputs}"

    @property
    def kept(self) -> float | None:
        """Per cent of the outputs' spectrum."""
        share = self.layer.kept(self.choice) if self.layer else None
        return None if share is None else 100 * share


def write(folder: Path, result: Mapping[str, Any] | None = None) -> list[Path]:
    """Write both files into the run's directory.

    Args:
        folder: of the run.
        result: what result.json will hold, of a run that is about to write it.

    Raises:
        CheckpointError: see `findings.read`; or they cannot be written.
    """
    found = read(folder, result)
    try:
        return write_pages(folder / HTML, "run", context(found))
    except (KeyError, TypeError, UndefinedError) as error:
        raise CheckpointError(f"{folder}: damaged, or of another version of this program ({error!r})") from error


def write_pages(html: Path, template: str, content: Mapping[str, Any]) -> list[Path]:
    """The page and the same in Markdown beside it.

    Raises:
        CheckpointError: a file of that name is there that this program did not write.
    """
    pages = [(html, f"{template}.html"), (html.with_suffix(".md"), f"{template}.md")]
    for path, _ in pages:
        if path.is_file() and MARK not in read_damaged(path):
            raise CheckpointError(f"{path} was not written by this program; choose another name by --output")
    for path, name in pages:
        write_text(path, templates().get_template(name).render(content, mark=MARK))
    return [path for path, _ in pages]


def templates() -> Environment:
    """Of the pages; whatever is put into HTML is escaped."""
    found = Environment(
        loader=PackageLoader("dist_prune.reporting.html"),
        autoescape=lambda name: bool(name) and str(name).endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"si": si, "time": format_time, "cell": lambda text: str(text).replace("|", "\\|")}
    return found


def format_time(seconds: float) -> str:
    """Such as 1:02:03, 2:03, or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


# ── what the page shows ────────────────────────────────────────────────────────────────────────────────────


def context(found: Findings) -> dict[str, Any]:
    """All that the templates ask for."""
    rows = list(rows_of(found))
    return {
        "title": found.folder.resolve().name,
        "run": found,
        "account": account(found.settings, list(found.stages) if found.result else ()),
        "spans": spans(found.stages),
        "scale": scale(spans(found.stages)),
        "rows": rows,
        "columns": columns(rows, found.unit),
        "widest": max([1, *(row.before[0] for row in rows)]),
        "spectra": list(spectra(rows)),
        "prediction": prediction(found),
        "together": together(found),
        "curves": list(curves(found)),
        "phases": (found.result or {}).get("seconds", {}),
        "warnings": (found.result or {}).get("warnings", []),
        "repeat": found.environment.get("start") or f"python {found.environment['command']}",
        "go_on": shlex.join(["--run-dir", str(found.folder), "--resume"]),
    }


def spans(stages: Mapping[str, Metrics]) -> list[Span]:
    """Of all stages; intervals where the number of images is known."""
    return [
        Span(name, m, accuracy_interval(m.top1, m.images) if m.images else None, _difference(m))
        for name, m in stages.items()
    ]


def _difference(m: Metrics) -> tuple[float, float, float] | None:
    if m.gained is None or m.lost is None or not m.images:
        return None
    return (100 * (m.gained - m.lost) / m.images, *paired_interval(m.gained, m.lost, m.images))


def scale(found: Sequence[Span]) -> tuple[float, float]:
    """Ends of an axis that has room for all intervals."""
    ends = [end for span in found for end in (span.interval or (span.metrics.top1,) * 2)] or [0.0, 100.0]
    room = max(0.5, 0.05 * (max(ends) - min(ends)))
    return max(0.0, min(ends) - room), min(100.0, max(ends) + room)


def rows_of(found: Findings) -> Iterator[Row]:
    """Every layer of the plan, with its cost where that is known."""
    known = {layer.site.name: layer for layer in found.layers}
    for choice in found.plan.choices if found.plan else ():
        layer, site = known.get(choice.site), found.sites.get(choice.site, {})
        dense = Choice(choice.site, None)
        before, after = (layer.costs(dense), layer.costs(choice)) if layer else ((0, 0), (0, 0))
        yield Row(choice.site, layer, choice, before, after, choice.loss, site.get("measured"))


def columns(rows: Sequence[Row], unit: str) -> dict[str, list[str]]:
    """The table of layers, by heading; a heading that no layer has anything under is left out."""

    def cost(row: Row, which: int) -> str:
        before, after = si(row.before[which]), si(row.after[which])
        return "" if row.layer is None else f"{before} → {after}" if row.rank else before

    cells = {
        "shape": [row.layer.site.shape if row.layer else "" for row in rows],
        "form": [row.form for row in rows],
        "MACs": [cost(row, 0) for row in rows],
        "weights": [cost(row, 1) for row in rows],
        "spectrum kept": ["" if row.kept is None else f"{row.kept:.2f} %" for row in rows],
        f"predicted {unit}": [
            "" if row.predicted is None or not row.rank else f"{row.predicted:.3g}" for row in rows
        ],
        "measured KL": ["" if row.measured is None else f"{row.measured:.3g}" for row in rows],
        "why dense": [row.choice.reason for row in rows],
    }
    return {heading: column for heading, column in cells.items() if any(column)}


def spectra(rows: Sequence[Row]) -> Iterator[Plot]:
    """One small chart a layer, the chosen rank marked."""
    for row in rows:
        if row.layer is None or row.layer.spectrum is None:
            continue
        groups = row.layer.spectrum
        lines = {f"group {i + 1}": list(enumerate(shares, start=1)) for i, shares in enumerate(groups[:4])}
        lines = lines if len(groups) > 1 else {"": lines["group 1"]}
        mark = None if row.kept is None or row.rank is None else row.rank / len(groups)
        floor = 1e-8
        lines = {name: [(x, max(y, floor)) for x, y in points] for name, points in lines.items()}
        kept = row.choice.label if row.kept is None else f"rank {row.rank} keeps {row.kept:.2f} %"
        yield plot(f"{row.name}: {kept}", lines, "direction", "share of the sum", logarithmic=True, mark=mark)


def prediction(found: Findings) -> Plot | None:
    """What was predicted of each layer alone, against what was measured."""
    known = {
        name: (site["predicted"], site["measured"])
        for name, site in found.sites.items()
        if site["predicted"] and site["measured"] > 0
    }
    if not known:
        return None
    title = f"Each layer compressed alone: predicted {found.unit}, measured KL"
    return scatter(title, known, f"predicted {found.unit}", "measured KL, nats per image", logarithmic=True)


def together(found: Findings) -> tuple[float, float] | None:
    """KL of the projected network, nats per image: predicted, as the sum over its layers, and measured."""
    projected, basis = found.stages.get("projected"), found.settings["compression"]["basis"]
    predicts = basis["method"] == "fisher" and basis["loss"] != "mse"
    if not predicts or projected is None or projected.kl is None or found.plan is None or found.plan.loss is None:
        return None
    return found.plan.loss, projected.kl


def curves(found: Findings) -> Iterator[Plot]:
    """Loss and learning rate of every training, the correction's progress, and rounds."""
    for group, text in TRAININGS.items():
        if loss := found.curve(group, "loss"):
            yield plot(f"Loss, {text}", {"": loss}, "step", "loss")
            if held_out := found.curve(group, "held_out_kl"):
                yield plot(f"Held-out KL, {text}", {"": held_out}, "step", "KL, nats per image")
            yield plot(f"Learning rate, {text}", {"": found.curve(group, "lr")}, "step", "learning rate")
            rate = found.curve(group, "images_per_second")
            yield plot(f"Images per second, {text}", {"": rate}, "step", "images per second")
    if found.curve("search", "best"):
        lines = {"each": found.curve("search", "candidate"), "least so far": found.curve("search", "best")}
        yield plot("Search: KL of candidate plans", lines, "candidate", "KL, nats per image")
    trials = sorted({name for p in found.points if p["group"] == "calibration" for name in p if "trial" in name})
    if trials:
        lines = {name: found.curve("calibration", name) for name in trials}
        yield plot("Correction: held-out KL after each layer", lines, "layers solved", "KL, nats per image")
    if top1 := found.curve("rounds", "top1"):
        yield plot("Rounds: top-1", {"": top1}, "round", "top-1, %")
        yield plot("Rounds: MACs", {"": found.curve("rounds", "macs")}, "round", "MACs of one image")
