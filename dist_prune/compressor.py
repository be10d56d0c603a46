"""Statistics of a network collected once, for any number of budgets; with scikit-learn's conventions."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from torch import nn

from dist_prune.compression import Compression, Ranks, as_plan, compressed_from, plan_from
from dist_prune.config.arguments import arguments_named, as_patterns, require_one_of
from dist_prune.config.compression import BLIND, CompressionConfig, Method, MethodConfig, Side
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import BUDGETS, ConfigError, did_you_mean
from dist_prune.config.run import Run, require_views
from dist_prune.config.training import TuningConfig
from dist_prune.correction.correct import FEWEST
from dist_prune.data.batches import Reading, keep
from dist_prune.distributed.alone import present
from dist_prune.factorization.plan import Cost, Plan
from dist_prune.network.inputs import Inputs
from dist_prune.network.layers import unwrapped
from dist_prune.network.outputs import Outputs
from dist_prune.network.sites import SiteError
from dist_prune.run.collected import Collected, collect
from dist_prune.utils.caller import undisturbed
from dist_prune.utils.memory import held_bytes

Correct = Literal["none", "refit", "regression"]
Width = Literal["auto", "on", "off"]
Loss = Literal["mse", "kl", "kl-reverse"]


@dataclass(eq=False, kw_only=True)
class Compressor:
    """Compresses one network to any number of budgets: `fit`, then `plan` and `compress` as often as wanted.

    Arguments are kept as they are given and looked at by `fit`. In a process that is in a process group, every
    rank calls `fit`, `plan` and `compress`, with the same arguments and its own share of the images: statistics
    are summed over the ranks, and all end with the same result.

    Args:
        method: as `--method`: where the directions to keep come from; `gradient` needs labels.
        side: of a layer, whose directions are kept.
        sites: as `--sites`: which layers; names and patterns, in one text or a list.
        ignored: layers that stay as they are, with all that is in them: modules, names, or patterns of names.
        forms: as `--forms`: what a layer can become where ranks come from a budget.
        width: as `--width`: whether hidden channels are removed, too, where ranks come from a budget.
        search: as `--search`: how many plans are tried where ranks come from a budget; 0: none.
        correct: as `--correct`: whether the layers are solved again against the given network.
        calibrate_images: how many images to solve from, spread over all; an eighth of them is held out.
        seed: of random draws.
        round_to: ranks are multiples of this; 0: as `--round-to`.
        bf16: the network will run in bfloat16 autocast: a budget of latency is timed in it.
        loss: what counts, for `fisher`, `hessian-*`, the correction and its figures: KL of the softmax, or, for
            features and regressions, half the squared change.
        draws: random gradients an image; 0: all classes, exactly.
        damping: added to the metric of `fisher`, as a share of its largest eigenvalue.
        probes: images that `hessian-global` tries.
        ridge: as `--ridge`: pull to the dense weights.
        metric_damping: as `--metric-damping`; of several, the best on the images held out is taken.
        repair: as `--repair`: how much later layers repair of what earlier ones lose.
        mirrored: solve from the mirror images, too.
        crops: as `--crops`: solve from so many random crops of each image, too.
        statistics_views: statistics of the mirror images and crops, too, not of the images alone.
        resolve_dense: solve the layers that stay dense, too.
        outputs: a function of what the network returns: the tensor that counts. Without it that is the tensor
            returned; of a mapping, dataclass, tuple or list `logits`, `out` or the only tensor; of several in a
            tuple or list the first, if that is (n, classes).
        inputs: a function of a batch: what the network is called with for it, (args, kwargs); for a network of
            several inputs. Without it, a batch that is a mapping is passed as keywords. Tensors have the images
            along their first dimension; `labels` among the keywords are labels, and not passed on.
        progress: a bar on the standard error output; None: if that is a terminal.
    """

    method: Method = "fisher"
    side: Side = "output"
    sites: str | Sequence[str] = "*"
    ignored: str | nn.Module | Sequence[str | nn.Module] = ()
    forms: str | Sequence[str] = "auto"
    width: Width = CompressionConfig.width
    search: int = CompressionConfig.search
    correct: Correct = "regression"
    calibrate_images: int = CorrectionConfig.calibrate_images
    seed: int = 0
    round_to: int = 0
    bf16: bool = False
    loss: Loss = MethodConfig.loss
    draws: int = MethodConfig.draws
    damping: float = MethodConfig.damping
    probes: int = MethodConfig.probes
    ridge: float = CorrectionConfig.ridge
    metric_damping: float | Sequence[float] = CorrectionConfig.metric_damping
    repair: float = CorrectionConfig.repair
    mirrored: bool = CorrectionConfig.mirrored
    crops: int = CorrectionConfig.crops
    statistics_views: bool = MethodConfig.statistics_views
    resolve_dense: bool = CorrectionConfig.resolve_dense
    outputs: Outputs | None = None
    inputs: Inputs | None = None
    progress: bool | None = None
    _collected: Collected | None = field(default=None, init=False, repr=False)

    def fit(self, model: nn.Module, batches: Iterable[Any], ranks: Ranks | None = None) -> Self:
        """Collect the statistics; the network stays as it is, and is refused later where it has changed.

        Args:
            model: returns logits (n, classes) of two classes or more, or (n, classes, …) of several positions, as
                a segmentation; or with `loss="mse"` anything (n, …). Works where its parameters are, CPU or CUDA.
                Compiled and DDP-wrapped networks are taken out of their wrapping.
            batches: of what the network takes: tensors (n, …), or tuples or lists of such a tensor and labels (n,)
                int64; mappings of keyword arguments; or what `inputs` makes arguments of. Gone through once and
                kept in memory, where they are.
            ranks: all that will be asked for, if that is known: refused here if it is out of reach, and nothing is
                collected that it does not need.

        Raises:
            BatchesError: no batches, fewer than 8 images, or not what the network takes.
            ConfigError, PlanError, SiteError: an invalid argument, or one that does not fit this network.
            ModelError, CopyError: no logits, or several tensors that could be; no layers that could be replaced,
                or a network that cannot be copied.
            CorrectionError: the network answers the same images differently each time.
            StatisticsError: NaN or infinity, labels missing or too high, or gradients that do not reach a layer.
            RankError: another rank failed, or holds another network.

        Layers with fewer rows than dimensions are warned of. See launch/README.md for the methods.
        """
        with arguments_named():
            asked = None if ranks is None else as_plan(ranks)
            network = unwrapped(model)
            run = self._run(network, asked)
            device = next(network.parameters()).device
            with undisturbed(device):
                world = present(device)
                given = keep(batches, device, world, FEWEST, Reading(self.inputs, _first_argument(network)))
                self._collected = collect(run, network, self.outputs, given, asked, world, self.progress)
        return self

    def plan(
        self,
        ranks: Ranks | None = None,
        *,
        macs: float | None = None,
        params: float | None = None,
        latency: float | None = None,
    ) -> Plan:
        """What each layer would become: to be printed, edited, saved and handed to `compress`.

        Args:
            ranks: as of `dist_prune.compress`; or one of the others, a share of the dense network's:
            macs: multiply-adds.
            params: parameters.
            latency: time, as measured here.

        Raises:
            ConfigError, PlanError, WidthError: none or several of them, or out of reach.
            NotFittedError: scikit-learn's; `fit` comes first.
        """
        shares = {"macs": macs, "params": params, "latency": latency}
        given = [f"budget:{name}={float(share)!r}" for name, share in shares.items() if share is not None]
        asked = [*given, *([] if ranks is None else [ranks])]
        if len(asked) != 1:
            raise ConfigError(f"plan was given {len(asked)} budgets; expected one of ranks, {', '.join(BUDGETS)}")
        return plan_from(self._fitted(), asked[0])

    def compress(self, plan: Ranks) -> Compression:
        """A copy of the network, compressed as planned and corrected.

        Args:
            plan: of `plan`, edited or not, or what that takes as `ranks`.

        Raises:
            ConfigError, PlanError, WidthError: it does not fit this network.
            UnsoundError: the compressed network would not be finite.
            NotFittedError: scikit-learn's; `fit` comes first.
        """
        return compressed_from(self._fitted(), plan)

    # ── what is known after fit ────────────────────────────────────────────────────────────────────────────

    @property
    def sites_(self) -> tuple[str, ...]:
        """The layers that can be compressed, in execution order."""
        return tuple(site.name for site in self._fitted().found.sites)

    @property
    def skipped_(self) -> dict[str, str]:
        """The layers that stay dense, and why."""
        return {each.name: each.reason for each in self._fitted().found.skipped}

    @property
    def staying_(self) -> dict[str, str]:
        """Layers whose channels, and attention whose heads, no budget can remove, and why."""
        found = self._fitted()
        channels = {name: each.reason for each in found.possible.staying for name in each.producers}
        return {**channels, **found.attention}

    @property
    def dense_(self) -> Cost:
        """Multiply-adds of one image, and parameters, of the network as it was given."""
        found = self._fitted().everything
        return Cost(found.macs, found.params)

    @property
    def memory_(self) -> int:
        """Bytes that this object keeps alive: batches, statistics, directions; without the network's own."""
        collected = self._fitted()
        return held_bytes(collected, without=(collected.given_model, collected.model))

    def _fitted(self) -> Collected:
        if self._collected is None:
            from sklearn.exceptions import NotFittedError  # noqa: PLC0415  takes a second to import

            raise NotFittedError("this Compressor has no statistics yet; call fit(model, batches) first")
        return self._collected

    # ── scikit-learn's parameters ──────────────────────────────────────────────────────────────────────────

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments by name; `deep` is there for scikit-learn, as none holds arguments of its own."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def set_params(self, **params: Any) -> Self:  # noqa: ANN401  any argument
        """Change arguments, for the next `fit`.

        Raises:
            ConfigError: a name that is none; close ones are offered.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ConfigError(
                    f"Compressor has no argument {name}; {did_you_mean(name, known, ', '.join(known))}"
                )
            setattr(self, name, value)
        return self

    # ── settings ───────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, network: nn.Module, asked: str | Plan | None) -> Run:
        require_one_of("method", self.method, [name for name in get_args(Method) if name != "random-init"])
        require_one_of("side", self.side, get_args(Side))
        require_one_of("width", self.width, get_args(Width))
        require_one_of("correct", self.correct, get_args(Correct))
        require_one_of("loss", self.loss, get_args(Loss))
        dampings = self.metric_damping if isinstance(self.metric_damping, Sequence) else (self.metric_damping,)
        basis = MethodConfig(
            method=self.method,
            side=self.side,
            loss=self.loss,
            draws=self.draws,
            probes=self.probes,
            damping=self.damping,
            statistics_views=self.statistics_views,
        )
        correction = CorrectionConfig(
            self.correct,
            self.calibrate_images,
            metric_damping=tuple(dampings),
            ridge=self.ridge,
            repair=self.repair,
            mirrored=self.mirrored,
            crops=self.crops,
            resolve_dense=self.resolve_dense,
        )
        usual = "uniform:0.5" if self.method in BLIND else "budget:macs=0.5"
        compression = CompressionConfig(
            basis,
            asked if isinstance(asked, str) else usual,
            forms=as_patterns(self.forms),
            sites=",".join([as_patterns(self.sites), *_without(network, self.ignored)]),
            round_to=self.round_to,
            width="off" if isinstance(asked, Plan) else self.width,
            search=self.search,
        )
        tuning = TuningConfig(bf16=self.bf16)  # nothing is tuned here, but latency is of that precision
        run = Run(compression=compression, correction=correction, tuning=tuning, seed=self.seed)
        require_views(run)
        return run


def _first_argument(network: nn.Module) -> str:
    return next(iter(inspect.signature(network.forward).parameters), "")


def _without(network: nn.Module, ignored: str | nn.Module | Sequence[str | nn.Module]) -> list[str]:
    """Patterns that leave out these layers and all that is in them.

    Raises:
        SiteError: none of the network's modules; close names are offered.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    names: list[str] = []
    for each in [ignored] if isinstance(ignored, str | nn.Module) else ignored:
        if isinstance(each, nn.Module):
            found = [name for name, module in modules.items() if module is each]
            if not found:
                raise SiteError(f"ignored: a {type(each).__name__} that is no module of this network")
            names += found
        else:
            if not fnmatch.filter(modules, each):
                raise SiteError(
                    f"ignored: no layer is called {each}; {did_you_mean(each, modules, 'see named_modules()')}"
                )
            names.append(each)
    return [f"!{name}{inside}" for name in names for inside in ("", ".*")]
