"""Flags whose value is more than a number, parsed from text; and the error for invalid settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class ConfigError(ValueError):
    """An invalid setting; the message names the flag."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """What may have been meant by a name that is not known: close ones as a question, or `otherwise`."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def require(holds: bool, message: str) -> None:
    """Raise a ConfigError with the message unless something holds."""
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class Rule:
    """A parsed `--ranks`: `uniform`, `energy`, `budget` (`of` macs, params or latency), `file` or `sites`.

    `file` is a plan's, `listed` are sites, their forms and their ranks.
    """

    kind: str
    amount: float = 0.0
    file: Path = Path()
    of: str = ""
    listed: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on spectra."""
        return self.kind in ("energy", "budget")

    @property
    def is_counted(self) -> bool:
        """Whether it is a budget of what is counted, not timed: channels can go for it, too."""
        return self.kind == "budget" and self.of != "latency"

    @property
    def text(self) -> str:
        """As it is given on the command line."""
        if self.kind == "sites":
            return "sites:" + ",".join(map(_listed_text, self.listed))
        amount = f"{self.of}={self.amount:g}" if self.of else f"{self.amount:g}"
        return str(self.file) if self.kind == "file" else f"{self.kind}:{amount}"


BUDGETS = ("macs", "params", "latency")
FORMS = ("output", "input", "vertical", "horizontal", "tucker")  # what a site can become; see factorization.forms


def parse_forms(text: str) -> tuple[str, ...]:
    """Read a list of forms: `all`, or names separated by commas; `dense` may be among them, as sites may stay so.

    `dense` alone is no form at all.

    Raises:
        ConfigError: unknown names, close ones are offered; or no names.
    """
    if text in ("all", "dense"):
        return FORMS if text == "all" else ()
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "dense")]
    require(bool(names), f"--forms {text}: expected auto, all, or some of {', '.join(FORMS)}")
    for name in names:
        hint = did_you_mean(name, FORMS, f"forms: {', '.join(FORMS)}")
        require(name in FORMS, f"--forms {text}: unknown form {name!r}; {hint}")
    return tuple(form for form in FORMS if form in names)


def parse_rule(text: str) -> Rule:
    """Read `--ranks`.

    Raises:
        ConfigError: neither a rule nor a file; a ratio outside (0, 1].
    """
    kind, _, amount = text.partition(":")
    if kind in ("uniform", "energy"):
        return Rule(kind, _ratio(amount, f"--ranks {text}"))
    if kind == "budget":
        require("," not in amount, f"--ranks {text}: several budgets, expected one; runs of the program take more")
        of, _, amount = amount.partition("=")
        known = ", ".join(f"budget:{name}=0.5" for name in BUDGETS)
        require(of in BUDGETS, f"--ranks {text}: a budget of {of!r} is not known; expected {known}")
        return Rule(kind, _ratio(amount, f"--ranks {text}"), of=of)
    if kind == "sites":
        return Rule(kind, listed=_listed(amount, f"--ranks {text}"))
    rules = "uniform:RATIO, energy:RATIO, budget:macs=RATIO or sites:NAME=RANK, such as uniform:0.5"
    require(Path(text).is_file(), f"--ranks {text}: expected {rules}, or a plan file")
    return Rule("file", file=Path(text))


def budgets_of(text: str) -> tuple[str, ...]:
    """The rules of a family, `budget:macs=0.8,0.5`, the least first; none where `--ranks` is a single rule.

    Raises:
        ConfigError: a share that is no budget, or comes twice.
    """
    kind, _, amount = text.partition(":")
    if kind != "budget" or "," not in amount:
        return ()
    of, _, shares = amount.partition("=")
    where = f"--ranks {text}: expected shares of one kind, such as budget:macs=0.8,0.5"
    try:
        rules = [parse_rule(f"budget:{of}={share.strip()}") for share in shares.split(",")]
    except ConfigError as error:
        raise ConfigError(f"{where}; {error}") from error
    amounts = [rule.amount for rule in rules]
    require(len(set(amounts)) == len(amounts), f"{where}, each once")
    return tuple(rule.text for rule in sorted(rules, key=lambda rule: rule.amount))


def _listed_text(listed: tuple[str, str, tuple[int, ...]]) -> str:
    name, form, ranks = listed
    return f"{name}={'' if form == 'output' else form + ':'}{'x'.join(map(str, ranks))}"


def _listed(text: str, where: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """`NAME=8`, `NAME=vertical:8` or `NAME=tucker:8x16`, separated by commas."""
    found = []
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        form, _, numbers = value.rpartition(":")
        ranks = numbers.split("x")
        require(
            bool(name) and all(rank.isdecimal() for rank in ranks),
            f"{where}: expected sites:NAME=RANK,NAME=RANK with whole numbers, or NAME=FORM:RANK, such as "
            f"NAME=tucker:8x16; got {pair!r}",
        )
        found.append((name, form or "output", tuple(map(int, ranks))))
    require(len(found) == len({name for name, _, _ in found}), f"{where}: a site is named twice")
    return tuple(found)


def _ratio(text: str, where: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is not a number; expected a ratio such as 0.5") from None
    require(0 < ratio <= 1, f"{where}: a ratio must be above 0 and at most 1, got {text}")
    return ratio


@dataclass(frozen=True)
class Distillation:
    """A parsed `--distill`: the weight `alpha` of the dense network's softmax at `temperature` in the loss."""

    alpha: float
    temperature: float


def parse_distillation(text: str) -> Distillation | None:
    """Read `--distill`: None for `none`.

    Raises:
        ConfigError: neither none nor ALPHA,T with 0 < ALPHA ≤ 1 and T > 0.
    """
    if text == "none":
        return None
    alpha, _, temperature = text.partition(",")
    try:
        found = Distillation(float(alpha), float(temperature))
    except ValueError:
        raise ConfigError(f"--distill {text}: expected ALPHA,T such as 0.5,2, or none") from None
    sound = 0 < found.alpha <= 1 and 0 < found.temperature < float("inf")
    require(sound, f"--distill {text}: expected 0 < ALPHA ≤ 1 and a temperature T above 0")
    return found


def parse_arch(arch: str) -> tuple[str, str]:
    """`path/to/file.py:function` as path and function; no function if there is none."""
    path, _, function = arch.rpartition(":")
    return (path, function) if path.endswith(".py") else (arch, "")


def is_from_file(arch: str) -> bool:
    """Whether an architecture is given as a file."""
    return parse_arch(arch)[0].endswith(".py")
