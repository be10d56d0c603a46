"""Where directions come from, and how far and into which forms layers are compressed. The fields are the flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_prune.config.flags import FORMS, Rule, budgets_of, parse_forms, parse_rule
from dist_prune.config.flags import require as _require

Method = Literal[
    "pca",
    "whitened-svd",
    "gradient",
    "hessian-global",
    "hessian-local",
    "fisher",
    "weight-svd",
    "random",
    "random-init",
]
Side = Literal["output", "input"]
DATA_FREE: tuple[Method, ...] = ("weight-svd", "random", "random-init")
BLIND: tuple[Method, ...] = ("random", "random-init")  # their directions are not ordered
COMPARABLE = ("fisher", "pca")  # whose losses are in one unit for all forms


@dataclass(frozen=True)
class MethodConfig:
    """Where the directions to keep come from, and what is measured for that."""

    method: Method = "pca"
    """pca: covariance; whitened-svd: second moment about zero, biases stay; gradient: of the task loss; fisher,
    hessian-local: curvature from one backward; hessian-global: curvature from trials; weight-svd, random: without
    data; random-init: untrained."""
    side: Side = "output"
    """Directions of a layer's outputs, or of its input patches."""
    loss: Literal["mse", "kl", "kl-reverse"] = "kl"
    """fisher, hessian-*: how a change of the network's output is measured."""
    greedy: bool = False
    """gradient: keep what is predicted to raise the loss when removed, not what matters most either way."""
    rank_loss: bool = False
    """hessian-global: use each loss's rank among all losses instead of its value."""
    sampled: bool = False
    """hessian-local: by sampling and double backward, site by site; slow, for comparison."""
    draws: int = 1
    """fisher, hessian-local: random gradients per image; 0: all classes, exactly, each with a backward pass."""
    probes: int = 1024
    """hessian-global, --sampled: how many images are tried, each along one random direction."""
    damping: float = 0.01
    """fisher: added to the metric, as a share of its largest eigenvalue."""
    statistics_images: int = 0
    """Training images (or of --calibrate-data) the statistics see; 0: all."""
    statistics_views: bool = False
    """Of the mirror images and crops, too, that --mirrored and --crops have the correction see: worth it where
    images are few, and as much longer as there are views."""
    loss_images: int = 512
    """fisher: of the statistics' images, those whose exact second-order losses the ranks are chosen by; 0: the
    metric alone, which takes errors of neighbouring positions as independent and predicts too little."""
    statistics: Path | None = None
    """Take the statistics from this file, of an earlier run's directory, instead of collecting them."""
    statistics_bf16: bool = False
    """Run the network in bfloat16 autocast for the statistics; the default on GPUs that compute in it."""
    statistics_float32: bool = False
    """Statistics in float32 on a GPU, too, their products without TF32."""
    chunk_mb: int = 128
    """Input side: memory for patches at a time, MiB."""

    def __post_init__(self) -> None:
        _require(self.statistics_images >= 0, f"--statistics-images {self.statistics_images}: expected ≥ 0")
        _require(self.loss_images >= 0, f"--loss-images {self.loss_images}: expected ≥ 0")
        _require(self.draws >= 0, f"--draws {self.draws}: expected 0 or more")
        _require(self.probes > 0, f"--probes {self.probes}: expected at least 1")
        _require(self.damping > 0, f"--damping {self.damping}: expected above 0")
        _require(self.chunk_mb > 0, f"--chunk-mb {self.chunk_mb}: expected at least 1")
        self._require_fitting("greedy", self.greedy, "gradient", "other methods have no sign to be greedy about")
        self._require_fitting("rank-loss", self.rank_loss, "hessian-global", "others sample no losses")
        self._require_fitting("sampled", self.sampled, "hessian-local", "other methods have no double backward")
        wrong_side = self.side == "input" and self.method in ("fisher", "whitened-svd")
        _require(not wrong_side, f"--method {self.method} is of outputs; on --side input use pca or hessian-local")
        for flag in ("statistics", "statistics_views"):
            unused = getattr(self, flag) and self.method in DATA_FREE
            text = f"--{flag.replace('_', '-')}: --method {self.method} uses none; leave it out"
            _require(not unused, text)
        rough = self.statistics_bf16 and (self.probing or self.method in DATA_FREE)
        _require(not rough, "--statistics-bf16: goes with pca, whitened-svd, gradient, fisher and hessian-local")
        both = self.statistics_bf16 and self.statistics_float32
        _require(not both, "--statistics-bf16 and --statistics-float32: expected one of them at most")

    @property
    def probing(self) -> bool:
        """Whether curvature comes from trials along random directions."""
        return self.method == "hessian-global" or self.sampled

    def _require_fitting(self, flag: str, given: bool, method: Method, why: str) -> None:
        _require(not given or self.method == method, f"--{flag} goes with --method {method}; {why}")


