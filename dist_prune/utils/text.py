"""The one place where text files are opened: written as UTF-8, read as what people's editors make of a file."""

from __future__ import annotations

import codecs
from pathlib import Path

MARKS = (  # UTF-32 first: its mark begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NOT_UNICODE = "backslashreplace"  # in names of files that are not UTF-8; in JSON this is how they are written


class TextError(ValueError):
    """A file that is not text."""


def read_text(path: Path) -> str:
    """The text of a file, whatever the locale: as its byte order mark says, else UTF-8; lines end in newlines.

    Raises:
        TextError: neither; says where.
        OSError: it cannot be read.
    """
    return decoded(path.read_bytes(), str(path))


def decoded(content: bytes, name: str) -> str:
    """The text that these bytes of the file `name` are; see `read_text`."""
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TextError(f"{name}: line {line} is not {error.encoding}; save the file as UTF-8") from error
    if "\0" in text:
        raise TextError(f"{name}: holds zero bytes; expected text, saved as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_damaged(path: Path) -> str:
    """The text of a file that may have been left in the middle of a character: what cannot be read becomes �."""
    return path.read_text(encoding="utf-8", errors="replace")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, at once and not atomically; see `files.write_text`."""
    path.write_text(text, encoding="utf-8", errors=NOT_UNICODE)


def append_text(path: Path, text: str) -> None:
    """Add UTF-8 to the end of a file, which is made where there is none."""
    with path.open("a", encoding="utf-8", errors=NOT_UNICODE) as file:
        file.write(text)
