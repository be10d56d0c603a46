"""Convolutions that pad by themselves, as timm's `Conv2dSame`: recognised by what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.network.layers import LAYERS, has_hooks
from dist_prune.network.padded import Sides, convolution
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import evaluating, given_to
from dist_prune.network.trial import StandInTrial, answer_of, tolerance_of

MODES = ("zeros", "reflect", "replicate", "circular")
RELATIVE = 1e-9  # in float64: what another order of summation stays far below
Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Padding:
    """What a convolution adds around its input: along rows, along columns, and with which values."""

    sides: tuple[Sides, Sides]
    mode: str = "zeros"


def own_paddings(model: nn.Module, image: Tensor) -> dict[str, Padding]:
    """The convolutions of classes of their own that do no more than pad their input.

    Each is compared with a plain one on noise, at small sizes, at those that occur in the network, and at twice
    these. Left out are those for which the network answers otherwise with a plain one there: code around a layer
    may ask of what class it is.

    Args:
        model: left as it is.
        image: (1, …) that the network takes, on its device.

    Raises:
        ModelError: the network returns no logits.
    """
    others = {n: m for n, m in model.named_modules() if n and _is_of_its_own(m)}
    if not others:
        return {}
    with evaluating(model):
        sizes, expected = _sizes(model, others, image)
        found = {n: p for n in sizes if (p := padding_of(others[n], sizes[n])) is not None}
        trial = StandInTrial(model, image, expected, tolerance_of([expected]))
        unfit = trial.altering({name: _spelled_out(others[name], padding) for name, padding in found.items()})
    return {name: padding for name, padding in found.items() if name not in unfit}


def with_paddings(model: nn.Module, paddings: Mapping[str, Padding]) -> nn.Module:
    """A network with plain convolutions behind padding there, all tensors shared; itself if there are none."""
    if not paddings:
        return model
    spelled = [(name, _spelled_out(model.get_submodule(name), padding)) for name, padding in paddings.items()]
    return with_replaced(model, spelled, [*model.parameters(), *model.buffers()])


def note_on(names: Iterable[str]) -> str:
    """For people; empty if there are none."""
    named = list(names)
    if not named:
        return ""
    some = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
    return f"{len(named)} convolution(s) that pad by themselves become plain ones behind the same padding: {some}"


def plain(module: nn.Module) -> nn.Module:
    """The module; for a convolution that does no more than pad, a plain one that shares its parameters."""
    padding = padding_of(module) if _is_of_its_own(module) else None
    return module if padding is None else _spelled_out(module, padding)


def padding_of(module: nn.Module, sizes: Sequence[Size] = ()) -> Padding | None:
    """How a convolution of a class of its own pads, if that is all that it does; its weights do not matter.

    Args:
        module: compared with a plain convolution on noise, with weights of noise, in both modes.
        sizes: of inputs to compare on besides small ones.
    """
    assert isinstance(module, nn.Conv2d)
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if module._parameters.get("weight") is None or has_hooks(module) or own - {"weight", "bias"}:
        return None
    alive: list[tuple[Padding, nn.Module]] | None = None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            probe = _with_noise(module)
            for image, training in _images(probe, sizes):
                answer = probe.train(training)(image)
                if alive is None:
                    alive = [(each, _spelled_out(probe, each)) for each in _candidates(probe, image, answer)]
                alive = [(each, made) for each, made in alive if _agrees(made, image, answer)]
                if not alive:
                    return None
        except Exception:  # what cannot be copied, or its own forward, which may want anything
            return None
    return alive[0][0] if alive else None


def _is_of_its_own(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and type(module) not in LAYERS


def _sizes(
    model: nn.Module, modules: Mapping[str, nn.Module], image: Tensor
) -> tuple[dict[str, list[Size]], Tensor]:
    """What sizes of input occur at each of the modules, and what the network answers."""
    sizes: dict[str, list[Size]] = {}

    def watch(name: str) -> Any:  # noqa: ANN401  as torch has it
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            height, width = given_to(args, kwargs).shape[-2:]
            sizes.setdefault(name, []).append((height, width))

        return note

    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        return sizes, answer_of(model, image)
    finally:
        for hook in hooks:
            hook.remove()


def _with_noise(module: nn.Conv2d) -> nn.Conv2d:
    """A copy in float64 on the CPU with weights that no other convolution has."""
    copied = with_replaced(module, (), module.parameters())
    assert isinstance(copied, nn.Conv2d)
    generator = torch.Generator().manual_seed(0)
    copied._parameters = {
        name: nn.Parameter(torch.randn(old.shape, generator=generator, dtype=torch.float64), requires_grad=False)
        if old is not None
        else None
        for name, old in module._parameters.items()
    }
    return copied


def _images(module: nn.Conv2d, sizes: Sequence[Size]) -> Iterator[tuple[Tensor, bool]]:
    """Noise, and whether the layer is training: each remainder of the stride, these sizes, and twice as long."""
    generator = torch.Generator().manual_seed(1)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    height, width = 2 * dh * (kh - 1) + 1 + 3 * sh, 2 * dw * (kw - 1) + 1 + 4 * sw
    small = [(height + extra, width + extra) for extra in range(max(sh, sw, 2) + 1)]
    long = {(2 * max(h for h, _ in sizes) + 1, width), (height, 2 * max(w for _, w in sizes) + 1)} if sizes else ()
    trials = [(2, size, training) for training in (False, True) for size in small]
    for count, size, training in [*trials, *((1, size, False) for size in (*dict.fromkeys(sizes), *sorted(long)))]:
        shape = (count, module.in_channels, *size)
        yield torch.randn(shape, generator=generator, dtype=torch.float64), training


def _candidates(module: nn.Conv2d, image: Tensor, answer: Any) -> Iterator[Padding]:  # noqa: ANN401  its own
    """Paddings at which the middle of the answer comes from where it does: that says how much is added before."""
    if not isinstance(answer, Tensor) or answer.dim() != 4 or answer.shape[:2] != (len(image), len(module.weight)):
        return
    everywhere = F.conv2d(image[:1], module.weight, module.bias, 1, 0, module.dilation, module.groups)[0]
    middle = [size // 2 for size in answer.shape[2:]]
    vector = answer[0, :, middle[0], middle[1]]
    off = (everywhere - vector[:, None, None]).norm(dim=0)
    place = divmod(int(off.argmin()), off.shape[1])
    if not float(off[place]) <= RELATIVE * float(vector.norm()):
        return
    axes: list[list[Sides]] = []
    for axis in (0, 1):
        stride, reach = module.stride[axis], module.dilation[axis] * (module.kernel_size[axis] - 1)
        before = middle[axis] * stride - place[axis]
        least = (answer.shape[2 + axis] - 1) * stride + reach + 1 - image.shape[2 + axis] - before
        # Up to stride - 1 more behind are never read at this size, but are at another.
        fixed = [(before, behind) for behind in range(max(least, 0), least + stride)] if before >= 0 else []
        axes.append([*sorted(fixed, key=lambda side: side[0] != side[1]), "same"])
    yield from (Padding((rows, columns), mode) for mode in MODES for rows, columns in product(*axes))


def _spelled_out(module: nn.Module, padding: Padding) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    with torch.device("meta"):  # its parameters come next
        made = convolution(
            module.in_channels,
            module.out_channels,
            sides=padding.sides,
            kernel_size=module.kernel_size,
            stride=module.stride,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=padding.mode,
        )
    made._parameters = dict(module._parameters)
    return made.train(module.training)


def _agrees(candidate: nn.Module, image: Tensor, answer: Tensor) -> bool:
    try:
        found = candidate(image)
    except (RuntimeError, ValueError):  # a padding that this size does not allow
        return False
    if found.shape != answer.shape or found.dtype != answer.dtype:
        return False
    return bool((found - answer).norm() <= RELATIVE * answer.norm())
