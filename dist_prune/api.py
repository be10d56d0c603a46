"""Compression of a network at hand, from batches at hand: no data folder, no run directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from dist_prune.artifacts.saved_model import Description, save_new
from dist_prune.config.arguments import arguments_named, as_patterns, as_rule, naming_arguments, require_one_of
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import CompressionConfig, ImageSpec, Method, MethodConfig, Run, Side
from dist_prune.correction import correct as correction
from dist_prune.correction.correct import FEWEST, divergence, holdout_logits
from dist_prune.data.batches import keep
from dist_prune.distributed.alone import present
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Cost, Plan
from dist_prune.factorization.project import project
from dist_prune.factorization.release import release
from dist_prune.factorization.spectra import UNITS, unit_of
from dist_prune.network.channels import KeptChannels
from dist_prune.network.layers import unwrapped
from dist_prune.network.outputs import Outputs, unanswering
from dist_prune.network.sites import evaluating
from dist_prune.run.collected import Collected, Measure, chosen_widths, collect, directions, narrowed
from dist_prune.utils.caller import bar, undisturbed, warn
from dist_prune.width.listing import format_widths

Correct = Literal["none", "refit", "regression"]


@dataclass(frozen=True, repr=False)
class Compression:
    """A compressed network and what it came to; printed, a table of all layers with the totals.

    `dense` and `compressed` are the networks' own multiply-adds, of one image, and parameters, as counted in them.
    `predicted` is the loss that the plan expects, in `unit`, of all sites together; None where the method does not
    predict. `lost_projected` and `lost` are what the images held out, every eighth one, lose before and after
    correction: KL(dense ‖ compressed) of the softmax, nats per image, or where `measure` is `mse` half the squared
    change of the outputs, summed over channels; the mean over positions, where there are several. `kept` are the
    groups of channels that became narrower, with the channels that stay.
    """

    model: nn.Module
    plan: Plan
    dense: Cost
    compressed: Cost
    predicted: float | None
    unit: str
    measure: Measure
    lost_projected: float
    lost: float
    kept: tuple[KeptChannels, ...]
    table: str
    _collected: Collected = field(compare=False)

    @property
    def kl_projected(self) -> float | None:
        """Before correction; None where the measure is another."""
        return self.lost_projected if self.measure == "kl" else None

    @property
    def kl(self) -> float | None:
        """`lost`; None where the measure is another."""
        return self.lost if self.measure == "kl" else None

    def __repr__(self) -> str:
        steps = [f"{self.predicted:.4g} predicted"] if self.unit == UNITS[self.measure] else []
        steps += [f"{self.lost_projected:.4g} projected", f"{self.lost:.4g} in the end"]
        return f"{self.table}\nheld-out {UNITS[self.measure]} to the dense network: {', '.join(steps)}"

    def replan(self, ranks: Ranks) -> Compression:
        """The same network at other ranks, from the same statistics, on every rank; otherwise as `compress`."""
        with undisturbed(self._collected.device), arguments_named():
            return _compress(self._collected, as_rule(ranks), present(self._collected.device))

    def save(self, folder: str | Path, arch: str = "") -> None:
        """Write what `load_compressed` reads, into a folder that holds no network yet.

        Args:
            folder: made where there is none.
            arch: how to build the dense network, as `--arch`: a torchvision or timm name, or `file.py:function`.
                Without it, `load_compressed` must be given such a network.

        Raises:
            CheckpointError: there is a network already, or the folder cannot be written.
        """
        classes, spec = self._collected.everything.classes, ImageSpec(0, self._collected.image.shape[-1])
        save_new(Path(folder), self.model, Description(arch, classes, spec, (), self.plan, kept=self.kept))


Ranks = str | float | Mapping[str, int | str] | Plan | Path


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Ranks = "budget:macs=0.5",
    *,
    method: Method = "fisher",
    side: Side = "output",
    sites: str | Sequence[str] = "*",
    forms: str | Sequence[str] = "auto",
    width: Literal["auto", "on", "off"] = CompressionConfig.width,
    correct: Correct = "regression",
    calibrate_images: int = CorrectionConfig.calibrate_images,
    seed: int = 0,
    round_to: int = 0,
    loss: Literal["mse", "kl", "kl-reverse"] = MethodConfig.loss,
    draws: int = MethodConfig.draws,
    damping: float = MethodConfig.damping,
    probes: int = MethodConfig.probes,
    ridge: float = CorrectionConfig.ridge,
    metric_damping: float | Sequence[float] = CorrectionConfig.metric_damping,
    repair: float = CorrectionConfig.repair,
    mirrored: bool = CorrectionConfig.mirrored,
    resolve_dense: bool = CorrectionConfig.resolve_dense,
    outputs: Outputs | None = None,
    progress: bool | None = None,
) -> Compression:
    """Replace layers of a network by low-rank ones; the given network stays as it is.

    In a process that is in a process group, every rank calls this with the same network and arguments and with its
    own share of the images: statistics are summed over the ranks, and all end with the same result.

    Args:
        model: returns logits (n, classes) of two classes or more, or (n, classes, …) of several positions, as
            a segmentation; or with `loss="mse"` anything (n, …). Works where its parameters are, CPU or CUDA.
            Compiled and DDP-wrapped networks are taken out of their wrapping.
        batches: of what the network takes: tensors (n, …), or tuples or lists of such a tensor and labels (n,)
            int64. Gone through once and kept in memory, where they are.
        ranks: a share of the multiply-adds, `0.5`; ranks by site, `{"layer1.0.conv1": 8}`, or forms and ranks,
            `"vertical:8"`, `"tucker:8x16"`; a Plan; or as `--ranks`: `uniform:0.5`, `energy:0.95`,
            `budget:macs|params|latency=0.5`, `sites:NAME=RANK,…`, or a plan's file.
        method: as `--method`: where the directions to keep come from; `gradient` needs labels.
        side: of a layer, whose directions are kept.
        sites: as `--sites`: which layers; names and patterns, in one text or a list.
        forms: as `--forms`: what a layer can become where ranks come from a budget.
        width: as `--width`: whether hidden channels are removed, too, where ranks come from a budget.
        correct: as `--correct`: whether the layers are solved again against the given network.
        calibrate_images: how many images to solve from, spread over all; an eighth of them is held out.
        seed: of random draws.
        round_to: ranks are multiples of this; 0: as `--round-to`.
        loss: what counts, for `fisher`, `hessian-*`, the correction and its figures: KL of the softmax, or, for
            features and regressions, half the squared change.
        draws: random gradients an image; 0: all classes, exactly.
        damping: added to the metric of `fisher`, as a share of its largest eigenvalue.
        probes: images that `hessian-global` tries.
        ridge: as `--ridge`: pull to the dense weights.
        metric_damping: as `--metric-damping`; of several, the best on the images held out is taken.
        repair: as `--repair`: how much later layers repair of what earlier ones lose.
        mirrored: solve from the mirror images, too.
        resolve_dense: solve the layers that stay dense, too.
        outputs: a function of what the network returns: the tensor that counts. Without it that is the tensor
            returned; of a mapping, dataclass, tuple or list `logits`, `out` or the only tensor; of several in a
            tuple or list the first, if that is (n, classes).
        progress: a bar on the standard error output; None: if that is a terminal.

    Raises:
        BatchesError: no batches, fewer than 8 images, or not what the network takes.
        ConfigError, PlanError, SiteError: an invalid argument, or one that does not fit this network.
        ModelError, CopyError: no logits, or several tensors that could be; no layers that could be replaced, or a
            network that cannot be copied.
        CorrectionError: the network answers the same images differently each time.
        StatisticsError: NaN or infinity, labels missing or too high, or gradients that do not reach a layer.
        UnsoundError: the compressed network would not be finite.
        RankError: another rank failed, or holds another network.

    Layers with fewer rows than dimensions are warned of. See launch/README.md for the methods.
    """
    with arguments_named():
        require_one_of("method", method, [name for name in get_args(Method) if name != "random-init"])
        require_one_of("side", side, get_args(Side))
        require_one_of("width", width, ("auto", "on", "off"))
        require_one_of("correct", correct, get_args(Correct))
        require_one_of("loss", loss, ("mse", "kl", "kl-reverse"))
        basis = MethodConfig(method=method, side=side, loss=loss, draws=draws, probes=probes, damping=damping)
        dampings = tuple(metric_damping) if isinstance(metric_damping, Sequence) else (metric_damping,)
        settings = CorrectionConfig(
            correct,
            calibrate_images,
            metric_damping=dampings,
            ridge=ridge,
            repair=repair,
            mirrored=mirrored,
            resolve_dense=resolve_dense,
        )
        compression = CompressionConfig(
            basis,
            as_rule(ranks),
            forms=as_patterns(forms),
            sites=as_patterns(sites),
            round_to=round_to,
            width=width,
        )
        run = Run(compression=compression, correction=settings, seed=seed)
        network = unwrapped(model)
        device = next(network.parameters()).device
        with undisturbed(device):
            world = present(device)
            given = keep(batches, device, world, FEWEST)
            collected = collect(run, network, outputs, given, world, progress)
            return _compress(collected, compression.ranks, world)


def _compress(collected: Collected, ranks: str, world: World) -> Compression:
    plans, basis = collected.planner(ranks, world), collected.run.compression.basis
    if plans.needs_patches and not collected.patches:
        raise ConfigError(
            f"--ranks {ranks}: needs other forms than the statistics were collected for; begin with a budget"
        )
    channels = collected.channels if plans.rule.is_counted else None
    if channels is None:
        plans.check()
    nested, spectra = directions(collected, plans, world)
    source, kept, widths, dense, lost = collected, tuple[KeptChannels, ...](), "", plans.before, 0.0
    if channels is not None:
        choice = chosen_widths(collected, channels, plans, spectra, world)
        if choice.kept:
            source, kept, lost = narrowed(collected, choice.network, world), choice.kept, choice.loss
            widths = format_widths(kept, source.everything.macs / dense.macs, choice.loss) + "\n"
            plans = plans.within(source.found)
        plans.check()
        if choice.kept:
            nested, spectra = directions(source, plans, world)
    plan = world.from_first(lambda: plans.plan(spectra))
    network = project(source.model, source.found.sites, source.bases, plan, basis.side, nested).eval()
    before, after = _corrected(collected, source, kept, network, world)
    cost, unit = release(network, collected.image), unit_of(basis)
    world.broadcast_(*network.state_dict().values())  # equal already, but for processors of several kinds
    network = unanswering(network, collected.given_model)
    table = widths + plans.format_table(plan, {}, unit)
    predicted = None if plan.loss is None else plan.loss + lost
    measure = collected.measure
    return Compression(network, plan, dense, cost, predicted, unit, measure, before, after, kept, table, collected)


def _corrected(
    collected: Collected, source: Collected, kept: Sequence[KeptChannels], network: nn.Module, world: World
) -> tuple[float, float]:
    """Correct the compressed network in place, if that is wanted; the held-out loss before and after."""
    model, images, run = collected.model, collected.images, collected.run
    if run.correction.correct == "none":
        with evaluating(model), evaluating(network):
            before = divergence(network, holdout_logits(model, images), images.prepare, world, collected.measure)
        return before, before
    sites = correction.solvable(network, source.everything, run.correction)
    count = len(sites) * len(run.correction.dampings)
    with bar(count, "correction", "layer", collected.progress, world.is_first) as step:
        result = correction.correct(
            model,
            network,
            source.everything,
            images,
            run.correction,
            run.seed,
            world,
            source=source.model,
            kept=kept,
            loss=collected.measure,
            after_site=lambda _: step(),
        )
    for text in result.notes:
        warn(naming_arguments(text))
    return result.before, result.kept.kl if result.kept else result.before
