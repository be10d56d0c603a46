"""Closed-form correction: each site is solved again against the dense network, in execution order.

When a site's turn comes, everything before it is compressed and corrected. Where its output is added to a shortcut
that is compressed too, the target is y + (s − ŝ)/γ: the site repairs what the shortcut lost, γ being the slope of
the batch norm in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_prune.correction.least_squares import (
    DualNormalEquations,
    NormalEquations,
    dual_normal_equations,
    normal_equations,
)
from dist_prune.correction.solver import Solver
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.network.replay import AnyPass, Route
from dist_prune.network.sites import Site, View, output_rows
from dist_prune.statistics.moments import Accumulator, StatisticsError, sum_moments
from dist_prune.statistics.precision import full_float32
from dist_prune.statistics.probes import Loss, kl
from dist_prune.utils.paired import standard_error

Rows = tuple[Tensor, Tensor]  # x̂ and t as columns, (g·d, images, positions) and (g·c, images, positions)
CLEARLY = 3.0  # standard errors
WIDEST = 1 << 14  # dimensions of rows (x̂, t): wider ones would fill the memory with their matrices


@dataclass
class Pair:
    """The dense and the compressed network's passes over one batch; `held`: it is of the holdout."""

    dense: AnyPass
    compressed: AnyPass
    logits: Tensor | None = None

    @property
    def held(self) -> bool:
        """Whether its images are of the holdout."""
        return self.logits is not None


@dataclass(frozen=True)
class SiteCorrection:
    """What became of one site: the held-out KL of each layer tried, in nats per image, and the one chosen."""

    site: str
    tried: Mapping[str, float]
    chosen: str
    rows: int


def left_out(sites: Sequence[Site], route: Route, widest: int = WIDEST) -> dict[str, str]:
    """Sites that stay as they are, and why."""
    wide = [site for site in sites if site.inputs + site.width > widest]
    why = {s.name: f"{s.inputs} + {s.width} dimensions, more than {widest}" for s in wide}
    return why | {s.name: "not called exactly once" for s in sites if s.name not in route.stops}


