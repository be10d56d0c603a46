"""A file's weights into a network: the mapping and the names that fit are searched for, and said.

Loading goes through the network's own hooks, with the versions of a file's modules, as `load_state_dict` does.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dist_prune.network.checkpoint_files import Candidate, read_candidates
from dist_prune.network.errors import ModelError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTED = "num_batches_tracked"
BOOKKEEPING = re.compile(r"(.*\.)?(total_ops|total_params|n_averaged)")  # thop's counts, and AveragedModel's
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads in torchvision's files, not in the networks built here
# Names that torchvision's densenets had before names of modules could have no dots.
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# Where several mappings fit: a running average, which is what one evaluates, then the usual names.
AVERAGE = re.compile(r"(^|[^a-z])ema([^a-z]|$)")
USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "params", "weights")


@dataclass(frozen=True)
class Fit:
    """How the names of a candidate become those of the network.

    Attributes:
        candidate: the mapping.
        prefix: that its names have, and the network's do not.
        names: the candidate's → the network's, of those that fit.
        rivals: other prefixes under which as many fit.
    """

    candidate: Candidate
    prefix: str
    names: Mapping[str, str]
    rivals: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The last key on the way to the mapping."""
        return self.candidate.place[-1] if self.candidate.place else ""

    @property
    def standing(self) -> int:
        """Before others that fit as well, the smaller."""
        if any(AVERAGE.search(key.lower()) for key in self.candidate.place):
            return 0
        return 1 + (USUAL.index(self.label) if self.label in USUAL else len(USUAL))


def load_file(model: nn.Module, path: Path, what: str) -> str:
    """Copy a file's weights into the network; what was taken, in words, empty where the names fit as they are.

    Args:
        model: changed in place.
        path: of a file as `read_candidates` takes it.
        what: for messages, such as "--weights FILE into --arch NAME".

    Raises:
        ModelError: the file has no weights, or not this network's.
    """
    own = model.state_dict()
    fits = [_fit(candidate, own) for candidate in read_candidates(path)]
    most = max(len(fit.names) for fit in fits)
    best = sorted((fit for fit in fits if len(fit.names) == most), key=lambda fit: fit.standing)
    chosen, others = best[0], best[1:]
    if most and others and chosen.standing == others[0].standing:
        both = " and ".join(repr(".".join(fit.candidate.place)) for fit in best[:2])
        raise ModelError(f"{what}: {both} fit alike; save the one that is meant alone")
    if most and chosen.rivals:
        both = " and ".join(map(repr, (chosen.prefix, *chosen.rivals[:1])))
        raise ModelError(f"{what}: names under {both} fit alike; save the ones that are meant alone")
    aside = _load(model, chosen, what)
    return _said(path, chosen, others, aside)


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict whose names are the network's own.

    Raises:
        ModelError: names missing, left over or of another shape; up to four of each are named.
    """
    candidate = Candidate((), state, getattr(state, "_metadata", None))
    _load(model, Fit(candidate, "", {name: name for name in state}), what)


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────


def _fit(candidate: Candidate, own: Collection[str]) -> Fit:
    """The names that fit under the prefix that makes most of them fit; no prefix where that does as well."""
    known = {_bare(name): name for name in own}
    if len(known) < len(own):  # a wrapper's name tells two of the network's own parts apart
        known = {name: name for name in own}
    places: dict[str, dict[str, str]] = {"": {}}
    exact: Counter[str] = Counter()
    for name in candidate.tensors:
        for prefix, rest in _splits(name):
            target = rest if rest in own else known.get(_bare(_modern(rest)))
            if target is not None:
                places.setdefault(prefix, {}).setdefault(target, name)
                exact[prefix] += rest == target
    # A child that is really called `module` keeps its name: where two do as well, the shortest prefix wins.
    worth = {prefix: (len(found), exact[prefix]) for prefix, found in places.items()}
    best, *others = sorted(places, key=lambda prefix: (*(-n for n in worth[prefix]), len(prefix)))
    rivals = tuple(prefix for prefix in others if best and worth[prefix] == worth[best])
    return Fit(candidate, best, {name: target for target, name in places[best].items()}, rivals)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name as prefix and rest, at every dot."""
    parts = name.split(".")
    for place in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:place]), ".".join(parts[place:])


