"""Help that fits a screen: the flags that one needs first, a line each, with a recipe's values."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from dist_prune.config.run import Run, to_dict
from dist_prune.config.settings import Setting, settings
from dist_prune.utils.console import hanging

FIRST = {
    "what": ("data", "arch", "weights", "classes", "crop"),
    "how far": ("ranks", "sites", "method", "side", "statistics-images", "statistics"),
    "then": (
        *("correct", "calibrate-images", "calibrate-data", "distill-steps", "epochs", "batch-size", "lr"),
        *("distill", "step", "tune-epochs", "pretrain.epochs"),
    ),
    "the run": ("run-dir", "resume", "overwrite", "device", "seed", "until", "dry-run", "save-recipe"),
}
GAP = 30  # columns for a flag and its value


@dataclass(frozen=True)
class Usage:
    """What reads a run's flags: its name, what it does with them, and how it is called."""

    name: str
    about: str
    examples: tuple[str, ...]


def page(program: Usage, default: Run, recipes: Sequence[str], width: int) -> str:
    """Usage, the first flags with their values in `default`, recipes and examples; `width` columns wide."""
    lines = [f"usage: {program.name} [RECIPE | FILE.toml] [FLAGS]", "", *textwrap.wrap(program.about, width)]
    for title, flags in FIRST.items():
        lines += ["", title, *(_line(settings()[flag], default, width) for flag in flags)]
    every = (
        f"--help-all shows all {len(settings()) - 1} flags in full. Values are those of recipe {default.recipe}."
    )
    lines += ["", hanging("recipes ", ", ".join(recipes), 8, width), *textwrap.wrap(every, width)]
    return "\n".join([*lines, *(f"  {example}" for example in program.examples)])


def _line(setting: Setting, default: Run, width: int) -> str:
    value = to_dict(setting.of(default))
    message = "off" if value is False else "on" if value is True else "" if value is None else str(value)
    line = f"{f'  --{setting.flag} {message}':{min(GAP, width // 2)}} {setting.text}"
    return line if len(line) <= width else f"{line[: width - 1]}…"
