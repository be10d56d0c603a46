"""The shortcuts: a network compressed by one call, and a plan's shapes made on another network."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from dist_prune.compression import Compression, Ranks
from dist_prune.compressor import Compressor
from dist_prune.config.flags import did_you_mean
from dist_prune.factorization.plan import Plan, PlanError
from dist_prune.factorization.project import chains, opened_for
from dist_prune.network.errors import ModelError
from dist_prune.network.factored import Factored
from dist_prune.network.layers import unwrapped
from dist_prune.network.replacing import replace_in
from dist_prune.network.sites import SiteError
from dist_prune.width.narrowing import narrowed, require_channels


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Ranks = "budget:macs=0.5",
    **options: Any,  # noqa: ANN401  those of Compressor
) -> Compression:
    """Replace layers of a network by low-rank ones; the given network stays as it is.

    In a process that is in a process group, every rank calls this with the same network and arguments and with its
    own share of the images: statistics are summed over the ranks, and all end with the same result.

    Args:
        model: as of `Compressor.fit`.
        batches: as of `Compressor.fit`.
        ranks: a share of the multiply-adds, `0.5`; ranks by site, `{"layer1.0.conv1": 8}`, or forms and ranks,
            `"vertical:8"`, `"tucker:8x16"`; a Plan; or as `--ranks`: `uniform:0.5`, `energy:0.95`,
            `budget:macs|params|latency=0.5`, `sites:NAME=RANK,…`, or a plan's file.
        options: the arguments of `Compressor`.

    Raises:
        ValueError, RuntimeError: as listed at `Compressor.fit` and `Compressor.compress`.
    """
    return Compressor(**options).fit(model, batches, ranks).compress(ranks)


def apply(plan: Plan | str | Path, model: nn.Module) -> nn.Module:
    """Give a network the compressed shapes, in place: for programs that build a network, then load its weights.

    What becomes another layer has PyTorch's first values, on the device, of the type and in the mode of the one
    before; so load weights afterwards, as of `Compression.model` or `model.safetensors`. Everything else stays.

    Args:
        plan: of `Compressor.plan` or a `Compression`; a `plan.json`; or the folder of a run or a saved network.
        model: a dense network like the one that the plan is of, on any device. Comes before what holds its
            parameters: an optimizer, DDP, `torch.compile`.

    Returns:
        The same network.

    Raises:
        PlanError: the plan is of another network, this one has these shapes already, or the file is no plan;
            nothing has changed then.
        ModelError: a compiled, parallel or exported network.
    """
    wanted = plan if isinstance(plan, Plan) else Plan.load(plan)
    if unwrapped(model) is not model:
        raise ModelError(
            f"a {type(model).__name__} holds the layers of before: apply the plan, then wrap the network"
        )
    open_ = opened_for(model, wanted)
    require_channels(open_, wanted.kept)
    narrow = narrowed(open_, wanted.kept, shared=True) if wanted.kept else open_
    _require_layers(narrow, wanted)
    try:
        new = {name: narrow.get_submodule(name) for each in wanted.kept for name in each.group.members}
        new |= chains(narrow, wanted)
    except SiteError as error:
        raise PlanError(f"the plan does not fit this network: {error}") from error
    replace_in(model, {name: open_.get_submodule(name) for name in wanted.attention})
    replace_in(model, new)
    return model


def _require_layers(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose layers are not those of the network."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.factored:
        found = modules.get(name)
        if found is None:
            hint = did_you_mean(name, modules, f"names are like {', '.join([*modules][1:4])}")
            raise PlanError(f"the network has no layer {name}; {hint}")
        if isinstance(found, Factored):
            raise PlanError(f"{name} is low-rank already; expected a dense network")
        if not isinstance(found, nn.Conv2d | nn.Linear):
            raise PlanError(f"{name} is a {type(found).__name__} here; expected a Conv2d or a Linear")
        if not name:
            raise PlanError("the network is one layer, which cannot be replaced in place: put it in a Sequential")


def _with_options() -> inspect.Signature:
    """Of `compress`, for help and editors: with the arguments of `Compressor` spelled out."""
    own, options = inspect.signature(compress), inspect.signature(Compressor)
    given = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=[*given, *options.parameters.values()])


vars(compress)["__signature__"] = _with_options()
