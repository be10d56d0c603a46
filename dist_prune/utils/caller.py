"""The process of who calls the package from Python: its state is left alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from tqdm import tqdm


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """While open, neither inference mode, autocast nor compiled code of the caller's; random state is put back."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # Compiled code would not see hooks. Without dynamo, which takes long to import, none has been compiled.
        compiled = "torch._dynamo" in sys.modules
        stack.enter_context(torch.compiler.set_stance("force_eager") if compiled else nullcontext())
        yield


@contextmanager
def bar(total: int, name: str, unit: str, progress: bool | None, shows: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal or `progress` asks for it; lends what makes a step."""
    hidden = True if not shows else None if progress is None else not progress
    with tqdm(total=total, desc=name, unit=unit, disable=hidden, file=sys.stderr, leave=False) as shown:
        yield partial(shown.update, 1)


def warn(text: str) -> None:
    """Warn the caller of this package, wherever in it this is called from."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(("dist_prune.", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
