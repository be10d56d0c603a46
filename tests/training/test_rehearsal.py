"""The step without consequences that a resumed training begins with: it is as all others are."""

from typing import Any

import pytest
import torch
from torch import nn

from dist_prune.config.training import TrainingConfig
from dist_prune.distributed.world import World
from dist_prune.network.memory_format import lay_out
from dist_prune.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.training.learnable import batches, network


class Watched(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[Any, ...]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layout = x.is_contiguous(memory_format=torch.channels_last)
        modes = tuple(m.training for m in self.norms)
        self.calls.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), layout, modes, x.shape))
        return x

    norms: tuple[nn.Module, ...] = ()


@pytest.mark.parametrize("bn", ["local", "frozen"])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_rehearsed_step_is_as_all_others_are(world: World, bf16: bool, bn: Any) -> None:
    """In precision, layout and mode: else it could run out of memory, and would be compiled once more."""
    model, watched = network(), Watched()
    model.insert(0, watched)
    lay_out(model, torch.channels_last)
    watched.norms = (model[2],)
    trainer = Trainer(model, TrainingConfig(epochs=1, batch_size=4, bf16=bf16, bn=bn), 2, world)
    trainer.rehearse(torch.randn(4, 3, 8, 8))
    rehearsed = set(watched.calls)
    list(trainer.epoch(batches(2, 4)))
    assert watched.calls == rehearsed and len(rehearsed) == 1


class Own(nn.Module):
    """A network with a forward of its own: Dynamo does not begin in torch's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def graphs_of_a_resumed_training(world: World) -> tuple[int, int]:
    from torch._dynamo.utils import counters

    compile_with, stats = torch.compile, counters["stats"]
    torch.compile = lambda model: compile_with(model, backend="eager")  # type: ignore[assignment]
    trainer = Trainer(Own(), TrainingConfig(epochs=1, batch_size=4, bf16=True, compile=True), 2, world)
    trainer.rehearse(torch.randn(4, 3, 8, 8))
    rehearsed = stats["unique_graphs"]
    list(trainer.epoch(batches(2, 4)))
    return rehearsed, stats["unique_graphs"]


def test_a_rehearsed_step_compiles_what_the_training_runs() -> None:
    ((rehearsed, all_of_them),) = run_ranks(graphs_of_a_resumed_training, 1)
    assert rehearsed == all_of_them > 0
