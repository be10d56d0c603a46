"""The settings of a run one by one: each is a flag, a key in a recipe's file, and a field somewhere in `Run`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from dist_prune.config.run import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One field of a run: its flag without dashes, where it is, its type, its text and its group's."""

    flag: str
    path: tuple[str, ...]
    kind: Any
    text: str
    group: str

    def of(self, run: Run) -> Any:  # noqa: ANN401  any setting
        """Its value in a run."""
        return functools.reduce(getattr, self.path, run)


@functools.cache
def settings() -> Mapping[str, Setting]:
    """All of them by flag, in the order of the fields."""
    return {setting.flag: setting for setting in _settings(Run, (), "")}


def _settings(owner: Any, path: tuple[str, ...], prefix: str) -> Iterator[Setting]:  # noqa: ANN401  a dataclass
    texts, group = texts_of(owner), inspect.getdoc(owner) or ""
    for name, hint in get_type_hints(owner, include_extras=True).items():
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(bare):
            yield from _settings(bare, (*path, name), prefix if bare is not hint else f"{prefix}{name}.")
        else:
            yield Setting(prefix + name.replace("_", "-"), (*path, name), bare, texts.get(name, ""), group)


def texts_of(owner: type) -> dict[str, str]:
    """The text below each field of a dataclass, those it inherits included, as one line."""
    found: dict[str, str] = {}
    for kind in reversed(owner.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name, value = ast.unparse(field.target), ast.literal_eval(text.value)
                found[name] = " ".join(value.split())
    return found


def changed(settings: T, values: Mapping[tuple[str, ...], Any]) -> T:
    """Nested dataclasses with other values at some places, checked together as if they had been given at once."""
    inner: dict[str, dict[tuple[str, ...], Any]] = {}
    direct: dict[str, Any] = {}
    for (name, *rest), value in values.items():
        if rest:
            inner.setdefault(name, {})[tuple(rest)] = value
        else:
            direct[name] = value
    nested = {name: changed(getattr(settings, name), below) for name, below in inner.items()}
    return dataclasses.replace(settings, **nested, **direct)  # type: ignore[type-var]
