"""How a compressed network is brought near to the dense one without labels: settings, as those of `run.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dist_prune.config.flags import require as _require


@dataclass(frozen=True)
class CorrectionConfig:
    """Solving each site again against the dense network, in closed form, without labels."""

    correct: Literal["none", "refit", "regression"] = "regression"
    """none; refit: only the second layer of each pair; regression: both."""
    calibrate_images: int = 1024
    """Images to solve from, labels unused; every eighth is the holdout."""
    calibrate_data: Path | None = None
    """A folder of unlabelled images, at any depth, to use instead of training images wherever labels are not: for
    statistics (all methods but gradient), correction and --distill-steps. Then train/ may be absent."""
    reestimate_bn: bool = False
    """Then re-estimate batch norm's statistics from these images; kept where the holdout KL goes down."""
    metric_damping: tuple[float, ...] = (0.1,)
    """regression: added to the Fisher metric, as a share of its largest eigenvalue (inf: no metric); of several,
    each is tried, and the best on the holdout is taken."""
    ridge: float = 0.03
    """Pull to the dense weights, as a share of the inputs' mean variance."""
    repair: float = 2.0
    """regression, with --ranks budget:…: a site's predicted loss counts exp(-R · share of sites after it), as they
    repair part of it; 0: all losses count alike."""
    positions: int = 0
    """Output positions per image to solve from, a seeded choice; 0: all."""
    resolve_dense: bool = True
    """Solve the layers that stay dense, too."""
    mirrored: bool = False
    """Solve from the mirror images of the calibration images, too."""
    crops: int = 0
    """Solve from so many random crops of each calibration image, too; each costs as much as as many images more.
    They help where there are few, large images."""
    calibration_gb: float = 0.0
    """Activations kept per rank, GiB; what does not fit is computed again for every site. 0: half of what is free,
    of the rank's GPU or of its share of the host's memory."""

    def calibration_bytes(self, free: int) -> int:
        """`--calibration-gb` in bytes, where a rank has so many free."""
        return int(self.calibration_gb * 2**30) or free // 2

    def within(self, free: int) -> CorrectionConfig:
        """The same where ranks work alone, each with so many bytes free: none then asks the others."""
        return replace(self, calibration_gb=self.calibration_bytes(free) / 2**30)

    @property
    def dampings(self) -> tuple[float, ...]:
        """Of the metric, one for each correction that is tried; `inf`: no metric."""
        return self.metric_damping if self.correct == "regression" else (math.inf,)

    def __post_init__(self) -> None:
        _require(self.calibrate_images >= 8, f"--calibrate-images {self.calibrate_images}: expected at least 8")
        _require(self.ridge > 0, f"--ridge {self.ridge}: expected above 0, or singular equations have no answer")
        _require(self.calibration_gb >= 0, f"--calibration-gb {self.calibration_gb:g}: expected 0 or more")
        _require(self.crops >= 0, f"--crops {self.crops}: expected 0 or more")
        _require(self.repair >= 0, f"--repair {self.repair}: expected 0 or more")
        _require(self.positions >= 0, f"--positions {self.positions}: expected 0 or more")
        sound = self.metric_damping and min(self.metric_damping) > 0
        _require(bool(sound), f"--metric-damping {self.metric_damping}: expected one or more numbers above 0")


@dataclass(frozen=True)
class DistillConfig:
    """Label-free distillation from the dense network, batch norm frozen, after the correction."""

    distill_steps: int = 0
    """How many steps; 0: none."""
    distill_images: int = 8192
    """Training images for these steps, or of --calibrate-data, labels unused; 0: all."""
    distill_batch_size: int = 64
    """Images per rank and step."""
    distill_lr: float = 0.0
    """Peak learning rate, of AdamW: a share of each parameter's root mean square, whatever the batch. 0: 0.01,
    and a third of it, and so on, where it does harm on images held out."""
    distill_temperature: float = 1.0
    """Of the softmax whose KL is a part of the loss, times its square, so that gradients stay as large as at 1."""
    distill_cutmix: float = 0.5
    """Share of the images that get a piece of another one of their batch; the dense network says what of it."""
    distill_features: float = 100.0
    """Weight of the mean relative squared error of the blocks' outputs, added to the KL of the softmax."""

    def __post_init__(self) -> None:
        _require(self.distill_steps >= 0, f"--distill-steps {self.distill_steps}: expected 0 or more")
        _require(self.distill_images >= 0, f"--distill-images {self.distill_images}: expected 0 or more")
        _require(
            self.distill_batch_size > 0, f"--distill-batch-size {self.distill_batch_size}: expected at least 1"
        )
        _require(
            self.distill_lr >= 0, f"--distill-lr {self.distill_lr}: expected a rate, or 0: one that does no harm"
        )
        _require(
            self.distill_temperature > 0, f"--distill-temperature {self.distill_temperature}: expected above 0"
        )
        _require(0 <= self.distill_cutmix <= 1, f"--distill-cutmix {self.distill_cutmix}: expected 0 to 1")
        _require(self.distill_features >= 0, f"--distill-features {self.distill_features}: expected 0 or more")
