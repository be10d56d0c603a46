"""Text for terminals of any width and any encoding, plain where colours are not wanted."""

from __future__ import annotations

import codecs
import io
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping
from contextlib import suppress

import tyro

PLAIN = "dist_prune.plain"  # how Python knows the handler of characters that a stream cannot show
LOOKS_LIKE = {
    **dict.fromkeys("─−–—‐╌━", "-"),
    **dict.fromkeys("│┃▏▎▍▌▋▊▉", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    **dict.fromkeys("█▇▆▅▄▃▂▁", "#"),
    "→": "->",
    "×": "x",
    "·": ".",
    "‖": "||",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "÷": "/",
    "±": "+-",
    "Σ": "sum",
    "λ": "lambda",
    "γ": "gamma",
    "α": "alpha",
    "ρ": "rho",
    "∂": "d",
    "√": "sqrt",
    "½": "1/2",
    "′": "'",
    "⊗": "x",
}


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


def adapt_output(environ: Mapping[str, str]) -> None:
    """Make the standard streams take any text, and respect $NO_COLOR, which tyro does not."""
    codecs.register_error(PLAIN, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a terminal opened for reading, too, cannot be changed: it shows what it can
                stream.reconfigure(errors=PLAIN)
    if environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Say in ASCII what a stream's encoding cannot: the handler of such errors while text is written."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    nearest = unicodedata.normalize("NFKD", LOOKS_LIKE.get(character, character))
    return nearest.encode("ascii", "ignore").decode() or "?" * (not unicodedata.combining(character))