@dataclass
class Correction:
    """Everything the walk needs.

    `metrics` are the Fisher metrics of the sites' outputs, (g, c, c). `dense` is the network that `compressed` was
    made from: where channels were removed before, without those, and `outputs` says which are left of a site's.
    `loss` is that of the holdout.
    """

    program: Route
    dense: nn.Module
    compressed: nn.Module
    pairs: Sequence[Pair]
    metrics: Mapping[str, Tensor]
    solver: Solver
    world: World
    positions: int = 0
    seed: int = 0
    memory: int = 1 << 60
    loss: Loss = kl
    widest: int = WIDEST
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, sites: Sequence[Site], solved: Collection[str] = ()) -> Iterator[SiteCorrection]:
        """Solve the sites that the program stops at, in its order, each in place; yields after each.

        Those already `solved`, whose layers the compressed network has, are walked past.
        """
        by_name = {site.name: site for site in sites}
        past = {*solved, *left_out(sites, self.program, self.widest)}
        for name in self.program.stops:
            if name not in past:
                with full_float32(), torch.no_grad():
                    yield self._site(by_name[name])

    def _site(self, site: Site) -> SiteCorrection:
        normal = self._normal(site)
        present = self.compressed.get_submodule(site.name)
        tried = {"kept": present} | self._solutions(site, present, normal)
        losses, errors = self._holdout_kls(site, list(tried.values()))
        chosen = choose(losses, errors)
        best = list(tried.values())[chosen]
        present.load_state_dict(best.state_dict())
        return SiteCorrection(site.name, dict(zip(tried, losses, strict=True)), list(tried)[chosen], normal.rows)

    def _solutions(
        self, site: Site, present: nn.Module, normal: NormalEquations | DualNormalEquations
    ) -> dict[str, nn.Module]:
        """Rank 0 solves; all ranks get the same layers."""
        dense, found = self.dense.get_submodule(site.name), {}
        for name in self.solver.names(present):
            if self.world.is_first:
                found[name] = self.solver.solve(name, present, dense, site, normal, self.metrics[site.name])
            else:
                found[name] = copy.deepcopy(present)
        self.world.broadcast_(*(p.data for module in found.values() for p in module.parameters()))
        return found

    def _normal(self, site: Site) -> NormalEquations | DualNormalEquations:
        """Advance all passes to the site, and sum the normal equations over images and ranks."""
        if 2 * self._rows_to_come(site) <= site.inputs:
            return self._few(site)
        width = site.inputs + site.width
        accumulator = Accumulator(site.groups, width, self.world.device)
        for x, target in _together(self._rows(site), width):
            accumulator.add(x, target)
        joint = sum_moments({site.name: accumulator.moments()}, self.world)[site.name]
        return normal_equations(joint, site.inputs)

    def _rows_to_come(self, site: Site) -> int:
        """Rows of all ranks, if the network calls the site for every image."""
        images = torch.tensor(sum(len(pair.dense.images) for pair in self.pairs if not pair.held))
        self.world.sum_(images)
        return int(images) * min(site.rows, self.positions or site.rows)

    def _few(self, site: Site) -> DualNormalEquations:
        """The rows of all ranks, as they are: fewer numbers than their products."""
        mine = [_joined(site, *rows) for rows in self._rows(site)]
        parts = self.world.gather(torch.cat(mine, 1).cpu() if mine else None)
        found = [part for part in parts if part is not None]
        if not found or not all(torch.isfinite(part.sum()) for part in found):
            raise StatisticsError(f"{site.name}: no image reaches it, or NaN or infinity does; check the weights")
        return dual_normal_equations(torch.cat(found, 1).to(self.world.device), site.groups, site.inputs)

    def _rows(self, site: Site) -> Iterator[Rows]:
        """Rows of the images to solve from."""
        for pair in self.pairs:
            x, target = self._advance(site, pair)
            if not pair.held:
                if len(x) == len(target) > 0:  # else one network, or both, did not call the site
                    yield from self._columns(site, x, target)
                self._spare(pair)

    def _spare(self, pair: Pair) -> None:
        """Beyond the memory allowed, drop what the pair has computed: it will start from the images again."""
        if sum(each.dense.bytes + each.compressed.bytes for each in self.pairs) > self.memory:
            pair.dense.restart()
            pair.compressed.restart()

    def _advance(self, site: Site, pair: Pair) -> tuple[Tensor, Tensor]:
        """What the site is given in the compressed network, and what it should give."""
        place = self.program.stops[site.name]
        pair.dense.advance(place)
        pair.compressed.advance(place)
        lost = self._lost_by_the_shortcut(site, pair) if site.name in self.program.shortcuts else None
        target = pair.dense.output_of(site.name)
        repaired = target if lost is None else target + lost
        fits = repaired.shape == target.shape  # not where the addition repeats the output over positions
        wanted = repaired if fits else target
        if site.name in self.outputs:
            axis = 1 if site.kind == "conv" else -1
            wanted = wanted.index_select(axis, self.outputs[site.name].to(wanted.device))
        return pair.compressed.input_of(site.name), wanted

    def _lost_by_the_shortcut(self, site: Site, pair: Pair) -> Tensor:
        """(s − ŝ)/γ; nothing in channels whose slope γ is far below the others'."""
        lost = pair.dense.shortcut_of(site.name) - pair.compressed.shortcut_of(site.name)
        norm = self.program.shortcuts[site.name].affine
        if not norm:
            return lost
        affine = self.dense.get_submodule(norm)
        assert isinstance(affine, nn.BatchNorm2d) and affine.running_var is not None
        slope = (affine.running_var + affine.eps).rsqrt()
        slope = slope if affine.weight is None else slope * affine.weight
        usable = slope.abs() > 1e-2 * slope.abs().median()
        return lost * torch.where(usable, 1 / slope, 0)[:, None, None]

    def _columns(self, site: Site, x: Tensor, target: Tensor) -> Iterator[Rows]:
        view, module = View(site, "input"), self.dense.get_submodule(site.name)
        for chunk in view.chunks(target, len(target)):
            rows, wanted = view.rows(module, x[chunk]), output_rows(site, target[chunk])
            chosen = self._chosen(rows.shape[-1])
            yield rows[..., chosen], wanted[..., chosen]

    def _chosen(self, positions: int) -> Tensor | slice:
        """A seeded subset of the positions."""
        if not self.positions or positions <= self.positions:
            return slice(None)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(positions, generator=generator)[: self.positions].to(self.world.device)

    def _holdout_kls(self, site: Site, layers: Sequence[nn.Module]) -> tuple[list[float], list[float]]:
        """Held-out KL to the dense network with each layer in place and everything after it dense.

        Beside it, the standard error of its difference to that of the first layer, of the same images.
        """
        sums = torch.zeros(2, len(layers), dtype=torch.float64, device=self.world.device)
        count = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for pair in self.pairs:
            if pair.logits is not None:
                x, wanted = pair.compressed.input_of(site.name), pair.logits.double()
                outcomes = (pair.compressed.outcome(self.dense, layer(x)) for layer in layers)
                kls = torch.stack([self.loss(wanted, logits_of(outcome)) for outcome in outcomes]).double()
                sums += torch.stack([kls.sum(1), (kls - kls[0]).square().sum(1)])
                count += len(wanted)
        self.world.sum_(sums, count)
        total, squares = sums
        errors = standard_error(total - total[0], squares, count)
        return (total / count).nan_to_num(nan=math.inf).tolist(), errors.nan_to_num(nan=math.inf).tolist()


def choose(losses: Sequence[float], errors: Sequence[float]) -> int:
    """Which layer to take: the best of those solved, unless the present one, the first, is clearly better.

    The holdout is small. To keep what is better by chance leaves layers unsolved, and that adds up over a network.

    Args:
        losses: held-out KL with each layer.
        errors: standard errors of their differences to the first.
    """
    best = min(range(1, len(losses)), key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        return 0
    return 0 if losses[best] - losses[0] > CLEARLY * errors[best] else best


def _together(parts: Iterable[Rows], least: int) -> Iterator[Rows]:
    """Join batches until they have `least` rows: to add a product to the sums costs as much as that many."""
    waiting: list[Rows] = []
    for part in parts:
        waiting.append(part)
        if sum(target[0].numel() for _, target in waiting) >= least:
            yield _chained(waiting)
            waiting = []
    if waiting:
        yield _chained(waiting)


def _chained(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    x, target = (torch.cat(blocks, 1) for blocks in zip(*parts, strict=True))
    return x, target


def _joined(site: Site, x: Tensor, target: Tensor) -> Tensor:
    """(g·(d + c), images, positions)."""
    return torch.cat([block.view(site.groups, -1, *block.shape[1:]) for block in (x, target)], 1).flatten(0, 1)
