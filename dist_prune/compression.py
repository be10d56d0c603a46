"""A compressed network and what it came to: how a plan is followed, and what can be done with the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dist_prune.artifacts.saved_model import Description, save_new
from dist_prune.config.arguments import arguments_named, as_rule, naming_arguments, require_one_of
from dist_prune.config.flags import ConfigError, parse_rule
from dist_prune.config.images import ImageSpec
from dist_prune.correction import correct as correction
from dist_prune.correction.calibration import divergence, holdout_logits
from dist_prune.data.batches import BatchesError, Reading, checked
from dist_prune.distributed.alone import present
from dist_prune.distributed.world import World
from dist_prune.export.formats import OPSET, ExportError
from dist_prune.export.int8 import FEWEST, CalibrationImages, require_int8
from dist_prune.export.int8_at_hand import write_int8
from dist_prune.export.samples import Samples
from dist_prune.export.writers import WRITERS, Exportable, Format, require_free
from dist_prune.factorization.plan import Cost, Plan
from dist_prune.factorization.project import project
from dist_prune.factorization.release import release
from dist_prune.factorization.spectra import UNITS, unit_of
from dist_prune.network.channels import KeptChannels
from dist_prune.network.inputs import InputPacking
from dist_prune.network.outputs import unanswering
from dist_prune.network.sites import evaluating
from dist_prune.run.collected import Collected, Measure
from dist_prune.run.planned import Planned, planned
from dist_prune.utils.caller import bar, undisturbed, warn

SAMPLE = 8  # images that an exported network is compared on
Ranks = str | float | Mapping[str, int | str] | Plan | Path


@dataclass(frozen=True, repr=False)
class Compression:
    """A compressed network and what it came to; printed, a table of all layers with the totals.

    Copied deeply, it shares its statistics with the copy; pickled, it leaves them behind, and cannot `replan`.

    `dense` and `compressed` are the networks' own multiply-adds, of one image, and parameters, as counted in them.
    `predicted` is the loss that the plan expects, in `unit`, of all sites together; None where the method does not
    predict. `lost_projected` and `lost` are what the images held out, every eighth one, lose before and after
    correction: KL(dense ‖ compressed) of the softmax, nats per image, or where `measure` is `mse` half the squared
    change of the outputs, summed over channels; the mean over positions, where there are several.
    """

    model: nn.Module
    plan: Plan
    dense: Cost
    compressed: Cost
    unit: str
    measure: Measure
    lost_projected: float
    lost: float
    table: str
    _collected: Collected | None = field(compare=False)
    _classes: int
    _sample: Tensor
    _packing: InputPacking | None = None

    @property
    def predicted(self) -> float | None:
        """`Plan.loss`: of all sites and narrow groups together."""
        return self.plan.loss

    @property
    def kept(self) -> tuple[KeptChannels, ...]:
        """The groups of channels that became narrower, with the channels that stay."""
        return self.plan.kept

    @property
    def kl_projected(self) -> float | None:
        """Before correction; None where the measure is another."""
        return self.lost_projected if self.measure == "kl" else None

    @property
    def kl(self) -> float | None:
        """`lost`; None where the measure is another."""
        return self.lost if self.measure == "kl" else None

    def __repr__(self) -> str:
        return self.summary()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_collected": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        return replace(self, model=copy.deepcopy(self.model, memo))

    def summary(self) -> str:
        """A table of all layers with the totals, and what the images held out say."""
        steps = [f"{self.predicted:.4g} predicted"] if self.unit == UNITS[self.measure] else []
        steps += [f"{self.lost_projected:.4g} projected", f"{self.lost:.4g} in the end"]
        return f"{self.table}\nheld-out {UNITS[self.measure]} to the dense network: {', '.join(steps)}"

    def replan(self, ranks: Ranks) -> Compression:
        """The same network at other ranks, from the same statistics, on every rank; otherwise as `compress`.

        Raises:
            ConfigError: it was pickled, without its statistics; or see `compress`.
        """
        if self._collected is None:
            raise ConfigError("the statistics stayed behind when this was pickled; call compress again")
        return compressed_from(self._collected, ranks)

    def export(
        self,
        path: str | Path,
        format: Format = "onnx",
        *,
        images: Tensor | None = None,
        opset: int = OPSET,
        overwrite: bool = False,
    ) -> str:
        """Write the network for use without this package, read it back and compare; as `dist-prune export`.

        Args:
            path: a file.
            format: `onnx`, `torch-export`, `state-dict` or `python`.
            images: (n, …) to compare on, three or more; by default some that the network was corrected from, as
                always where it takes several inputs.
            opset: of ONNX.
            overwrite: replace a file that is there.

        Returns:
            What was written, and how far it is from PyTorch.

        Raises:
            CheckpointError: there is a file already, or it cannot be written.
            ExportError: the network cannot be written like that, or what was written computes something else.
        """
        with arguments_named():
            require_one_of("format", format, get_args(Format))
            if images is not None and self._packing:
                raise ExportError(f"images: the network takes several inputs ({self._packing}); leave them out")
            sample = self._sample if images is None else images
            chosen = Samples(sample.cpu(), "images that were given", self._packing)
            network = copy.deepcopy(self.model).cpu()
            given = Exportable(network, self._description(""), lambda: chosen, opset, overwrite)
            return WRITERS[format](given, Path(path))

    def export_int8(
        self,
        path: str | Path,
        images: Iterable[Any] | None = None,
        *,
        validation: Iterable[Any] | None = None,
        opset: int = OPSET,
        overwrite: bool = False,
    ) -> str:
        """Write the network as ONNX in 8-bit integers, and measure what that costs.

        Warns of more than a point of top-1 below float32; without labels, of more than one answer in a hundred to
        the images held out that has another top-1.

        Args:
            path: a file.
            images: batches as `fit` takes them, eight images or more, to find the ranges of activations on; every
                eighth is held out, and chooses among onnxruntime's methods. By default the images that the
                network was corrected from.
            validation: batches with labels, on which top-1 is measured in float32 and in 8-bit integers.
            opset: of ONNX, 13 or more.
            overwrite: replace a file that is there.

        Returns:
            What was written, and how far it is from float32.

        Raises:
            BatchesError: images or validation that cannot be used.
            CheckpointError: there is a file already, or it cannot be written.
            ExportError: the network cannot be written like that, or takes several inputs.
        """
        with arguments_named():
            require_int8(opset)
            require_free(overwrite, Path(path))
            if self._packing:
                raise ExportError(f"int8 is of networks of images alone; this one takes {self._packing}")
            chosen, network = self._calibration(images), copy.deepcopy(self.model).cpu()
            found = write_int8(Path(path), network, chosen, self.measure, opset, validation)
        if found.concern:
            warn(found.concern)
        return f"written to {path}, {found}"

    def _calibration(self, images: Iterable[Any] | None) -> CalibrationImages:
        """Those given, or those that the network was corrected from."""
        if images is None:
            if self._collected is None:
                raise ConfigError("images: those of the correction stayed behind when this was pickled; give some")
            known = self._collected.images
            return CalibrationImages(known.prepare(known.pixels).cpu())
        batches, _ = checked(images, Reading())
        pixels = torch.cat([batch.images.cpu() for batch in batches])
        if len(pixels) < FEWEST:
            raise BatchesError(f"images: {len(pixels)}; int8 is calibrated on {FEWEST} or more, better hundreds")
        return CalibrationImages(pixels)

    def save(self, folder: str | Path, arch: str = "") -> None:
        """Write what `load_compressed` reads, into a folder that holds no network yet.

        Args:
            folder: made where there is none.
            arch: how to build the dense network, as `--arch`: a torchvision or timm name, or `file.py:function`.
                Without it, `load_compressed` must be given such a network.

        Raises:
            CheckpointError: there is a network already, or the folder cannot be written.
        """
        save_new(Path(folder), self.model, self._description(arch))

    def _description(self, arch: str) -> Description:
        spec = ImageSpec(0, 1 if self._packing else self._sample.shape[-1])
        inputs = self._packing.names if self._packing else ()
        return Description(arch, self._classes, spec, (), self.plan, kept=self.kept, inputs=inputs)


def plan_from(collected: Collected, ranks: Ranks) -> Plan:
    """The plan of a network at these ranks, on every rank."""
    with undisturbed(collected.device), arguments_named():
        return planned(collected, as_plan(ranks), present(collected.device)).plan


def compressed_from(collected: Collected, ranks: Ranks) -> Compression:
    """The network at these ranks, on every rank."""
    with undisturbed(collected.device), arguments_named():
        world = present(collected.device)
        return _followed(planned(collected, as_plan(ranks), world), world)


def as_plan(ranks: Ranks) -> str | Plan:
    """A plan, where one is given or in a file, else a rule as `--ranks` has it.

    Raises:
        ConfigError, PlanError: neither.
    """
    if isinstance(ranks, Plan) and (ranks.factored or ranks.kept):
        return ranks
    if isinstance(ranks, Path) and ranks.is_dir():
        return Plan.load(ranks)
    rule = as_rule(ranks)
    found = parse_rule(rule)
    return Plan.load(found.file) if found.kind == "file" else rule


def _followed(ready: Planned, world: World) -> Compression:
    """Projected, corrected and released."""
    collected, source, plan = ready.collected, ready.source, ready.plan
    basis, (nested, _) = collected.run.compression.basis, ready.directions
    network = project(source.model, source.found.sites, source.bases, plan, basis.side, nested).eval()
    before, after = _corrected(ready, network, world)
    cost = release(network, collected.image)
    world.broadcast_(*network.state_dict().values())  # equal already, but for processors of several kinds
    network = unanswering(network, collected.given_model)
    return Compression(
        network,
        plan,
        dense=ready.plans.before,
        compressed=cost,
        unit=unit_of(basis),
        measure=collected.measure,
        lost_projected=before,
        lost=after,
        table=ready.table,
        _collected=collected,
        _classes=collected.everything.classes,
        _sample=collected.images.prepare(collected.images.pixels[:SAMPLE]).cpu(),
        _packing=collected.given.packing,
    )


def _corrected(ready: Planned, network: nn.Module, world: World) -> tuple[float, float]:
    """Correct the compressed network in place, if that is wanted; the held-out loss before and after."""
    collected, source, model = ready.collected, ready.source, ready.dense
    images, run = collected.images, collected.run
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
            kept=ready.plan.kept,
            loss=collected.measure,
            after_site=lambda _: step(),
        )
    for text in result.notes:
        warn(naming_arguments(text))
    return result.before, result.kept.kl if result.kept else result.before
