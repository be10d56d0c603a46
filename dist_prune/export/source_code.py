"""A network as a Python module that needs torch alone: a class per kind of block, and all layers in one place."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_prune.export.constructors import Part, layer, written
from dist_prune.export.formats import Agreement, ExportError, compare, parts
from dist_prune.export.statements import parameters, statements
from dist_prune.export.tracing import Pair, UntraceableError, is_known, own_buffers, trace
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import evaluating
from dist_prune.utils.files import replacing
from dist_prune.utils.text import write_text

WIDTH = 110
SHOWN = 4  # names in a docstring
REPEATED = 3  # equal neighbours from which on they are counted

MODULE = '''"""{title}

    network = load()  # evaluation mode, weights from {weights} beside this file
    logits = network(images)  # (N, 3, {side}, {side}): RGB/255, minus MEAN, divided by STD

Needs torch alone. Written down from a network in evaluation mode: what it does only in training is not here.
"""

from __future__ import annotations

{imports}

{constants}


{classes}


def network() -> nn.Module:
    """All layers, yet without their values."""
    return {expression}


def load(weights: str | Path = Path(__file__).with_name("{weights}")) -> nn.Module:
    """The network with its weights, in evaluation mode, on the CPU."""
    model = network()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()
'''

CHECK = """
import sys
from importlib.machinery import SourceFileLoader
sys.modules.update(dict.fromkeys(["dist_prune", "torchvision", "timm"]))  # importing one is an ImportError
import torch
code, weights, batches, logits = sys.argv[1:]
model = SourceFileLoader("model", code).load_module().load(weights)
with torch.no_grad():
    found = [model(batch) for batch in torch.load(batches)]
torch.save([y[0] if isinstance(y, tuple) else y for y in found], logits)
"""


@dataclass(frozen=True)
class Source:
    """A network written down: the classes it needs, the expression that makes it, and the tensors it is given."""

    classes: tuple[str, ...]
    expression: tuple[str, ...]
    state: dict[str, Tensor]

    def module(self, title: str, weights: str, side: int, constants: Sequence[str]) -> str:
        """The text of the Python module.

        Args:
            title: first line of its docstring.
            weights: name of the file beside it.
            side: height and width of images, pixels.
            constants: lines that assign them.
        """
        body = "\n".join([*self.classes, *self.expression])
        imports = ["import math"] if "math." in body else []
        imports += ["from collections import OrderedDict"] if "OrderedDict" in body else []
        imports += ["from pathlib import Path", "", "import torch"]
        imports += ["import torch.nn.functional as F"] if "F." in body else []
        return MODULE.format(
            title=title,
            weights=weights,
            side=side,
            imports="\n".join([*imports, "from torch import Tensor, nn"]),
            constants="\n".join(constants),
            classes="\n\n\n".join(self.classes),
            expression="\n    ".join(self.expression),
        )


def write_source(
    path: Path, network: nn.Module, images: Tensor, title: str, constants: Sequence[str]
) -> Agreement:
    """Write the module to `path`, and `…_weights.pt` next to it; import both in a process without this package.

    Raises:
        ExportError: see `write_down` and `compare`.
    """
    weights = weights_of(path)
    source = write_down(network, images)
    with replacing(path) as code, replacing(weights) as state:
        write_text(code, source.module(title, weights.name, images.shape[-1], constants))
        torch.save(source.state, state)
        return compare(_in_a_fresh_process(code, state, parts(images)), network, images)


def weights_of(path: Path) -> Path:
    """The file of a module's weights."""
    return path.with_name(f"{path.stem}_weights.pt")


def _in_a_fresh_process(code: Path, weights: Path, batches: list[Tensor]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "images", Path(folder) / "logits"
        torch.save(batches, given)
        words = [sys.executable, "-I", "-B", "-c", CHECK, *map(str, (code, weights, given, found))]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise ExportError(f"the module that was written does not run: {' '.join(reason)}; it was not kept")
        return torch.cat(torch.load(found))


# ── modules to classes and expressions ─────────────────────────────────────────────────────────────────────


def write_down(network: nn.Module, images: Tensor) -> Source:
    """The network as source.

    Args:
        network: left as it was.
        images: (N, 3, H, W), N ≥ 3: its forward is followed with two and with three of them.

    Raises:
        ExportError: what it computes cannot be followed; names the module, and where.
    """
    model = with_replaced(network)
    own_buffers(model)
    author = _Author()
    author.calls[model] = {_first_argument(model): (images[:2], images[:3])}
    try:
        with evaluating(model):
            expression = author.part(model, "").lines(WIDTH)
    except UntraceableError as error:
        raise ExportError(f"--format python cannot write this network down: {error}") from error
    return Source(tuple(kind.text for kind in author.kinds.values()), tuple(expression), model.state_dict())


def _first_argument(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))


