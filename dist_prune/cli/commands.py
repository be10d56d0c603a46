"""The program `dist-prune`: a command, then its words. What a command needs is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from io import StringIO
from operator import or_
from typing import Annotated, Any

import tyro

from dist_prune.cli import main as cli
from dist_prune.config.flags import ConfigError, did_you_mean
from dist_prune.config.help import Usage
from dist_prune.config.recipes import RECIPES
from dist_prune.utils.console import columns, hanging


@dataclass(frozen=True)
class Command:
    """A word after `dist-prune`.

    `work` takes the words that follow and returns the exit code; errors it raises become one line, see
    `cli.exit_code`. `flags` names the dataclass of its flags, `module:class`, for shells to complete.
    """

    help: str
    work: Callable[[Sequence[str]], int]
    flags: str = ""


def later(module: str) -> Callable[[Sequence[str]], int]:
    """`main` of a module that is imported when it is called."""
    return lambda words: int(_named(f"{module}:main")(words))


def _named(where: str) -> Any:  # noqa: ANN401  any object
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def run(words: Sequence[str]) -> int:
    """`run` of the pipeline, on this rank."""
    return cli.main(words, RUN)


def plan(words: Sequence[str]) -> int:
    """The dry run of these words: no data, no weights."""
    return cli.main([*words, "--dry-run"], PLAN)


def completion(words: Sequence[str]) -> int:
    """Print a script that completes commands, flags and their values in a shell.

    Raises:
        ConfigError: not a shell that is known.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"completion {' '.join(words)}: expected one of {', '.join(SHELLS)}")
    kinds: list[Any] = [
        Annotated[_named(command.flags), tyro.conf.subcommand(name, prefix_name=False)]
        for name, command in COMMANDS.items()
        if command.flags
    ]
    script = StringIO()
    with suppress(SystemExit), redirect_stdout(script):
        tyro.cli(reduce(or_, kinds), prog="dist-prune", args=["--tyro-print-completion", words[0]])
    for line in script.getvalue().splitlines():
        print(line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC") else line)  # shells end words there
    return 0


SHELLS = ("bash", "zsh", "fish")
RUN_FLAGS = "dist_prune.config.run:Run"
COMMANDS = {
    "run": Command("compress a network: [RECIPE] [FLAGS]; several ranks through torchrun", run, RUN_FLAGS),
    "plan": Command("show what `run` would do to each layer; reads no data and no weights", plan, RUN_FLAGS),
    "check": Command(
        "check environment, folders, images and weights before a run", later("dist_prune.cli.check"), RUN_FLAGS
    ),
    "pack": Command(
        "write images into tar shards, which are read faster",
        later("dist_prune.cli.pack"),
        "dist_prune.cli.pack:Packing",
    ),
    "report": Command(
        "draw a run's page, or one over several runs",
        later("dist_prune.cluster.report_command"),
        "dist_prune.cluster.report_command:Reporting",
    ),
    "compare": Command(
        "finished runs side by side",
        later("dist_prune.reporting.compare"),
        "dist_prune.reporting.compare:Comparison",
    ),
    "export": Command(
        "export a run's network: ONNX, torch.export, …",
        later("dist_prune.export.command"),
        "dist_prune.export.command:Export",
    ),
    "speed": Command(
        "size and latency of dense and compressed, per site",
        later("dist_prune.export.speed_command"),
        "dist_prune.export.speed_command:Timed",
    ),
    "completion": Command("bash, zsh or fish: print a script to be sourced", completion),
}

RUN = Usage(
    "dist-prune run",
    "Compress a network: load, collect statistics, choose ranks, project, correct, fine-tune, evaluate, save.",
    (
        "torchrun --nproc-per-node 8 --no-python dist-prune run cifar10 --data DIR --weights FILE",
        "dist-prune run digits --ranks budget:macs=0.5 --save-recipe mine.toml",
        "dist-prune run mine.toml --epochs 5",
    ),
)
PLAN = Usage(
    "dist-prune plan",
    "Show what `run` with the same words would do to each layer. Reads no data and no weights.",
    (
        "dist-prune plan resnet18-imagenet --ranks budget:macs=0.5",
        "dist-prune plan --arch net.py:build --classes 10 --crop 64 --ranks uniform:0.25",
    ),
)

EXAMPLES = (
    "dist-prune plan resnet18-imagenet --ranks budget:macs=0.5",
    "torchrun --standalone --nproc-per-node 2 --no-python dist-prune run digits",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the first word says with the words after it; the exit code, see `cli.exit_code`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with cli.exit_code() as status:
        if words and words[0] not in ("-h", "--help"):
            status.code = find(words[0]).work(words[1:])
        elif status.first:
            print(overview(columns()))
    return status.code


def find(name: str) -> Command:
    """The command of that name.

    Raises:
        ConfigError: there is none; close ones are offered.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    if name in RECIPES:
        raise ConfigError(f"{name!r} is a recipe, not a command: dist-prune run {name}")
    hint = did_you_mean(name, COMMANDS, f"commands: {', '.join(COMMANDS)}")
    raise ConfigError(f"unknown command {name!r}; {hint}")


def overview(width: int) -> str:
    """What `dist-prune` alone prints, at most so many columns wide; examples are not broken."""
    indent = max(map(len, COMMANDS)) + 4
    return "\n".join(
        [
            "usage: dist-prune COMMAND …\n\nReplaces layers of a trained network by low-rank pairs.\n\ncommands",
            *(hanging(f"  {name}", command.help, indent, width) for name, command in COMMANDS.items()),
            f"\nrecipes\n{hanging('', ', '.join(RECIPES), 2, width)}",
            "\nexamples",
            *(f"  {example}" for example in EXAMPLES),
            "\n`dist-prune COMMAND --help` says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
