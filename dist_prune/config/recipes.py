"""The named recipes, and a run read from a command line: a recipe's name, then flags over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from dist_prune.config.compression import CompressionConfig, MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import ConfigError, did_you_mean
from dist_prune.config.help import Usage, page
from dist_prune.config.images import Augment, DataConfig, ImageSpec
from dist_prune.config.recipe_files import is_file, keys_of, read_recipe
from dist_prune.config.run import NetworkConfig, Run
from dist_prune.config.training import IterationConfig, TrainingConfig, TuningConfig
from dist_prune.utils.console import columns

_SMALL = DataConfig(image=ImageSpec(resize=0, crop=32), threads=2, eval_batch_size=256)

RECIPES: dict[str, Run] = {
    "digits": Run(
        NetworkConfig("resnet18", "none", 10),
        replace(_SMALL, data="digits", augment=Augment(flip=False, pad=2)),
        CompressionConfig(sites="@conv"),
        tuning=TuningConfig(epochs=2, batch_size=32, lr=0.02),
        pretrain=TrainingConfig(epochs=6, batch_size=32, lr=0.1),
    ),
    "mnist": Run(
        NetworkConfig("mnist", "none", 10),
        DataConfig(
            image=ImageSpec(resize=0, crop=28, mean=(0.1307,) * 3, std=(0.3081,) * 3),
            augment=Augment(flip=False, pad=2),
            threads=2,
            eval_batch_size=256,
        ),
        CompressionConfig(ranks="sites:conv1=8,conv2=32,fc1=64"),
        tuning=TuningConfig(epochs=2, batch_size=64, lr=0.02),
        pretrain=TrainingConfig(epochs=4, batch_size=64, lr=0.05),
    ),
    "cifar10": Run(
        NetworkConfig("resnet20", "none", 10),
        _SMALL,
        CompressionConfig(MethodConfig(statistics_images=10_000), sites="@stride1"),
        tuning=TuningConfig(epochs=2, batch_size=64, lr=0.02),
    ),
    "resnet18-imagenet": Run(
        NetworkConfig("resnet18", "IMAGENET1K_V1", 1000),
        DataConfig(threads=8, eval_batch_size=256),
        CompressionConfig(sites="@stride1"),
        CorrectionConfig(calibrate_images=10_000),
        tuning=TuningConfig(epochs=3, batch_size=128, lr=0.02, bf16=True, distill="0.9,4"),
        channels_last=True,
    ),
}
RECIPES["resnet50-imagenet"] = replace(
    RECIPES["resnet18-imagenet"], network=NetworkConfig("resnet50", "IMAGENET1K_V2", 1000)
)
RECIPES["resnet18-imagenet-iterative"] = replace(
    RECIPES["resnet18-imagenet"], iteration=IterationConfig(step=0.98, tune_epochs=1)
)


LOCAL = Usage("launch/local.py", "Compress a network.", ("launch/local.py cifar10 --data DIR --weights FILE",))


def parse(arguments: Sequence[str], quiet: bool = False, program: Usage = LOCAL) -> Run:
    """A run from command-line words: an optional recipe (name or TOML file) first, then flags over it.

    Args:
        arguments: without the program's name.
        quiet: print neither help nor errors (all ranks but the first).
        program: who asks, for help.

    Raises:
        ConfigError: an unknown recipe (close ones offered), or an invalid setting.
        SystemExit: 0 after help, 2 after a flag that is unknown or of the wrong type.
    """
    words = list(arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "digits"
    default = replace(find(name), recipe=Path(name).stem)
    if {"-h", "--help"} & {*words}:
        if not quiet:
            print(page(program, default, [*RECIPES], columns()))
        raise SystemExit(0)
    words = ["--help" if word == "--help-all" else word for word in words]
    return tyro.cli(
        Run,
        args=words,
        prog=program.name,
        default=default,
        description=f"{program.about} Recipe {name}.",
        console_outputs=not quiet,
    )


def find(name: str) -> Run:
    """The recipe of that name, or in that file.

    Raises:
        ConfigError: there is none; close ones are offered.
    """
    if is_file(name):
        return read_recipe(Path(name), RECIPES)
    if name in RECIPES:
        return RECIPES[name]
    hint = did_you_mean(name, RECIPES, f"recipes: {', '.join(RECIPES)}, or a .toml file")
    raise ConfigError(f"unknown recipe {name!r}; {hint}")


def given(arguments: Sequence[str]) -> set[str]:
    """The flags, without dashes, that these words set themselves, or a recipe's file among them."""
    flags = {word[2:].partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    return flags | (keys_of(Path(arguments[0])) if arguments and is_file(arguments[0]) else set())