@dataclass
class _Kind:
    """A class, and the modules that are of it."""

    name: str
    lines: tuple[str, ...]
    used: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        shown = self.used[:SHOWN] if len(", ".join(self.used[:SHOWN])) < WIDTH - 20 else self.used[:1]
        rest = f" and {len(self.used) - len(shown)} more" if len(self.used) > len(shown) else ""
        message = ", ".join(shown) + rest
        lines = (f'"""{message or "The network."}"""', *self.lines)
        return f"class {self.name}(nn.Module):\n" + "\n".join(f"    {line}".rstrip() for line in lines)


class _Author:
    """Goes through the tree of modules; modules that compute the same with other layers share a class."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, dict[str, Pair]] = {}
        self.kinds: dict[tuple[str, tuple[str, ...]], _Kind] = {}

    def part(self, module: nn.Module, name: str) -> Part:
        """The expression that makes a module."""
        if is_known(module):
            return layer(module, name)
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            return _container(f"nn.{type(module).__name__}", self._children(module, name), "[]")
        arguments = self.calls.get(module)
        forward = None if arguments is None else trace(module, name, arguments)
        for child, given in forward.calls.items() if forward else ():
            self.calls.setdefault(child, given)
        children = self._children(module, name)
        if _is_sequence(module):
            return _container("nn.Sequential", children, "")
        if odd := [n for n, _ in children if not n.isidentifier()]:
            raise UntraceableError(f"{name}: {odd[0]!r} cannot be the name of an attribute")
        body = _forward(parameters(forward), statements(forward, module)) if forward else []
        shapes = [(f"{n}_shape", written(tuple(t.shape))) for n, t in _tensors(module)]
        return Part(self._kind(module, name, [n for n, _ in children], body), (*children, *shapes))

    def _children(self, module: nn.Module, name: str) -> tuple[tuple[str, Part], ...]:
        return tuple((n, self.part(m, f"{name}.{n}".lstrip("."))) for n, m in module.named_children())

    def _kind(self, module: nn.Module, name: str, children: list[str], body: list[str]) -> str:
        title = type(module).__name__.lstrip("_")
        key = (title, (*_constructor(module, children), *body))
        if key not in self.kinds:
            count = 1 + sum(other == title for other, _ in self.kinds)
            self.kinds[key] = _Kind(f"{title}{count if count > 1 else ''}", key[1])
        self.kinds[key].used += [name] if name else []
        return self.kinds[key].name


def _is_sequence(module: nn.Module) -> bool:
    """Whether `nn.Sequential` itself does: all of torch's own, and subclasses that only construct."""
    if type(module) is nn.Sequential:
        return True
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    names = [name for name, _ in module.named_children()]
    nameless = all(map(str.isdecimal, names)) or not all(map(str.isidentifier, names))
    return plain and nameless and not _tensors(module)


def _container(head: str, children: tuple[tuple[str, Part], ...], brackets: str) -> Part:
    if not all(name.isidentifier() or name.isdecimal() for name, _ in children):
        pairs = tuple(("", Part("", (("", repr(name)), ("", part)))) for name, part in children)
        return Part(head, (("", Part("OrderedDict", (("", Part("", pairs, "[]")),))),))
    if not all(name.isdecimal() for name, _ in children):
        return Part(head, (("", Part("OrderedDict", children)),))
    items = _repeats([part for _, part in children])
    return Part(head, (("", Part("", items, brackets)),)) if brackets else Part(head, items)


def _repeats(found: list[Part]) -> tuple[tuple[str, Part | str], ...]:
    """Equal neighbours are written once, with how many there are."""
    groups = ((part, len(list(group))) for part, group in itertools.groupby(found))
    return tuple(
        ("", again) for part, n in groups for again in ([replace(part, times=n)] if n >= REPEATED else [part] * n)
    )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Its own parameters and buffers, in the order of its state dict."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _constructor(module: nn.Module, children: list[str]) -> list[str]:
    if not children and not _tensors(module):
        return []
    taken = [f"{name}: nn.Module" for name in children]
    taken += [f"{name}_shape: tuple[int, ...]" for name, _ in _tensors(module)]
    lines = [f"self.{name} = {name}" for name in children]
    lines += [_registered(name, tensor) for name, tensor in _tensors(module)]
    return ["", *_function("__init__", taken, "None", ["super().__init__()", *lines])]


def _registered(name: str, tensor: Tensor) -> str:
    dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    empty = f"torch.empty({name}_shape{dtype})"
    if isinstance(tensor, nn.Parameter):
        return f"self.{name} = nn.Parameter({empty})"
    return f'self.register_buffer("{name}", {empty})'


def _forward(taken: list[str], body: list[str]) -> list[str]:
    return ["", *_function("forward", [f"{name}: Tensor" for name in taken], "Tensor", body)]


def _function(name: str, taken: list[str], returns: str, body: list[str]) -> list[str]:
    head = f"def {name}({', '.join(['self', *taken])}) -> {returns}:"
    if len(head) > WIDTH:
        inner = textwrap.wrap(", ".join(["self", *taken]), WIDTH - 8)
        head = "\n        ".join([f"def {name}(", *inner]) + f",\n    ) -> {returns}:"
    return [head, *("    " + line for line in body)]
