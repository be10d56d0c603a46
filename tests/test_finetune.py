import math

import pytest
import torch
from torch import nn

from dist_prune.config import TrainingConfig
from dist_prune.data import Batch
from dist_prune.finetune import Trainer, TrainingError, decayed, scaled_lr, schedule
from dist_prune.world import World, digest
from tests.ranks import run_ranks


def network(seed: int = 0, norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.BatchNorm2d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def batches(steps: int, size: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """The same global batches whatever the number of ranks; classes that can be learned."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(steps):
        labels = torch.randint(4, (size,), generator=generator)
        x = torch.randn(size, 3, 8, 8, generator=generator) + labels[:, None, None, None]
        mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
        result.append(Batch(x[mine], labels[mine], torch.arange(size)[mine]))
    return result


def train_share(world: World, norm: bool) -> tuple[str, list[float]]:
    settings = TrainingConfig(epochs=1, batch_size=12 // world.size, lr=0.5)
    trainer = Trainer(network(norm=norm), settings, 20, world)
    list(trainer.epoch(batches(20, 12, world.rank, world.size)))
    return digest(trainer.model), [p.sum().item() for p in trainer.model.parameters()]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_end_with_the_same_bits(size: int, norm: bool) -> None:
    assert len({hash_ for hash_, _ in run_ranks(train_share, size, norm)}) == 1


def test_without_batch_norm_the_number_of_ranks_does_not_matter() -> None:
    """The gradient of a global batch is the mean over ranks: the same training on 1 and 3 ranks."""
    (_, alone), *_ = run_ranks(train_share, 1, False)
    (_, together), *_ = run_ranks(train_share, 3, False)
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_training_learns_and_reports(world: World) -> None:
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=16, lr=1.0), 60, world)
    progress = list(trainer.epoch(batches(60, 16), every=20))
    assert [p.step for p in progress] == [20, 40, 60]
    assert progress[-1].loss < 0.7 * progress[0].loss
    assert all(p.images_per_second > 0 for p in progress)
    assert progress[-1].lr == pytest.approx(0, abs=1e-4)


def test_one_step_is_sgd_by_hand(world: World) -> None:
    """Against the textbook update, in float64: v ← g + λw, w ← w − η(g + λw + μv)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    weight, bias = (p.detach().clone() for p in model.parameters())
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    settings = TrainingConfig(epochs=1, batch_size=256, lr=0.1, weight_decay=0.01, warmup=0)
    trainer = Trainer(model, settings, 10, world)
    list(trainer.epoch([Batch(x, labels, labels)]))
    error = (x.flatten(1) @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[labels]
    step = (error.T @ x.flatten(1) / 5 + 0.01 * weight) * 1.9  # Nesterov's first step: (1 + μ)·g
    torch.testing.assert_close(model[1].weight.detach(), weight - 0.1 * step, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model[1].bias.detach(), bias - 0.1 * 1.9 * error.mean(0), rtol=1e-6, atol=1e-8)


def test_a_restored_trainer_continues_to_the_same_bits(world: World) -> None:
    settings = TrainingConfig(epochs=2, batch_size=8, lr=0.3)
    whole = Trainer(network(), settings, 10, world)
    for _ in range(2):
        list(whole.epoch(batches(5, 8)))
    first = Trainer(network(), settings, 10, world)
    list(first.epoch(batches(5, 8)))
    model, state = {k: v.clone() for k, v in first.model.state_dict().items()}, first.state()
    second = Trainer(network(seed=9), settings, 10, world)
    second.model.load_state_dict(model)
    second.restore(state)
    list(second.epoch(batches(5, 8)))
    assert digest(second.model) == digest(whole.model)


def test_a_loss_that_is_no_number_stops_and_names_the_steps(world: World) -> None:
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=8), 5, world)
    spoiled = batches(5, 8)
    spoiled[3].images[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss became nan in steps 3 to 4; try a lower --lr"):
        list(trainer.epoch(spoiled, every=2))


def test_bfloat16_and_channels_last_train_too(world: World) -> None:
    settings = TrainingConfig(epochs=1, batch_size=16, lr=1.0, bf16=True, channels_last=True)
    trainer = Trainer(network(), settings, 60, world)
    progress = list(trainer.epoch(batches(60, 16)))
    assert progress[-1].loss < 0.6 * progress[0].loss
    assert trainer.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    rates = [schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1 == max(rates)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isfinite(schedule(0, 0, 0))


def test_the_learning_rate_is_linear_in_the_global_batch() -> None:
    settings = TrainingConfig(lr=0.1, batch_size=64)
    assert scaled_lr(settings, 4) == pytest.approx(0.1)
    assert scaled_lr(settings, 8) == pytest.approx(0.2)


def test_only_matrices_and_kernels_decay() -> None:
    model = network()
    wide, flat = decayed(model, 0.01)
    assert (wide["weight_decay"], flat["weight_decay"]) == (0.01, 0.0)
    assert [p.dim() for p in wide["params"]] == [4, 2]
    assert len(flat["params"]) == 4  # two biases, batch norm's scale and shift
