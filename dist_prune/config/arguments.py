"""Settings as a Python program gives them: numbers, mappings, plans; and errors that name arguments, not flags."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dist_prune.config.flags import ConfigError

_FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_NUMBER = re.compile(r"\d*\.\d+")
_OTHERWISE = {  # flags of runs that a program gives in another way
    "statistics-images": "the number of images in `batches`",
    "weights": "the network's weights",
    "arch": "the network",
    "crop": "the images' size",
}


def as_rule(ranks: Any) -> str:  # noqa: ANN401  what people give
    """`ranks` as `--ranks` has it.

    Args:
        ranks: a rule or a plan's file as text, a share of the MACs, a Plan, or a mapping from sites to ranks: 8,
            or with a form, "vertical:8" and "tucker:8x16".

    Raises:
        ConfigError: anything else.
    """
    if isinstance(ranks, str | os.PathLike):
        text = os.fspath(ranks)
        return f"budget:macs={text}" if _NUMBER.fullmatch(text) else text
    if isinstance(ranks, float):
        return f"budget:macs={float(ranks)!r}"
    factored = getattr(ranks, "factored", None)  # of a Plan, which a room above this one knows
    listed = ranks if factored is None else {site: _with_form(choice) for site, choice in factored.items()}
    if not isinstance(listed, Mapping):
        raise ConfigError(
            f"--ranks {ranks!r}: expected a share of the multiply-adds such as 0.5, a mapping {{site: rank}}, "
            f"a Plan, or a rule such as 'uniform:0.5' or 'budget:params=0.5'"
        )
    if not listed:
        raise ConfigError("--ranks: no site is given a rank, so that nothing would be compressed")
    try:
        return "sites:" + ",".join(
            f"{site}={rank if isinstance(rank, str) else operator.index(rank)}" for site, rank in listed.items()
        )
    except TypeError as error:
        text = "expected whole numbers, or a form with its ranks, such as 'tucker:8x16'"
        raise ConfigError(f"--ranks {dict(listed)}: {text} ({error})") from error


def _with_form(choice: Any) -> str:  # noqa: ANN401  a Choice
    return f"{choice.form}:{'x'.join(map(str, choice.ranks))}"


def as_patterns(sites: str | Sequence[str]) -> str:
    """`sites` as `--sites` has it: one text, or several names and patterns."""
    return sites if isinstance(sites, str) else ",".join(sites)


def require_one_of(name: str, given: object, possible: Sequence[str]) -> None:
    """Refuse what is not possible.

    Raises:
        ConfigError: names the argument and lists what is.
    """
    if given not in possible:
        raise ConfigError(f"{name} is {given!r}; expected one of {', '.join(map(repr, possible))}")


def naming_arguments(text: str) -> str:
    """A message of the package for a program: flags become the arguments of the same names."""
    return _FLAG.sub(lambda flag: _OTHERWISE.get(flag[1], flag[1].replace("-", "_")), text)


@contextmanager
def arguments_named() -> Iterator[None]:
    """While open, the package's errors name arguments."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.startswith("dist_prune.") and len(error.args) == 1:
            error.args = (naming_arguments(str(error)),)
        raise
