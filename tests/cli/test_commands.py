"""The program `dist-prune`: its overview, its commands, and what is said when there is none of that name."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from dist_prune.cli.commands import COMMANDS, find, main, overview
from dist_prune.config.flags import ConfigError
from dist_prune.config.recipes import RECIPES
from dist_prune.config.settings import settings
from tests.commands import PROGRAM, ROOT
from tests.runs import Bench


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_program_alone_says_what_it_can(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert all(name in shown for name in RECIPES)


@pytest.mark.parametrize("columns", [60, 100])
def test_the_overview_fits_a_screen(columns: int) -> None:
    lines = overview(columns).splitlines()
    assert len(lines) <= 50
    assert all(len(line) <= columns for line in lines if not line.startswith(("  dist-prune", "  torchrun")))


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("plann", "unknown command 'plann'; did you mean plan?"),
        ("xyzzy", "unknown command 'xyzzy'; commands: run, plan"),
        ("digits", "'digits' is a recipe, not a command: dist-prune run digits"),
    ],
)
def test_an_unknown_command_gets_close_ones(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        find(word)
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {answer}")


def test_the_installed_program_is_this_one() -> None:
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["dist-prune"]
    module, _, function = target.partition(":")
    assert getattr(import_module(module), function) is main


def test_plan_shows_any_network_without_data_and_weights(bench: Bench) -> None:
    words = ["--arch", f"{bench.network}:tiny", "--classes", 4, "--crop", 16, "--ranks", "uniform:0.25"]
    done = bench.commands.succeed("plan", "cifar10", *words, function=PROGRAM, ranks=0)
    assert "4/16" in done.out and "MACs" in done.out


def test_run_is_what_launch_local_does(bench: Bench) -> None:
    done = bench.commands("run", "cifar10", function=PROGRAM, ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and "--data DIR is missing" in done.errors[0]


# ── help ───────────────────────────────────────────────────────────────────────────────────────────────────


def help_of(command: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with contextlib.suppress(SystemExit):
        main([command, *words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "completion"])
def test_help_fits_a_screen_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = help_of(command, capsys)
    assert len(shown.splitlines()) <= 50
    assert shown.startswith(f"usage: dist-prune {command} ")
    assert shown.count(f"dist-prune {command} ") > 1, "no example"
    assert all(len(line) <= 102 for line in shown.splitlines())


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_values_of_the_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("run", capsys, recipe)
    run = RECIPES[recipe]
    assert f"--arch {run.network.arch} " in shown and f"--crop {run.images.image.crop} " in shown
    assert f"values are those of recipe {recipe}" in " ".join(shown.split()).replace("Values", "values")


def test_help_all_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help-all"])
    shown = capsys.readouterr().out
    assert [flag for flag in settings() if not re.search(rf"--{re.escape(flag)}[ ,\n]", shown)] == ["recipe"]


def test_every_setting_has_a_text() -> None:
    assert [flag for flag, setting in settings().items() if not setting.text] == ["recipe"]


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}, {"TERM": "xterm"}])
def test_colours_only_where_they_are_wanted(environ: dict[str, str]) -> None:
    """What an unknown flag is answered on a terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.pop("NO_COLOR", None)
        os.environ.update(environ)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  the terminal
        os._exit(quietly(["run", "--epoch", "3"]))
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while part := os.read(terminal, 4096):
            shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert b"--epochs" in shown
    assert (b"\x1b[" in shown) == (environ == {"TERM": "xterm"})


def quietly(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# ── shells ─────────────────────────────────────────────────────────────────────────────────────────────────

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_tyro_dist_prune
echo "${COMPREPLY[@]}"
"""


def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        ask = ["bash", "-c", ASK, "bash", str(tmp_path / "script"), "dist-prune", *words]
        return subprocess.run(ask, check=True, capture_output=True, text=True, timeout=30).stdout.split()

    assert {"run", "plan", "check", "compare"} <= {*completed("")}
    assert completed("run", "--method", "fi") == ["fisher"]
    assert {*completed("plan", "--statis")} == {
        "--statistics",
        "--statistics-bf16",
        "--statistics-float32",
        "--statistics-images",
        "--statistics-views",
    }
    assert completed("run", "--loss-im") == ["--loss-images"], "its help has several lines"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_knows_the_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "statistics-images" in script and "compare" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n", "/dev/stdin"], input=script, text=True, check=True, timeout=30)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err


# ── where nothing can be written ───────────────────────────────────────────────────────────────────────────


def test_a_place_that_cannot_be_written_is_refused_before_the_images_are_looked_at(
    bench: Bench, tmp_path: Path
) -> None:
    words = bench.words(Path("/proc/nowhere/run"), data=tmp_path)
    done = bench.commands("run", *words, function=PROGRAM, ranks=2)
    assert done.codes == [1, 1]
    assert len(done.errors) == 1 and "/proc/nowhere/run: could not be written" in done.errors[0]
    assert "--run-dir" in done.errors[0]