def _bare(name: str) -> str:
    """Without the names that wrappers put in between."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _modern(name: str) -> str:
    return DENSENET.sub(r"\1\2", name)


# ── tensors ────────────────────────────────────────────────────────────────────────────────────────────────


def _load(model: nn.Module, fit: Fit, what: str) -> list[str]:
    """Load what fits, through the network's hooks; the entries that were left aside.

    Raises:
        ModelError: something of the network is missing, or something is left over that is no bookkeeping.
    """
    own, aside = dict(model.state_dict()), []
    state: OrderedDict[str, Any] = OrderedDict()
    for name, value in fit.candidate.entries.items():
        if name in fit.names:
            state[fit.names[name]] = value
        elif isinstance(value, Tensor) and name.startswith(fit.prefix) and not _is_aside(name, value, fit.prefix):
            state[name.removeprefix(fit.prefix)] = value  # a hook may know it, or it does not belong here
        elif isinstance(value, Tensor) and not name.startswith(AUXILIARY):
            aside.append(name)
    problems = _refusals(model, own, state, fit)
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {k}: {', '.join(v[:4])}" for k, v in problems.items() if v)
        raise ModelError(f"{what}: the checkpoint is of another architecture ({text})")
    return aside


def _is_aside(name: str, value: Tensor, prefix: str) -> bool:
    """Whether an entry is no weight: a counter of steps, an operation count, a head that only training has."""
    rest = name.removeprefix(prefix)
    counter = value.numel() == 1 and ("." not in rest or not value.is_floating_point())
    return counter or BOOKKEEPING.fullmatch(rest) is not None or rest.startswith(AUXILIARY)


def _refusals(
    model: nn.Module, own: Mapping[str, Tensor], state: OrderedDict[str, Any], fit: Fit
) -> dict[str, list[str]]:
    """Load, and say by kind which names did not fit; the values of `own` are the network's, in place."""
    given = dict(state)  # hooks change what they are given
    shapes = {name: tensor.shape for name, tensor in own.items()}
    missing, left, failed = _load_by_hooks(model, state, fit.candidate.versions, fit.prefix)
    after = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not failed and after != shapes:
        failed = f"it is of an older {type(model).__name__}, of other layers: convert it, or train it again"
    loaded = {own[name].data_ptr() for name in given if name in own}
    kinds = {
        "missing": [
            name
            for name in missing
            if not name.endswith(COUNTED) and not (own[name].numel() and own[name].data_ptr() in loaded)
        ],
        "not in the network": left,
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(shapes[name])}"
            for name, value in given.items()
            if name in shapes and value.shape != shapes[name]
        ]
        if failed
        else [],
        "quantised": [
            f"{name} {value.dtype}"
            for name, value in given.items()
            if name in own and own[name].is_floating_point() and not value.is_floating_point()
        ],
    }
    return kinds if any(kinds.values()) or not failed else {"refused": [failed]}


def _load_by_hooks(
    model: nn.Module, state: OrderedDict[str, Any], versions: Mapping[str, Any] | None, prefix: str
) -> tuple[list[str], list[str], str]:
    """What is missing, what is left over, and the first line of what torch refuses."""
    given = dict(state)
    for known in [_renamed(versions, prefix)] if versions is not None else [{}, _versions_of(model)]:
        state = OrderedDict(given)
        # Batch norm has counted its batches since 0.4.1: without its version none are asked for.
        state._metadata = {  # type: ignore[attr-defined]
            name: version for name, version in known.items() if not _counts_batches(model, name)
        }
        try:
            keys = model.load_state_dict(state, strict=False)
        except ValueError:  # a module that asks for its version, which this file does not have
            continue
        except RuntimeError as error:
            given_names = [name for name in model.state_dict() if name not in given]
            left = [name for name in given if name not in model.state_dict()]
            return given_names, left, (str(error).splitlines() or [""])[-1].strip()
        return list(keys.missing_keys), list(keys.unexpected_keys), ""
    return [], [], f"{type(model).__name__} does not take it, of whatever version"


def _renamed(versions: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Of the modules under the prefix, by the network's names; an inner module's after its wrapper's."""
    kept = {name: v for name, v in versions.items() if f"{name}.".startswith(prefix)}
    return {name[len(prefix) :]: v for name, v in kept.items()} | {
        _bare(name[len(prefix) :]): v for name, v in kept.items()
    }


def _versions_of(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict()._metadata)  # type: ignore[attr-defined]


def _counts_batches(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), _NormBase)
    except AttributeError:
        return False


def _said(path: Path, chosen: Fit, others: list[Fit], aside: list[str]) -> str:
    """What was taken, if it is not the file as it is."""
    parts = []
    if chosen.candidate.place and (others or chosen.label not in USUAL[:3]):
        instead = f" ({', '.join(repr(fit.label) for fit in others)} would fit, too)" if others else ""
        parts.append(f"took {'.'.join(chosen.candidate.place)!r}{instead}")
    elif chosen.candidate.place:
        parts.append(f"took {chosen.label!r}")
    if chosen.prefix:
        parts.append(f"stripped {chosen.prefix!r}")
    if inner := {w for old, new in chosen.names.items() for w in WRAPPERS & {*old.split(".")} - {*new.split(".")}}:
        inner -= {*chosen.prefix.split(".")}
        parts += [f"read past {', '.join(sorted(inner))} in names"] if inner else []
    if aside:
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        parts.append(f"left out {', '.join(aside[:3])}{more}")
    return f"weights from {path.name}: {', '.join(parts)}" if parts else ""
