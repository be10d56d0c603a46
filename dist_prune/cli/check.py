"""`dist-prune check`: environment, folders, images, weights and plan of a run, checked before it is queued."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from dist_prune.cli import folders, machine
from dist_prune.cli.findings import Finding, Verdict, agreed, shown
from dist_prune.cli.inputs import Inputs
from dist_prune.config.help import Usage
from dist_prune.config.recipes import given, parse
from dist_prune.config.run import Run
from dist_prune.data.pretrained_images import adapted
from dist_prune.distributed.launch_env import find_launch_env
from dist_prune.distributed.world import RankError, World, joined
from dist_prune.utils.console import columns

CHECK = Usage(
    "dist-prune check",
    "Check all that `run` with the same words will need: versions, devices, ranks, DALI, folders, images, "
    "weights, statistics, the plan. Exit code 1 if anything fails.",
    (
        "dist-prune check resnet18-imagenet --data /imagenet --run-dir /shared/runs/first",
        "srun --nodes 2 --ntasks-per-node 8 dist-prune check resnet18-imagenet --data /imagenet",
    ),
)
Look = Callable[[], Iterator[Finding]]


def main(words: Sequence[str]) -> int:
    """Look at everything; 1 if anything fails, else 0."""
    first = find_launch_env(os.environ).rank == 0
    config, verdicts = adapted(parse(words, not first, CHECK), given(words)), set[Verdict]()
    with joined(config.device, config.timeout) as world:
        for subject, look in looks(config, world).items():
            for finding in agreed(looked(subject, look), world):
                verdicts.add(finding.verdict)
                if first:
                    print(shown(finding, columns()), flush=True)
    if first:
        print("something fails: a run would end" if "fail" in verdicts else "ready")
    return int("fail" in verdicts)


def looks(config: Run, world: World) -> dict[str, Look]:
    """What is looked at, in order; to be called on all ranks."""
    inputs = Inputs(config, world)
    outside = {
        "packages": machine.packages,
        "device": machine.devices,
        "ranks": machine.ranks,
        "DALI": machine.decoding,
        "space": folders.space,
        "run directory": folders.run_folder,
        "shared folder": folders.shared,
    }
    found: dict[str, Look] = {name: partial(look, config, world) for name, look in outside.items()}
    return found | {"images": inputs.images, "weights": inputs.weights, "plan": inputs.plan}


def looked(subject: str, look: Look) -> list[Finding]:
    """What a look finds on this rank; an error that ends it is a finding, too."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except RankError:
        raise
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        found.append(Finding(subject, "fail", str(error)))
    return found
