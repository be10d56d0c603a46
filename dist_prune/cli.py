"""The command line: read the words, run, and turn expected errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dist_prune.checkpoint import CheckpointError
from dist_prune.config import parse
from dist_prune.pipeline import run
from dist_prune.world import RankError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the words say; the exit code: 0 done, 1 failed while working, 2 could not start as asked."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        run(parse(words, quiet=os.environ.get("RANK", "0") != "0"))
    except ValueError as error:
        return _failed(error, 2)
    except (CheckpointError, RankError) as error:
        return _failed(error, 1)
    return 0


def _failed(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