@dataclass(frozen=True)
class CompressionConfig:
    """What is compressed, how, and how far."""

    basis: Annotated[MethodConfig, tyro.conf.arg(name="")] = field(default_factory=MethodConfig)
    ranks: str = "uniform:0.5"
    """uniform:RATIO of each site's channels, energy:RATIO of its spectrum, budget:macs|params|latency=RATIO of
    the dense network's (of several, =0.8,0.5, each a run), sites:NAME=RANK,… for these alone, or a plan FILE."""
    forms: str = "auto"
    """What a site can become where ranks come from a budget: all, or some of output (k×k → 1×1), input (1×1 →
    k×k), vertical (k×1 → 1×k), horizontal (1×k → k×1), tucker (1×1 → k×k → 1×1), comma-separated. auto: all with
    fisher and pca and a budget, else output; dense: nothing but narrower, see --width."""
    sites: str = "*"
    """Layers to compress: globs over names and kinds, comma-separated, ! excludes: 'layer*,!layer4.*'. @conv,
    @linear, @stride1 (convolutions of stride 1), @spatial (kernels larger than 1×1)."""
    round_to: int = 0
    """Ranks are multiples of this; 0: 8 on CUDA (less where layers are narrow), on the CPU 16 where latency is the
    budget, else 1."""
    width: Literal["auto", "on", "off"] = "auto"
    """on: within a budget of MACs or parameters, hidden channels can go, too, where that loses less than lower
    ranks; with fisher. auto: where that can be."""
    search: int = 0
    """Within a budget: how many candidate plans are corrected on some of the calibration images, measured on
    others, and the best taken; 0: the plan of least predicted loss, untried."""
    measure_sites: bool = False
    """Also compress each site alone, and compare the divergence with what was predicted; see sites.json."""

    def __post_init__(self) -> None:
        rule, method = self.rule, self.basis.method
        _require(
            not rule.needs_spectra or method not in BLIND,
            f"--ranks {self.ranks}: --method {method} gives no spectrum; use uniform:RATIO, "
            f"or another method, such as pca or fisher",
        )
        _require(self.round_to >= 0, f"--round-to {self.round_to}: expected 0 or more")
        if self.forms != "auto":
            _require(
                bool(parse_forms(self.forms)) or self.removes_channels,
                f"--forms {self.forms} with --width {self.width}: nothing is compressed; use auto, or --width on",
            )
            others = [form for form in parse_forms(self.forms) if form != "output"]
            _require(
                not others or rule.kind == "budget",
                f"--forms {self.forms}: --ranks {self.ranks} does not choose forms; use budget:…, or name them: "
                f"sites:NAME=FORM:RANK, or a plan file",
            )
            _require(
                not others or (method in COMPARABLE and self.basis.side == "output"),
                f"--forms {self.forms}: --method {method} on --side {self.basis.side} does not compare forms; use "
                f"{' or '.join(COMPARABLE)} on --side output",
            )
        _require(self.search >= 0, f"--search {self.search}: expected 0 or more")
        _require(
            not self.search or (rule.kind == "budget" and bool(self.allowed_forms)),
            f"--search {self.search} with --ranks {self.ranks} and --forms {self.forms}: candidates are plans of "
            f"forms for a budget; use --ranks budget:macs=RATIO and --forms auto, or leave out --search",
        )
        _require(
            self.width != "on" or rule.is_counted,
            f"--width on with --ranks {self.ranks}: channels are removed for a budget of MACs or parameters; use "
            f"--ranks budget:macs=RATIO, or --width off",
        )
        _require(
            self.width != "on" or self._compares_channels,
            f"--width on with --method {method} on --side {self.basis.side}: what channels lose compares with "
            f"losses of fisher on --side output; use that, or --width off",
        )

    @property
    def family(self) -> tuple[str, ...]:
        """The rules where `--ranks` lists several budgets, the least first; else none."""
        return budgets_of(self.ranks)

    @property
    def rule(self) -> Rule:
        """What `--ranks` asks for; of a family, the least budget."""
        return parse_rule((*self.family, self.ranks)[0])

    @property
    def removes_channels(self) -> bool:
        """Whether hidden channels can go."""
        return self.width != "off" and self.rule.is_counted and self._compares_channels

    @property
    def _compares_channels(self) -> bool:
        return self.basis.method == "fisher" and self.basis.side == "output"

    @property
    def allowed_forms(self) -> tuple[str, ...]:
        """The forms that ranks are chosen for."""
        if self.forms != "auto":
            return parse_forms(self.forms)
        compares = self.basis.method in COMPARABLE and self.basis.side == "output"
        return FORMS if self.rule.kind == "budget" and compares else ("output",)
