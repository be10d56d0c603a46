"""`--arch file.py:function`: a network that a file of the user's own builds, and the files it imports.

The file's folder can be imported from while its code runs, as it can where Python runs it as a script. What was
imported from there is imported again for the next file: another file's `blocks` is another module.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dist_prune.config.flags import parse_arch
from dist_prune.network.errors import ModelError

PREFIX = "dist_prune_user_"  # of a package that stands for the file's folder, for relative imports
MARK = "__dist_prune_user__"  # on modules that a file of a user's own imported


def build_from_file(arch: str, classes: int) -> nn.Module:
    """What the file's function returns for `num_classes=classes`; a network that the file itself made, as it is.

    Raises:
        ModelError: in one line, what is wrong with the file or the function, and where.
    """
    path = _existing(arch)
    with _importing(path), _explained(arch, path):
        module = _executed(path)
        found = _named(module, arch)
        network = copy.deepcopy(found) if isinstance(found, nn.Module) else found(num_classes=classes)
    if not isinstance(network, nn.Module):
        kind = "None: is a `return` missing" if network is None else f"{type(network).__name__}"
        raise ModelError(f"--arch {arch}: returned {kind}; expected a network, a torch.nn.Module")
    return network


def sources(arch: str) -> dict[str, Path]:
    """The architecture's file, and all it imports from its folder, by their paths below that.

    Raises:
        ModelError: see `build_from_file`.
    """
    path = _existing(arch)
    with _importing(path) as imported, _explained(arch, path):
        _executed(path)
    files = {path.resolve(), *imported}
    found = {str(file.relative_to(path.resolve().parent)): file for file in sorted(files)}
    return {path.name: found.pop(path.name), **found}


def _existing(arch: str) -> Path:
    path = Path(parse_arch(arch)[0]).expanduser()
    if not path.is_file():
        raise ModelError(f"--arch {arch}: there is no file {path}")
    return path


def _executed(path: Path) -> ModuleType:
    """The file as a module of its own; known to Python by its name, which dataclasses ask for."""
    package = PREFIX + sha256(str(path.resolve()).encode()).hexdigest()[:8]
    folder = ModuleType(package)
    folder.__path__ = [str(path.resolve().parent)]
    sys.modules[package] = folder
    name = f"{package}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _named(module: ModuleType, arch: str) -> Any:  # noqa: ANN401  a function, a class, or a network
    """What the architecture names in the file.

    Raises:
        ModelError: there is no such function, or it does not take `num_classes`.
    """
    path, function = parse_arch(arch)
    found = vars(module).get(function)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        own = [n for n in own if getattr(module, n).__module__ == module.__name__] or own
        known = f"it has {', '.join(own)}" if own else "it has none"
        what = f"{path} has no function {function!r}" if function else f"name the function, {path}:FUNCTION"
        raise ModelError(f"--arch {arch}: {what}; {known}")
    try:
        inspect.signature(found).bind(num_classes=0)
    except TypeError as error:
        raise ModelError(
            f"--arch {arch}: {function} is called as {function}(num_classes=N), which it does not take "
            f"({error}): write `def {function}(num_classes):`"
        ) from error
    except ValueError:  # a callable that does not say what it takes
        pass
    return found


@contextmanager
def _importing(path: Path) -> Iterator[set[Path]]:
    """While open, modules beside the file can be imported; at the end, lends the files that were."""
    folder, imported = path.resolve().parent, set[Path]()
    for name in [name for name, module in sys.modules.items() if MARK in getattr(module, "__dict__", ())]:
        del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield imported
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            place = folder / Path(*name.split(".")[name.startswith(PREFIX) :])
            if (source := _source_of(sys.modules[name])) in (place.with_suffix(".py"), place / "__init__.py"):
                setattr(sys.modules[name], MARK, True)
                imported.add(source)


def _source_of(module: ModuleType) -> Path:
    return Path(getattr(module, "__file__", None) or "").resolve()


@contextmanager
def _explained(arch: str, path: Path) -> Iterator[None]:
    """While open, whatever the user's code raises becomes a ModelError of one line.

    Raises:
        ModelError: names the error, and the line of the user's code that it came from.
    """
    try:
        yield
    except ModelError:
        raise
    except SyntaxError as error:
        where = f"{Path(error.filename or path).name}{f' line {error.lineno}' if error.lineno else ''}"
        raise ModelError(f"--arch {arch}: {where} is not Python: {error.msg}") from error
    except SystemExit as error:
        raise ModelError(
            f"--arch {arch}: the file ends the program when it is imported: put what is a script in it below "
            f"`if __name__ == '__main__':`"
        ) from error
    except Exception as error:
        raise ModelError(f"--arch {arch}: {fault_of(error, path)}") from error


def fault_of(error: Exception, path: Path) -> str:
    """An error of the user's code in one line: what it is, and where in the file's folder it was raised."""
    folder = path.resolve().parent
    own = [f for f in traceback.extract_tb(error.__traceback__) if folder in Path(f.filename).resolve().parents]
    where = f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"
