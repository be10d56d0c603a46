"""What a run is: frozen, validated dataclasses. The fields are the flags; `--help` shows their docstrings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dist_prune.config.correction import CorrectionConfig, DistillConfig
from dist_prune.config.flags import FORMS, Rule, budgets_of, is_from_file, parse_forms, parse_rule
from dist_prune.config.flags import require as _require
from dist_prune.config.training import IterationConfig, TrainingConfig, TuningConfig


@dataclass(frozen=True)
class NetworkConfig:
    """Which network."""

    arch: str = "resnet18"
    """torchvision name, CIFAR resnet20/32/44/56, mnist, timm name, or path/to/file.py:function."""
    weights: str = "none"
    """A file, a torchvision enum such as IMAGENET1K_V1, none, or `pretrained`: timm's, or those with which your
    function returns its network."""
    classes: int = 1000
    """Outputs of the network; the data's classes must be as many."""

    def __post_init__(self) -> None:
        _require(self.classes >= 2, f"--classes {self.classes}: expected at least 2")


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes a tensor; resizing is with antialiasing, as torchvision does it."""

    resize: int = 256
    """Shorter side before the centre crop, pixels; 0: keep the size."""
    crop: int = 224
    """Input height and width, pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means to subtract, of RGB/255."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations to divide by, of RGB/255."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How --resize finds pixels between pixels."""

    def __post_init__(self) -> None:
        _require(self.crop > 0, f"--crop {self.crop}: expected pixels, at least 1")
        smaller = self.resize and self.resize < self.crop
        _require(not smaller, f"--resize {self.resize} is smaller than --crop {self.crop}; 0 keeps the size")


@dataclass(frozen=True)
class Augment:
    """What random training crops look like."""

    flip: bool = True
    """Mirror training images at random."""
    pad: int = 4
    """With --resize 0: zeros around the image before a random crop, pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """With --resize above 0: share of the image that a random-resized crop covers."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """With --resize above 0: width over height of that crop."""

    def __post_init__(self) -> None:
        _require(self.pad >= 0, f"--pad {self.pad}: expected pixels, 0 or more")
        low, high = self.area
        _require(0 < low <= high <= 1, f"--area {low} {high}: expected two shares with 0 < low ≤ high ≤ 1")
        low, high = self.ratio
        _require(0 < low <= high, f"--ratio {low} {high}: expected two numbers with 0 < low ≤ high")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read."""

    data: str = ""
    """Folder with train/ and val/, one folder per class in each; or with MNIST's idx files; or `digits`, which
    ship with scikit-learn."""
    class_list: Path | None = None
    """Text file, one class folder per line in label order; without it, train/'s folders in alphabetical order."""
    image: Annotated[ImageSpec, tyro.conf.arg(name="")] = field(default_factory=ImageSpec)
    augment: Annotated[Augment, tyro.conf.arg(name="")] = field(default_factory=Augment)
    threads: int = 4
    """Decoding threads per rank."""
    eval_batch_size: int = 64
    """Images per rank and step, validation and statistics."""

    def __post_init__(self) -> None:
        _require(self.threads > 0, f"--threads {self.threads}: expected at least 1")
        _require(self.eval_batch_size > 0, f"--eval-batch-size {self.eval_batch_size}: expected at least 1")


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


