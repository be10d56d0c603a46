"""How networks are trained, and in how many rounds they are compressed: settings like those of `run.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_prune.config.flags import Distillation, parse_distillation, require


@dataclass(frozen=True)
class TrainingConfig:
    """SGD with momentum or AdamW, linear warm-up and cosine decay to zero."""

    epochs: int = 0
    """Passes over the training images, with labels: fine-tuning (--pretrain.epochs: the dense network)."""
    batch_size: int = 64
    """Images per rank and forward pass; the global batch is this times --accumulate times the ranks."""
    accumulate: int = 1
    """Forward and backward passes whose gradients make one step."""
    optimizer: Literal["sgd", "adamw", "adamw-relative"] = "sgd"
    """adamw is what transformers are trained with; it takes lower rates (0.001) and more decay (0.05). The rate of
    adamw-relative is a share of each parameter's root mean square, whatever the batch."""
    lr: float = 0.01
    """Peak learning rate for a global batch of 256; scaled linearly with the global batch."""
    momentum: float = 0.9
    """Nesterov momentum; of adamw, the decay of the gradients' mean."""
    weight_decay: float = 1e-4
    """On weights of convolutions and linear layers; never on biases and batch norm."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target."""
    bn: Literal["frozen", "local", "sync"] = "local"
    """Batch norm: statistics of each rank's batch, running ones averaged over ranks; of all ranks' batches (sync,
    CUDA only), for few images per rank; or frozen as they were. Local by default: it adapts to the compressed
    layers and costs no communication in a forward pass."""
    clip: float = 0.0
    """Largest norm of a step's gradient, all parameters together; 0: not limited."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; the average is then evaluated
    and saved. 0: no average, the last weights are."""
    bf16: bool = False
    """Forward in bfloat16 autocast."""
    compile: bool = False
    """Train through torch.compile."""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"--epochs {self.epochs}: expected 0 or more")
        require(self.batch_size > 0, f"--batch-size {self.batch_size}: expected at least 1")
        require(self.lr > 0, f"--lr {self.lr}: expected above 0")
        require(0 <= self.momentum < 1, f"--momentum {self.momentum}: expected 0 to below 1")
        require(0 <= self.warmup < 1, f"--warmup {self.warmup}: expected a share of the steps, 0 to below 1")
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: expected 0 to 1")
        require(self.accumulate > 0, f"--accumulate {self.accumulate}: expected at least 1")
        require(self.clip >= 0, f"--clip {self.clip}: expected a norm, or 0 for no limit")
        require(0 <= self.ema < 1, f"--ema {self.ema}: expected 0 to below 1")


@dataclass(frozen=True)
class TuningConfig(TrainingConfig):
    """Fine-tuning of the compressed network, with distillation from the dense one."""

    distill: str = "none"
    """ALPHA,T: the loss is ALPHA·T²·KL(dense ‖ compressed) of the softmax at temperature T, plus 1−ALPHA times the
    cross-entropy to the labels; or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_distillation(self.distill)

    @property
    def distillation(self) -> Distillation | None:
        """`--distill`, parsed."""
        return parse_distillation(self.distill)


@dataclass(frozen=True)
class IterationConfig:
    """Getting to the ranks in rounds, with training in between."""

    step: float = 0.0
    """Shrink in rounds: each keeps this share of the ranks of the round before, such as 0.98, until all sites are
    where --ranks wants them; statistics are collected again for each. 0: at once."""
    tune_epochs: int = 1
    """Epochs of training after each round; after the last one --epochs, if there are any."""
    alternate: int = 0
    """Then so many times: train the pairs multiplied back to dense layers for --tune-epochs, rank them again under
    --ranks, and project again."""

    def __post_init__(self) -> None:
        require(0 <= self.step < 1, f"--step {self.step}: expected a share below 1, such as 0.98, or 0")
        require(self.tune_epochs >= 0, f"--tune-epochs {self.tune_epochs}: expected 0 or more")
        require(self.alternate >= 0, f"--alternate {self.alternate}: expected 0 or more")

    @property
    def is_iterative(self) -> bool:
        """Whether there are rounds at all."""
        return self.step > 0 or self.alternate > 0
