"""`dist-prune speed`: size and latency of a run's dense and compressed network side by side, on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from dist_prune.config.flags import require
from dist_prune.export.command import take
from dist_prune.export.speed import Amount, Engine, Speed, measure_speed
from dist_prune.factorization.execution import Execution
from dist_prune.network.attention import opened_as, opened_in
from dist_prune.network.models import build
from dist_prune.network.padding import own_paddings, with_paddings
from dist_prune.utils.files import require_absent, write_text
from dist_prune.utils.tables import table

FILE = "speed.json"
LEGEND = """reduce: the layer itself, to fewer channels; expand: 1×1 back
a call more: what any layer costs, however small, is most of the difference
moves data: copying as many bytes takes so much of its time
MACs a second: of this layer ÷ of the dense one"""


@dataclass(frozen=True)
class Timed:
    """Measure size and latency of a run's dense and compressed network, and why sites gain less.

    Both take turns, so that other work strikes both alike. Writes speed.json.

    Example: dist-prune speed runs/first --threads 1
    """

    run: tyro.conf.Positional[Path]
    """A run's directory, or a folder with its plan.json, model.safetensors and model.safetensors.sha256."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Images per pass; sites are timed with the middle one."""
    engines: tuple[Engine, ...] = ("eager", "onnxruntime")
    """What runs the networks; channels-last: eager, in NHWC memory format; compile: torch.compile."""
    bf16: bool = False
    """In bfloat16 autocast, as a run with --bf16 trains; all but onnxruntime."""
    device: str = "auto"
    """auto: CUDA where there is one; or cpu, cuda."""
    threads: int = 0
    """CPU threads; 0: as many as PyTorch takes by itself."""
    out: Path | None = None
    """File to write; default speed.json in the run's directory."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        require(bool(self.batches) and min(self.batches) > 0, f"--batches {self.batches}: expected 1 or more")
        require(self.threads >= 0, f"--threads {self.threads}: expected 0 or more")
        known = ("auto", "cpu", "cuda") if torch.cuda.is_available() else ("auto", "cpu")
        require(
            self.device in known, f"--device {self.device}: expected one of {', '.join(known)} on this machine"
        )


def parse(words: Sequence[str]) -> Timed:
    """What the words ask for."""
    return tyro.cli(Timed, args=words, prog="dist-prune speed")


def main(words: Sequence[str]) -> int:
    """Measure what the words say; 0.

    Raises:
        CheckpointError: no finished run, a damaged one, or the file is there already.
        ConfigError: an invalid flag.
    """
    asked = parse(words)
    path = asked.out or asked.run / FILE
    taken = take(asked.run)
    if not asked.overwrite:
        require_absent(path, "name another file with --out, or add --overwrite")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    cuda = asked.device == "cuda" or (asked.device == "auto" and torch.cuda.is_available())
    device, side = torch.device("cuda" if cuda else "cpu"), taken.description.image.crop
    what = taken.description
    dense = build(what.arch, what.classes, what.options).to(device)
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    dense = opened_as(with_paddings(dense, own_paddings(dense, image)), opened_in(taken.network))
    execution = Execution(asked.bf16)
    found = measure_speed(dense, taken.network.to(device), image, asked.batches, asked.engines, execution)
    write_text(path, found.to_json())
    print(f"{format_summary(found)}\nwritten to {path}")
    return 0


def format_summary(speed: Speed) -> str:
    """For people."""
    precision = ", bfloat16 autocast" if speed.bf16 else ""
    lines = [f"{speed.device}, torch {speed.torch}{precision}", _sizes(speed), "", _passes(speed)]
    share = f"{speed.site_share:.0%} of the dense eager pass is spent in these sites; the rest is not compressed"
    return "\n".join([*lines, *speed.notes, "", _sites(speed), LEGEND, share])


def _sizes(speed: Speed) -> str:
    def row(name: str, amount: Amount, unit: float, text: str) -> list[str]:
        return [
            name,
            f"{amount.dense / unit:.4g} {text}",
            f"{amount.compressed / unit:.4g} {text}",
            _ratio(amount),
        ]

    return table(
        ["", "dense", "compressed", "ratio"],
        [
            row("MACs", speed.macs, 1e6, "M"),
            row("parameters", speed.params, 1e6, "M"),
            row("size", speed.megabytes, 1, "MB"),
        ],
    )


def _ratio(amount: Amount) -> str:
    return f"{amount.ratio:.3f}"


def _passes(speed: Speed) -> str:
    rows = [
        [
            f"{p.engine}, batch {p.batch}",
            f"{p.dense:.3g} ms",
            f"{p.compressed:.3g} ms",
            f"{p.compressed / p.dense:.3f}",
            f"{p.speedup:.2f} ({p.slowest:.2f}–{p.fastest:.2f})",
        ]
        for p in speed.passes
    ]
    return table(["pass", "dense", "compressed", "ratio", "speed-up (range)"], rows)


def _sites(speed: Speed) -> str:
    rows = [
        [
            s.site,
            s.label or str(s.rank),
            f"{s.macs_ratio:.3f}",
            f"{s.time_ratio:.3f}",
            f"{s.dense:.3g} ms",
            " + ".join(f"{ms:.3g}" for ms in (s.reduce, s.core, s.expand) if ms) + " ms",
            s.reason,
        ]
        for s in speed.sites
    ]
    head = [
        f"site, batch {speed.site_batch}",
        "rank",
        "MACs ratio",
        "time ratio",
        "dense",
        "reduce + expand",
        "why",
    ]
    return table(head, rows)
