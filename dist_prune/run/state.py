"""What the stages of a run that are done have found: the part of a run that changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from dist_prune.factorization.bases import Basis
from dist_prune.factorization.nested import Nested
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.project import rebuild, unfold
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.attention import opened_in
from dist_prune.network.channels import KeptChannels
from dist_prune.network.replacing import with_replaced
from dist_prune.training.evaluate import Metrics
from dist_prune.width.narrowing import narrowed


@dataclass(frozen=True)
class SiteDirections:
    """What sites can be reduced to: their bases, chains of other forms, and what all of these are worth."""

    bases: Mapping[str, Basis]
    nested: Mapping[str, Mapping[str, Nested]]
    spectra: Spectra | None


@dataclass(frozen=True)
class Undistilled:
    """What a distillation that is under way began from.

    Attributes:
        kl: of these weights on images held out, nats per image.
        weights: the compressed network's.
        lr: the present peak learning rate.
        taken_back: steps at higher rates, which did harm.
    """

    kl: float
    weights: dict[str, Tensor]
    lr: float
    taken_back: int = 0

    def slower(self, steps: int) -> Undistilled:
        """To begin again after so many steps, at a third of the rate."""
        return replace(self, lr=self.lr / 3, taken_back=self.taken_back + steps)


@dataclass
class State:
    """The same on all ranks.

    Attributes:
        dense: the network that is compressed; once it loses channels, with the heads of its attention turned. Of
            it, a checkpoint holds these alone.
        done: names of the stages.
        metrics: by stage, of the validation images.
        right: by stage, which validation images the network got right.
        plan: of the compressed network.
        target: where the rounds of an iterative run end; else the plan itself, as soon as it is known.
        kept: the channels that stay in groups from which others were removed.
        narrow: the dense network without those, if any were removed.
        network: the compressed one, as soon as there is one.
        undistilled: what it was before distillation, while that is under way.
        unfolded: whether its pairs are, for the moment, multiplied back to dense layers.
        directions: of the dense network, where one stage leaves them to the next; a checkpoint does not hold them.
    """

    dense: nn.Module
    done: list[str] = field(default_factory=list)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    target: Plan | None = None
    kept: tuple[KeptChannels, ...] = ()
    narrow: nn.Module | None = None
    network: nn.Module | None = None
    undistilled: Undistilled | None = None
    unfolded: bool = False
    directions: SiteDirections | None = None

    @property
    def chosen(self) -> Plan:
        """The plan, in stages that come after it was made."""
        assert self.plan is not None
        return self.plan

    @property
    def compressed(self) -> nn.Module:
        """The compressed network, in stages that come after it was made."""
        assert self.network is not None
        return self.network

    @property
    def source(self) -> nn.Module:
        """The network whose layers are factored: the dense one, without the channels that were removed."""
        return self.dense if self.narrow is None else self.narrow

    def _turned(self) -> dict[str, dict[str, Tensor]]:
        names = opened_in(self.dense) if self.kept else ()
        return {name: self.dense.get_submodule(name).state_dict() for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "done": self.done,
            "metrics": {stage: asdict(m) for stage, m in self.metrics.items()},
            "right": self.right,
            "plan": self.plan and self.plan.to_json(),
            "target": self.target and self.target.to_json(),
            "unfolded": self.unfolded,
            "kept": [each.to_json() for each in self.kept],
            "turned": self._turned(),
            "narrow": self.narrow and self.narrow.state_dict(),
            "model": self.network and self.network.state_dict(),
            "undistilled": self.undistilled and vars(self.undistilled),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what `state_dict` gave; the network is built again from the dense one and the plan."""
        self.done, self.right = state["done"], state["right"]
        self.undistilled = Undistilled(**before) if (before := state["undistilled"]) else None
        self.metrics = {stage: Metrics(**m) for stage, m in state["metrics"].items()}
        self.kept = tuple(map(KeptChannels.from_json, state.get("kept", ())))
        if self.kept:
            self.dense = _with_turned(self.dense, state.get("turned", {}))
            self.narrow = narrowed(self.dense, self.kept)
            self.narrow.load_state_dict(state["narrow"])
        if state["target"] is not None:
            self.target = Plan.from_json(state["target"])
        if state["plan"] is None:
            return
        self.plan = Plan.from_json(state["plan"])
        self.network, self.unfolded = rebuild(self.source, self.plan), state["unfolded"]
        if self.unfolded:
            self.network = unfold(self.network, self.plan.ranks)
        self.network.load_state_dict(state["model"])


def _with_turned(dense: nn.Module, turned: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """The network with attention of these values, all else shared."""
    new = {name: copy.deepcopy(dense.get_submodule(name)) for name in turned}
    for name, module in new.items():
        module.load_state_dict(turned[name])
    return with_replaced(dense, new.items(), [*dense.parameters(), *dense.buffers()]) if new else dense
