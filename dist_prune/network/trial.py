"""Before any work: which layers cannot be replaced, as the code around them reads more than their output."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dist_prune.network.factored import Factored
from dist_prune.network.outputs import logits_of
from dist_prune.network.replacing import CopyError, with_replaced

COARSE = 0.03  # relative error that half precision, or TF32 on a GPU, may add up to


@dataclass(frozen=True)
class StandInTrial:
    """A network's answer to one image, `expected` (1, classes): stand-ins for its layers must not change it."""

    model: nn.Module
    image: Tensor
    expected: Tensor
    tolerance: float  # of the answer's norm

    def altering(self, stand_ins: Mapping[str, nn.Module]) -> dict[str, str]:
        """The layers whose stand-ins, which compute the same, change the network's answer: name → how.

        All are tried at once; where that fails, halves of them, so that a few such layers take few passes.
        """
        if not torch.isfinite(self.expected).all():
            return {}
        found = self._search(list(stand_ins), stand_ins)
        return {} if found and self._fault({}) else found  # it may answer otherwise each time, by itself

    def _search(self, names: Sequence[str], stand_ins: Mapping[str, nn.Module]) -> dict[str, str]:
        fault = self._fault({name: stand_ins[name] for name in names})
        if not fault or len(names) == 1:
            return dict.fromkeys(names, fault) if fault else {}
        half = len(names) // 2
        found = self._search(names[:half], stand_ins) | self._search(names[half:], stand_ins)
        return found or dict.fromkeys(names, fault)

    def _fault(self, replacements: Mapping[str, nn.Module]) -> str:
        """What goes wrong with these in place; empty if nothing does."""
        tensors = [*self.model.parameters(), *self.model.buffers()]  # shared: nothing large is copied
        try:
            answer = answer_of(with_replaced(self.model, replacements.items(), tensors), self.image)
        except (CopyError, torch.OutOfMemoryError):
            raise
        except AttributeError as error:
            return f"the code around it reads its attribute {error.name!r}, which a pair does not have"
        except Exception as error:
            return f"the code around it fails with another module there ({error})".replace("\n", " ")
        off = (answer - self.expected).double().norm() if answer.shape == self.expected.shape else torch.inf
        if off <= self.tolerance * self.expected.double().norm():
            return ""
        return "the network computes something else as soon as another module stands there"


def unlike_batches(
    model: nn.Module,
    image: Tensor,
    modules: Mapping[str, nn.Conv2d | nn.Linear],
    outputs: Mapping[str, Sequence[Tensor]],
) -> dict[str, str]:
    """The layers of whose rows no image is the owner, as their first dimension is not that of images: name → why.

    Such as those that are given coordinates, or tokens before images. A network that takes single images has none.

    Args:
        model: the network.
        image: (1, …).
        modules: the layers.
        outputs: of all their calls for the image, their values do not matter.
    """
    one = {name: sum(_entries(module, y) for y in outputs[name]) for name, module in modules.items()}
    two: Counter[str] = Counter()

    def count(name: str, module: nn.Module, _args: object, y: Tensor) -> None:
        two[name] += _entries(module, y)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(count, name)).remove)
        try:
            answer_of(model, torch.cat([image, image]))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the network's own code raises for two images
            return {}
    return {
        name: f"its first dimension is not that of images: {one[name]} for one image, {two[name]} for two"
        for name in one
        if two[name] != 2 * one[name]
    }


def _entries(module: nn.Module, y: Tensor) -> int:
    """How long the first dimension is; of what is called without one, 1."""
    return 1 if y.dim() == (3 if isinstance(module, nn.Conv2d) else 1) else len(y)


def answer_of(model: nn.Module, image: Tensor) -> Tensor:
    """The logits for an image, random draws inside the network always the same; the caller's are left alone."""
    with torch.random.fork_rng([image.device] if image.is_cuda else []):
        torch.default_generator.manual_seed(0)
        if image.is_cuda:
            torch.cuda.manual_seed(0)
        return logits_of(model(image.clone()))


def tolerance_of(tensors: Sequence[Tensor]) -> float:
    """What rounding may change of a network's answer, by the coarsest of the types that its layers compute in."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point())
    coarse = COARSE if tensors[0].is_cuda else 0.0  # TF32
    return float(max(eps**0.5, coarse))


def stand_ins(modules: Mapping[str, nn.Conv2d | nn.Linear]) -> dict[str, nn.Module]:
    """For each layer a pair that keeps all directions, of the very classes that a pair has.

    The first factor shares the layer's weight; the second is the identity, one for all layers of a width, and has
    the bias.
    """
    eyes: dict[tuple[object, ...], nn.Parameter] = {}
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        reduce = copy.copy(module)
        reduce._parameters = {**module._parameters, "bias": None}
        outputs, groups = module.weight.shape[0], getattr(module, "groups", 1)
        with torch.device("meta"):  # their weights come next
            expand: nn.Conv2d | nn.Linear = (
                nn.Conv2d(outputs, outputs, 1, groups=groups)
                if isinstance(module, nn.Conv2d)
                else nn.Linear(outputs, outputs)
            )
        weight, shape = module.weight, expand.weight.shape
        if (key := (shape, weight.dtype, weight.device)) not in eyes:
            eye = torch.eye(shape[1], dtype=weight.dtype, device=weight.device).repeat(groups, 1).view(shape)
            eyes[key] = nn.Parameter(eye, requires_grad=False)
        bias = module.bias if isinstance(module.bias, nn.Parameter) else nn.Parameter(weight.new_zeros(outputs))
        expand._parameters = {"weight": eyes[key], "bias": bias}
        found[name] = Factored(reduce, expand)
    return found
