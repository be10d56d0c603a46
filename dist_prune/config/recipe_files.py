"""Recipes in TOML: keys are flags without their dashes, those with a dot in a table."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w

from dist_prune.config.flags import ConfigError, did_you_mean
from dist_prune.config.run import Run, to_dict
from dist_prune.config.settings import changed, settings
from dist_prune.utils.text import read_text

BASE = "recipe"  # the key that names the recipe on which a file builds
ONE_RUN = {"run-dir", "resume", "reshard", "overwrite", "dry-run", "save-recipe", BASE}
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path as text"}


def is_file(name: str) -> bool:
    """Whether a recipe of that name is a file."""
    return name.endswith(".toml")


def to_toml(run: Run) -> str:
    """All settings, but those that are about one run and its directory."""
    content: dict[str, Any] = {}
    for flag, setting in settings().items():
        value = to_dict(setting.of(run))
        if flag not in ONE_RUN and value is not None:  # TOML has no null: absent keys are at their defaults
            table, _, key = flag.rpartition(".")
            (content.setdefault(table, {}) if table else content)[key] = value
    text = "# A recipe of dist-prune: keys are flags of `dist-prune run`, which override them.\n\n"
    return text + tomli_w.dumps(content)


def read_recipe(path: Path, known: Mapping[str, Run]) -> Run:
    """The run that a file describes; what it leaves out is as in `recipe = "…"`, else at its default.

    Args:
        path: of the file.
        known: recipes that it may build on.

    Raises:
        ConfigError: names the file: not there, not TOML, unknown keys (close ones are offered), a value of the
            wrong type, or one that cannot be.
    """
    try:
        content = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"recipe {path}: could not be read ({error.strerror}); expected a TOML file") from error
    except ValueError as error:
        raise ConfigError(f"recipe {path}: not TOML ({error})") from error
    base = content.pop(BASE, None)
    if base is not None and base not in known:
        raise ConfigError(f"{path}: {BASE} = {base!r}: {_hint(str(base), list(known), 'recipes')}")
    try:
        values = {settings()[flag].path: value for flag, value in _values(content).items()}
        return changed(known[base] if base else Run(), values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(content: Mapping[str, Any]) -> Run:
    """The run of which `to_dict` gave this; what an earlier version did not know is at its default.

    Raises:
        ConfigError: a value that cannot be.
    """
    values: dict[tuple[str, ...], Any] = {}
    for flag, setting in settings().items():
        value: Any = content
        for name in setting.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            values[setting.path] = _converted(value, setting.kind, f"{flag} = {value!r}")
    return changed(Run(), values)


def keys_of(path: Path) -> set[str]:
    """The flags that a file has values for."""
    return set(_values({k: v for k, v in tomllib.loads(read_text(path)).items() if k != BASE}))


def _values(content: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """By flag, converted to the types of the fields."""
    possible = [flag for flag in settings() if flag not in ONE_RUN]
    found: dict[str, Any] = {}
    for key, value in content.items():
        flag = table + key.replace("_", "-")
        if isinstance(value, dict) and any(known.startswith(f"{flag}.") for known in possible):
            found |= _values(value, f"{flag}.")
        elif flag in possible:
            found[flag] = _converted(value, settings()[flag].kind, f"{table}{key} = {value!r}")
        else:
            raise ConfigError(f"there is no {table}{key}; {_hint(flag, possible, 'keys')}")
    return found


def _hint(name: str, known: list[str], what: str) -> str:
    return did_you_mean(name, known, f"{what}: {', '.join(known)}")


def _converted(value: Any, kind: Any, where: str) -> Any:  # noqa: ANN401  any value of any type
    """A value of TOML as a field has it.

    Raises:
        ConfigError: it is of another type, or not among the values that the field may have.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (k for k in inner if k is not type(None))
        return _converted(value, kind, where)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where}: expected one of {', '.join(inner)}")
        return value
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is ... and isinstance(value, list) else inner
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ConfigError(f"{where}: expected a list of {'' if inner[-1] is ... else f'{len(inner)} '}numbers")
        return tuple(_converted(v, k, where) for v, k in zip(value, kinds, strict=True))
    fitting = (int, float) if kind is float else str if kind is Path else kind
    if not isinstance(value, fitting) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {NAMES[kind]}")
    return kind(value)
