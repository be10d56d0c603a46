"""Text for terminals of any width and any encoding, plain where colours are not wanted."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO, cast

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


class Pipe(io.FileIO):
    """Output that goes nowhere once nobody reads it, as after `| head`: no reason to end a run, or to complain."""

    def __init__(self, stream: TextIO) -> None:
        """In place of a stream of the same file."""
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream  # which would close the file when it goes

    def write(self, data: Any, /) -> int:  # noqa: ANN401  bytes of any kind
        """See `io.RawIOBase.write`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def adapt_output(environ: Mapping[str, str]) -> None:
    """Make the standard streams take any text and outlive readers; respect $NO_COLOR, which tyro does not."""
    codecs.register_error(PLAIN, _in_ascii)
    sys.stdout, sys.stderr = _adapted(sys.stdout), _adapted(sys.stderr)
    if environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False


def _adapted(stream: TextIO) -> TextIO:
    """The stream as this module wants it, as far as it is a file: in tests something else may stand in for it."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with suppress(OSError):  # a terminal opened for reading, too, cannot be changed: it shows what it can
        stream.reconfigure(errors=PLAIN)
    if not isinstance(stream.buffer, io.FileIO | io.BufferedWriter):
        return stream
    stream.flush()
    pipe = Pipe(stream)
    buffered = isinstance(stream.buffer, io.BufferedWriter)  # python -u has none
    return io.TextIOWrapper(
        io.BufferedWriter(pipe) if buffered else cast(io.BufferedWriter, pipe),
        stream.encoding,
        PLAIN,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


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
