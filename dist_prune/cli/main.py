"""The command line: read the words, run, and turn expected errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_prune.config.help import Usage
from dist_prune.config.recipe_files import to_toml
from dist_prune.config.recipes import LOCAL, given, parse
from dist_prune.config.run import Run
from dist_prune.data.pretrained_images import adapted
from dist_prune.distributed.launch_env import find_launch_env
from dist_prune.distributed.preemption import PREEMPTED, STUCK, NoProgressError, Preempted
from dist_prune.distributed.world import RankError
from dist_prune.pipeline import WorkError, run
from dist_prune.training.evaluate import EvaluationError
from dist_prune.training.trainer import TrainingError
from dist_prune.utils.console import adapt_output
from dist_prune.utils.files import CheckpointError, write_text

FIRST_WORD_S = 1.0  # torchrun ends every rank as soon as one has ended: rank 0 must print its error before


def main(arguments: Sequence[str] | None = None, program: Usage = LOCAL) -> int:
    """Run what the words say; the exit code, see `exit_code`."""
    words = sys.argv[1:] if arguments is None else arguments
    with exit_code() as status:
        config = adapted(parse(words, not status.first, program), given(words))
        if config.save_recipe is None:
            run(config)
        elif status.first:
            save_recipe(config.save_recipe, config)
    return status.code


def save_recipe(path: Path, config: Run) -> None:
    """Write the settings into a file that can be given as a recipe.

    Raises:
        CheckpointError: the file is there already, or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"--save-recipe {path}: is there already; name another file, or remove it")
    write_text(path, to_toml(config))
    print(f"written to {path}: give it in place of a recipe's name")


@dataclass
class ExitStatus:
    """Whether this is rank 0, and the exit code that the work came to."""

    first: bool = True
    code: int = 0


@contextmanager
def exit_code() -> Iterator[ExitStatus]:
    """While open, expected errors become one line and an exit code.

    0 done, 1 failed while working, 2 could not start as asked, 75 stopped because a signal asked to (started
    again, it resumes), 3 was restarted three times and made no progress.

    An error that all ranks share is printed by rank 0; what a rank hears of another's, it prints itself.
    """
    status = ExitStatus()
    adapt_output(os.environ)
    try:
        status.first = find_launch_env(os.environ).rank == 0
        yield status
    except Preempted as reason:
        status.code = _failed(reason, PREEMPTED, status.first)
    except NoProgressError as error:
        status.code = _failed(error, STUCK, status.first)
    except RankError as error:
        status.code = _failed(error, 1)
    except ValueError as error:
        status.code = _failed(error, 2, status.first)
    except (CheckpointError, EvaluationError, TrainingError, WorkError, OSError) as error:
        status.code = _failed(error, 1, status.first)


def _failed(error: Exception, code: int, speaks: bool = True) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun ends all once one has ended: each keeps its exit code
    if speaks:
        kind = "stopped" if code == PREEMPTED else "error"
        print(f"{kind}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(FIRST_WORD_S)
    return code