@dataclass(frozen=True)
class Run:
    """One run of dist_prune."""

    network: Annotated[NetworkConfig, tyro.conf.arg(name="")] = field(default_factory=NetworkConfig)
    images: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)
    compression: Annotated[CompressionConfig, tyro.conf.arg(name="")] = field(default_factory=CompressionConfig)
    correction: Annotated[CorrectionConfig, tyro.conf.arg(name="")] = field(default_factory=CorrectionConfig)
    distillation: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)
    tuning: Annotated[TuningConfig, tyro.conf.arg(name="")] = field(default_factory=TuningConfig)
    iteration: Annotated[IterationConfig, tyro.conf.arg(name="")] = field(default_factory=IterationConfig)
    pretrain: TrainingConfig = field(default_factory=TrainingConfig)
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if every rank has a GPU of its own, else the CPU; under SLURM too few GPUs are an error."""
    channels_last: bool = False
    """Keep kernels and activations in NHWC memory format (channels_last); faster on most devices."""
    seed: int = 0
    """Seed of every random choice: subsets, draws, crops, initial weights."""
    run_dir: Path | None = None
    """Where everything is written; default runs/RECIPE-DATE-TIME."""
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint; restarts by torchrun and SLURM do so unasked."""
    reshard: bool = False
    """With --resume: another number of ranks or --batch-size may continue, from the last epoch's end."""
    save_minutes: float = 10.0
    """Minutes between checkpoints, besides those at the end of every stage and epoch."""
    keep_checkpoints: int = 2
    """How many checkpoints stay; one of them is always from the end of a stage or epoch."""
    overwrite: bool = False
    """Replace an existing --run-dir."""
    until: Literal["end", "statistics"] = "end"
    """statistics: stop once they are on disk, for other runs to take with --statistics."""
    dry_run: bool = False
    """Print the plan's table and stop; needs no data and no GPU."""
    save_recipe: Path | None = None
    """Write these settings into a TOML file, to be used in place of a recipe's name, and stop."""
    skip_check: bool = False
    """Do not look at both ends of image files before work; files that were found sound are not looked at again."""
    stage: Path | None = None
    """Copy packed images (dist-prune pack) to this folder on each node's own disk, once, and read them there."""
    timeout: float = 1800.0
    """Seconds a collective may wait for a rank before the run ends; allow for the widest layer's solve."""

    @property
    def needs_labels(self) -> bool:
        """Whether training images are used with their labels."""
        trained = self.network.weights == "none" or (
            self.until == "end" and bool(self.tuning.epochs or self.iteration.is_iterative)
        )
        return trained or self.compression.basis.method == "gradient"

    @property
    def unlabelled_statistics(self) -> Path | None:
        """The folder whose images the statistics see instead of training images, if there is one."""
        return None if self.compression.basis.method == "gradient" else self.correction.calibrate_data

    @property
    def keeps_to_dense(self) -> bool:
        """Whether correction means anything: not after training in rounds, nor of untrained layers."""
        return not self.iteration.is_iterative and self.compression.basis.method != "random-init"

    @property
    def repair(self) -> float:
        """How much later sites repair of what earlier ones lose: `--repair` if they are solved again, else 0."""
        solved_again = self.keeps_to_dense and self.correction.correct == "regression"
        return self.correction.repair if solved_again else 0.0


def require_views(run: Run) -> None:
    """Refuse statistics of views where there are none (ConfigError)."""
    some = run.correction.mirrored or run.correction.crops or not run.compression.basis.statistics_views
    _require(bool(some), "--statistics-views: there are none; give --mirrored, --crops or both")


def require_complete(run: Run) -> None:
    """A recipe may leave open what only its user knows; a run may not.

    Raises:
        ConfigError: data or weights are missing, or flags exclude each other.
    """
    require_views(run)
    _require(not (run.resume and run.overwrite), "--resume and --overwrite exclude each other")
    _require(not run.reshard or run.resume, "--reshard goes with --resume")
    _require(run.save_minutes >= 0, f"--save-minutes {run.save_minutes}: expected 0 or more")
    _require(run.keep_checkpoints > 0, f"--keep-checkpoints {run.keep_checkpoints}: expected at least 1")
    _require(not run.resume or run.run_dir is not None, "--resume needs --run-dir")
    collects = run.compression.basis.method not in DATA_FREE and run.compression.basis.statistics is None
    _require(collects or run.until == "end", f"--until {run.until}: this run collects none; leave it out")
    again = run.iteration.is_iterative and run.compression.basis.method == "random-init"
    _require(not again, "--method random-init projects nothing: leave out --step and --alternate")
    lost = run.compression.search and run.iteration.is_iterative
    _require(
        not lost,
        "--search tries plans that are corrected, not trained in rounds: leave out --step and --alternate",
    )
    several = bool(run.compression.family) and run.until != "end"
    _require(not several, f"--until {run.until}: statistics are of no budget; give one of those in --ranks")
    if run.dry_run:
        return
    _require(bool(run.images.data), "--data DIR is missing: a folder with train/ and val/, one folder per class")
    correction, steps = run.correction, run.distillation.distill_steps
    sees = collects and run.unlabelled_statistics is not None
    used = sees or correction.correct != "none" or correction.reestimate_bn or steps
    unused = f"--calibrate-data: --correct none and --method {run.compression.basis.method} leave it unused"
    _require(bool(used) or correction.calibrate_data is None, unused)
    known = run.network.weights != "none" or run.pretrain.epochs
    own = " (`pretrained`, if your function loads them itself)" if is_from_file(run.network.arch) else ""
    _require(bool(known), f"--weights none leaves nothing to compress: give weights{own}, or --pretrain.epochs N")


def to_dict(settings: Any) -> Any:  # noqa: ANN401  any field of a configuration
    """Plain JSON types, nested as the dataclasses are."""
    if dataclasses.is_dataclass(settings):
        return {f.name: to_dict(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, tuple):
        return list(settings)
    return str(settings) if isinstance(settings, Path) else settings
