"""Text for terminals of any width, plain where colours are not wanted."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

import tyro


def hanging(first: str, text: str, indent: int, columns: int) -> str:
    """`first`, then `text` from column `indent` on, broken at words and indented alike in further lines."""
    return textwrap.fill(
        text or " ",
        max(columns, indent + 20),
        initial_indent=first.ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    ).rstrip()


def columns() -> int:
    """The terminal's width ($COLUMNS where that is set), 80 where there is none."""
    return shutil.get_terminal_size().columns


def without_colours(environ: Mapping[str, str]) -> None:
    """Respect $NO_COLOR, which tyro does not; it recognises dumb and absent terminals by itself."""
    if environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
