"""What a run is: frozen, validated dataclasses. The fields are the flags; `--help` shows their docstrings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dist_prune.config.compression import DATA_FREE, CompressionConfig
from dist_prune.config.correction import CorrectionConfig, DistillConfig
from dist_prune.config.flags import is_from_file
from dist_prune.config.flags import require as _require
from dist_prune.config.images import DataConfig
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
