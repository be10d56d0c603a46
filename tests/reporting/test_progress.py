"""What is seen of a long phase: a bar on a terminal of any width, lines in a log, nothing on the other ranks."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_prune.cli.main import main
from dist_prune.data.loader import Batch
from dist_prune.reporting.progress import Meter, count_images
from tests.commands import shared_commands
from tests.runs import Bench

OVER = "⇤"  # where a line is drawn over: a carriage return would be read as the end of a line


def batch(images: int) -> Batch:
    return Batch(torch.zeros(images, 3, 2, 2), torch.zeros(images), torch.arange(images))


def meter(said: list[str], **settings: Any) -> Meter:
    return Meter(said.append, **({"terminal": False, "every_s": 0, "name": "statistics"} | settings))


def test_a_log_gets_lines_with_phase_place_rate_and_time_left() -> None:
    said: list[str] = []
    handed = list(meter(said, ranks=2).along([batch(4)] * 3, total=5, done=2, images=count_images))
    assert len(handed) == 3
    shape = r"   statistics: batch (\d) of 5, [\d,]+ images/s, \d\d:\d\d left"
    assert [int(re.fullmatch(shape, line)[1]) for line in said] == [3, 4]  # the last is the phase's end


def test_the_rate_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    said: list[str] = []
    list(meter(said, ranks=3).along([batch(8)] * 2, total=4, images=count_images))
    assert said == [
        "   statistics: batch 1 of 4, 12 images/s, 00:06 left",
        "   statistics: batch 2 of 4, 12 images/s, 00:04 left",
    ]


def test_what_has_no_images_has_no_rate() -> None:
    said: list[str] = []
    list(meter(said).along("abc", total=3, unit="layer"))
    assert said and all(re.fullmatch(r"   statistics: layer \d of 3, \d\d:\d\d left", line) for line in said)


def test_lines_come_seldom() -> None:
    said: list[str] = []
    list(meter(said, every_s=30).along(range(1000), total=1000))
    assert not said


def test_the_other_ranks_say_nothing() -> None:
    said: list[str] = []
    assert list(meter(said, shows=False, terminal=True).along(range(5), total=5)) == list(range(5))
    assert not said


# ── a real terminal ────────────────────────────────────────────────────────────────────────────────────────


def program(columns: str, *words: str) -> int:
    return on_terminal(columns, lambda: main(words))


def slow_phase(columns: str) -> int:
    def work() -> int:
        def look(b: Batch) -> int:
            time.sleep(0.25)
            return len(b.images)

        list(Meter(print, name="a phase with too long a name").along([batch(4)] * 3, total=3000, images=look))
        return 0

    return on_terminal(columns, work)


def on_terminal(columns: str, work: Callable[[], int]) -> int:
    """Work on a terminal so wide; what is drawn there goes to the standard output."""
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, int(columns), 0, 0))
        os._exit(work())
    parts = []
    while True:
        try:
            parts.append(os.read(terminal, 1 << 16))
        except OSError:  # its end
            break
    seen = b"".join(parts).replace(b"\r\n", b"\n").replace(b"\r", OVER.encode())
    sys.stdout.buffer.write(seen)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def drawn(bench: Bench, folder: Path, columns: int, **environ: str) -> str:
    words = bench.words(folder, correct="regression", calibrate_images=16, measure_sites=True, epochs=1)
    function = "tests.reporting.test_progress:program"
    return bench.commands.succeed(columns, *words, ranks=0, function=function, **environ).out


def test_a_terminal_of_60_columns_has_one_bar_that_fits_and_no_colours(bench: Bench, tmp_path: Path) -> None:
    out = drawn(bench, tmp_path / "run", 60, TERM="xterm", NO_COLOR="1")
    bars = [part for part in re.split(rf"[{OVER}\n]", out) if " left" in part and "|" in part]
    assert bars and all(len(bar) <= 60 for bar in bars)
    for phase in ("baseline", "statistics", "evaluate projected", "measure sites", "correction", "finetune"):
        assert any(bar.startswith(phase) for bar in bars), phase
    assert any(bar.startswith("finetune 0/10 |") for bar in bars)
    assert "\x1b[3" not in out and "\x1b[9" not in out
    assert " left" not in (tmp_path / "run" / "log.txt").read_text(), "bars are not for the log"


def test_a_bar_shows_place_time_left_and_rate_and_goes_away() -> None:
    done = shared_commands().succeed(
        60, ranks=0, function="tests.reporting.test_progress:slow_phase", TERM="xterm"
    )
    *_, last, gone, end = done.out.split(OVER)
    assert re.fullmatch(r"a phase with too long… 3/3000 \|.+\| \d\d:\d\d left, 1\d images/s *", last)
    assert len(last) <= 60 and gone.strip() == end == ""


def test_a_terminal_that_cannot_draw_over_a_line_gets_no_bar() -> None:
    done = shared_commands().succeed(60, ranks=0, function="tests.reporting.test_progress:slow_phase", TERM="dumb")
    assert done.out == ""
