"""Text files and streams do not depend on the locale."""

import ast
import io
import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dist_prune.utils import console, files, text
from tests.commands import MAIN, PROGRAM, ROOT
from tests.runs import Bench

KINDS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("encoding", KINDS)
def test_text_is_read_by_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "file").write_bytes("ein\r\nzwölf × 猫\r".encode(encoding))
    assert text.read_text(tmp_path / "file") == "ein\nzwölf × 猫\n"


def test_what_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one\ntwo\nzw\xf6lf\n")
    with pytest.raises(text.TextError, match="file: line 3 is not utf-8; save the file as UTF-8"):
        text.read_text(tmp_path / "file")


def test_names_that_are_not_unicode_can_be_written_and_read_back(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", json.dumps({"name": "caf\udce9 é"}, ensure_ascii=False))
    assert json.loads(text.read_text(tmp_path / "file")) == {"name": "caf\udce9 é"}


def test_only_one_module_opens_text() -> None:
    """Looked for: `open` without "b", `read_text`, `write_text`, and `text=True` of subprocesses."""

    def opens_text(call: ast.Call) -> bool:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        modes = [m.value for m in [*call.args, *(k.value for k in call.keywords)] if isinstance(m, ast.Constant)]
        if any(k.arg in ("text", "universal_newlines") for k in call.keywords):
            return name in ("run", "Popen", "check_output")
        if name == "open" and owner not in ("os", "Image"):
            return any(isinstance(m, str) and re.fullmatch(r"[rwax]\+?t?", m) for m in modes)
        return name in ("read_text", "write_text") and bool(owner) and owner not in ("files", "text_files")

    package = sorted(p for top in ("dist_prune", "launch") for p in (ROOT / top).rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in package
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    own = "dist_prune/utils/text.py"
    assert sum(place.startswith(own) for place in found) == 3, "this test no longer sees what it looks for"
    assert not [place for place in found if not place.startswith(own)], "text is opened by utils/text.py alone"


# ── streams ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "-- 3x3 -> <= 12 o ... ? a\\xe9.jpg |#| 1/2"),
        ("iso-8859-1", "-- 3×3 -> <= 12 ö ... ? a\\xe9.jpg |#| ½"),
        ("utf-8", "── 3×3 → ≤ 12 ö … 猫 a\\xe9.jpg │█│ ½"),
    ],
)
def test_streams_take_any_text(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    console.adapt_output({})
    print("── 3×3 → ≤ 12 ö … 猫 a\udce9.jpg │█│ ½", end="", flush=True)
    assert raw.getvalue().decode(encoding) == expected


def restricted(*words: str) -> int:
    """The program where streams are ASCII and files would be, too, if they named no encoding."""
    from dist_prune.cli.commands import main

    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), "ascii", write_through=True) for n in (1, 2))
    return main(list(words))


@pytest.mark.parametrize("words", ["", "run --help-all", "check --help", "plan cifar10", "nothing…"])
def test_commands_speak_ascii_where_they_must(bench: Bench, words: str) -> None:
    done = bench.commands(*words.split(), function="tests.utils.test_text:restricted", ranks=0)
    assert done.codes == [2 if words == "nothing…" else 0], done.err
    assert (done.out + done.err).isascii() and "Traceback" not in done.err


def test_a_whole_run_speaks_ascii_and_writes_utf8(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "lauf-é", epochs=0)
    done = bench.commands.succeed("run", *words, function="tests.utils.test_text:restricted", ranks=2)
    assert "-- baseline" in done.out and done.out.isascii()
    log = (tmp_path / "lauf-é" / "log.txt").read_text(encoding="utf-8")
    assert "── baseline" in log and "lauf-é" in log
    for shown in (("compare", tmp_path / "lauf-é", tmp_path / "lauf-é"), ("report", tmp_path / "lauf-é")):
        done = bench.commands.succeed(*shown, function="tests.utils.test_text:restricted", ranks=0)
        assert done.out.isascii()


# ── readers that leave ─────────────────────────────────────────────────────────────────────────────────────


def unread(streams: str, program: str, *words: str) -> int:
    """A program whose output, and errors where `streams` has a 2, go into pipes that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in map(int, streams):
        os.dup2(writer, stream)
    module, _, function = program.partition(":")
    return getattr(import_module(module), function)(list(words))


@pytest.mark.parametrize(
    ("program", "words", "code"),
    [
        (PROGRAM, "", 0),
        (PROGRAM, "run --help", 0),
        (PROGRAM, "run --help-all", 0),
        (PROGRAM, "completion bash", 0),
        (PROGRAM, "plan digits", 0),
        (PROGRAM, "run cifar10", 2),
        (PROGRAM, "run --epoch 3", 2),
        ("dist_prune.cluster.submission:main", "--recipe digits --sweep ranks=uniform:0.5 --dry-run", 0),
        ("dist_prune.data.verify:main", "nowhere --report here", 2),
        ("dist_prune.cluster.profile:main", "nowhere", 2),
    ],
)
@pytest.mark.parametrize("streams", ["1", "12"])
def test_nobody_need_read_what_a_command_prints(
    bench: Bench, program: str, words: str, code: int, streams: str
) -> None:
    """As `| head -1` and `2>&1 | head -1` leave it: no traceback, and the exit code that it would have had."""
    done = bench.commands(streams, program, *words.split(), function="tests.utils.test_text:unread", ranks=0)
    assert done.codes == [code], done.err
    assert "Traceback" not in done.err and "ipe" not in done.err


def test_a_run_that_nobody_watches_goes_on(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", epochs=0)
    done = bench.commands.succeed("12", MAIN, *words, function="tests.utils.test_text:unread", ranks=2)
    assert not done.out and (tmp_path / "run" / "result.json").is_file()
    assert "── projection" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    for more in (("check", *words[:-1], tmp_path / "other"), ("compare", tmp_path / "run", tmp_path / "run")):
        bench.commands.succeed("12", PROGRAM, *more, function="tests.utils.test_text:unread", ranks=0)
