import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_prune.config.flags import ConfigError
from dist_prune.config.training import TrainingConfig, TuningConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.network.memory_format import channels_last, lay_out
from dist_prune.training.distillation_loss import distillation_loss
from dist_prune.training.trainer import (
    Trainer,
    TrainingError,
    _synchronised,
    format_summary,
    require_possible,
    steps_of,
)
from tests.ranks import RanksFailed, run_ranks
from tests.training.learnable import batches, network


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


EVERYTHING = {
    "accumulate": 2,
    "clip": 0.5,
    "ema": 0.8,
    "label_smoothing": 0.1,
    "bf16": True,
}


def left_and_restored(world: World, more: dict[str, Any], layout: torch.memory_format) -> tuple[str, str]:
    """Digests of a training of two epochs and of the same, left in the middle of the second and taken up again."""

    def laid_out(seed: int = 0) -> nn.Module:
        model = network(seed=seed)
        lay_out(model, layout)
        return model

    settings = TrainingConfig(epochs=2, batch_size=8, lr=0.3, **more)
    share = batches(12, 16, world.rank, world.size)
    steps = 2 * steps_of(settings, 12)
    whole = Trainer(laid_out(), settings, steps, world)
    for _ in range(2):
        list(whole.epoch(share, every=2))
    first = Trainer(laid_out(), settings, steps, world)
    list(first.epoch(share, every=2))
    next(second_epoch := first.epoch(share, every=2))
    model = {k: v.clone() for k, v in first.model.state_dict().items()} if world.is_first else None
    kept = world.from_first(lambda: (model, copy.deepcopy(first.state_dict())))  # one rank's state serves all
    list(second_epoch)  # what the first one still does, the state does not hear of
    second = Trainer(laid_out(seed=9), settings, steps, world)
    second.model.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    list(second.epoch(share[2 * settings.accumulate :], every=2))
    whole.finish(), second.finish()
    return digest(second.model), digest(whole.model)


@pytest.mark.parametrize(
    ("more", "layout"),
    [
        ({}, torch.contiguous_format),
        ({"optimizer": "adamw"}, torch.contiguous_format),
        ({"optimizer": "adamw-relative"}, torch.channels_last),
        (EVERYTHING, torch.channels_last),
    ],
    ids=["plain", "adamw", "adamw-relative", "everything"],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_restored_trainer_continues_to_the_same_bits(
    size: int, more: dict[str, Any], layout: torch.memory_format
) -> None:
    ((found, expected), *others) = run_ranks(left_and_restored, size, more, layout)
    assert found == expected
    assert all(pair == (found, expected) for pair in others)


def stumble(world: World) -> str:
    """Rank 1 meets a NaN in its 4th step: gradients carry it to the others, which see it in the 5th."""
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=8), 6, world)
    share = batches(6, 8, world.rank, world.size)
    if world.rank == world.size - 1:
        share[3].images[0, 0, 0, 0] = float("nan")
    try:
        list(trainer.epoch(share, every=3))
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_that_is_no_number_stops_all_ranks_and_names_step_and_rank(size: int) -> None:
    (message,) = set(run_ranks(stumble, size))
    assert message.startswith(f"the loss became nan on rank {size - 1} in step 4; try a lower --lr (it is 0.01)")


def drift(world: World, name: str) -> str:
    """One number of one tensor changes on one rank in the middle of training."""
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=8), 4, world)
    for _ in trainer.epoch(batches(4, 8, world.rank, world.size), every=2):
        if world.rank == 1 and trainer.step == 2:
            trainer.model.state_dict()[name].view(-1)[0] += 1e-6
    return "nobody noticed"


def test_a_rank_that_leaves_the_lockstep_ends_the_run_and_is_named_with_its_parameter() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(drift, 2, "0.bias")
    text = "parameters and buffers after step 4 must be the same on all ranks, but rank 1 differs from rank 0 in 1"
    assert all(text in report and "0.bias" in report for report in failed.value.reports.values())
    assert len(failed.value.reports) == 2


def accumulated(world: World, passes: int) -> list[float]:
    """The same global batches of 12 images in so many passes."""
    settings = TrainingConfig(epochs=1, batch_size=12 // world.size // passes, accumulate=passes, lr=0.5, clip=1.0)
    trainer = Trainer(network(norm=False), settings, 20, world)
    whole = batches(20, 12, world.rank, world.size)
    parts = [part for b in whole for part in split(b, passes)]
    list(trainer.epoch(parts))
    assert trainer.step == 20
    return [p.sum().item() for p in trainer.model.parameters()]


def split(batch: Batch, parts: int) -> list[Batch]:
    tensors = (batch.images, batch.labels, batch.indices)
    return [Batch(*part) for part in zip(*(torch.tensor_split(t, parts) for t in tensors), strict=True)]


@pytest.mark.parametrize(("size", "passes"), [(1, 3), (2, 2)])
def test_accumulated_passes_make_the_step_of_one_large_batch(size: int, passes: int) -> None:
    (one,), (found, *_) = run_ranks(accumulated, 1, 1), run_ranks(accumulated, size, passes)
    assert found == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_the_last_step_of_an_epoch_takes_what_is_left(world: World) -> None:
    settings = TrainingConfig(epochs=1, batch_size=4, accumulate=3)
    trainer = Trainer(network(), settings, steps_of(settings, 7), world)
    assert [p.step for p in trainer.epoch(batches(7, 4), every=1)] == [1, 2, 3]
    assert trainer.scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_a_step_leaves_the_batches_of_the_next_in_the_stream(world: World) -> None:
    """So that a stream's state, taken between two steps, is where training stands."""
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=4, accumulate=2), 3, world)
    source = iter(batches(6, 4))
    next(trainer.epoch(source, every=1))
    assert len(list(source)) == 4


def test_a_clipped_gradient_points_the_same_way(world: World) -> None:
    """Against autograd: g·min(1, c/‖g‖), with one norm over all parameters."""
    model, (batch,) = network(norm=False), batches(1, 8)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(model(batch.images), batch.labels), list(model.parameters())
    )
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    assert norm > 0.1
    settings = TrainingConfig(batch_size=256, lr=1, momentum=0, weight_decay=0, warmup=0, clip=0.1)
    list(Trainer(model, settings, 10, world).epoch([batch]))
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient / norm, rtol=1e-4, atol=1e-6)


def test_the_running_average_is_what_is_left_at_the_end(world: World) -> None:
    """By hand: the first step's weights, then a ← 0.9·a + 0.1·w; batch norm's running statistics likewise."""
    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=8, lr=0.5, ema=0.9), 6, world)
    seen = []
    for _ in trainer.epoch(batches(6, 8), every=1):
        seen.append({k: v.clone() for k, v in trainer.model.state_dict().items() if v.is_floating_point()})
    expected = seen[0]
    for weights in seen[1:]:
        expected = {k: 0.9 * expected[k] + 0.1 * weights[k] for k in expected}
    trainer.finish()
    for name, tensor in expected.items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor)
        assert not torch.equal(tensor, seen[-1][name])


def test_the_running_average_copies_nothing_and_takes_two_operations_a_step(world: World) -> None:
    """Whatever the number of layers: on a GPU each copy would be waited for, and each operation is a launch."""
    from torch.profiler import ProfilerActivity, profile

    trainer = Trainer(network(), TrainingConfig(epochs=1, batch_size=8, ema=0.9), 2, world)
    assert trainer.average is not None
    trainer.average.update_parameters(trainer.model)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        trainer.average.update_parameters(trainer.model)
    names = [event.name for event in seen.events() if event.cpu_parent is None]
    assert sorted(set(names) - {"aten::detach", "detach"}) == [
        "aten::_foreach_copy_",
        "aten::_foreach_lerp_",
        *KEPT,
    ]
    counts = [b for b in trainer.average.buffers() if not b.is_floating_point()]
    assert all(int(count) in (0, int(trainer.average.n_averaged)) for count in counts)


KEPT = ["aten::add_", "aten::is_nonzero"]  # of the number of steps, which lies on the CPU


def running(world: World, decay: float) -> list[torch.Tensor]:
    settings = TrainingConfig(epochs=1, batch_size=4, lr=1e-9, ema=decay)
    trainer = Trainer(network(), settings, 3, world)
    list(trainer.epoch(batches(3, 12, world.rank, world.size)))
    trainer.finish()
    return [trainer.model[1].running_mean, trainer.model[1].running_var]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_running_statistics_are_the_mean_of_all_ranks(decay: float) -> None:
    """Not rank 0's: with weights that stand still, as if each rank had trained alone and all were averaged."""

    def alone(rank: int) -> list[torch.Tensor]:
        model = network().train()
        average = None
        for batch in batches(3, 12, rank, 3):
            model(batch.images)
            now = torch.stack([model[1].running_mean, model[1].running_var])
            average = now if average is None else decay * average + (1 - decay) * now
        return list(average)

    expected = [torch.stack(parts).mean(0) for parts in zip(*map(alone, range(3)), strict=True)]
    for found in run_ranks(running, 3, decay):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_distilled_network_comes_closer_to_its_teacher(world: World) -> None:
    """Labels are worthless here: what is learned, is learned from the dense network."""
    torch.manual_seed(3)
    dense, share = network(1, norm=False).eval(), batches(100, 16)
    settings = TuningConfig(epochs=1, batch_size=16, lr=1.0, distill="1,2")
    assert settings.distillation is not None
    trainer = Trainer(
        network(2, norm=False), settings, 100, world, distillation_loss(dense, settings.distillation, settings)
    )
    first, *_, last = (p.loss for p in trainer.epoch(share, every=20))
    assert last < 0.5 * first


def test_synchronised_batch_norm_trains_the_very_same_tensors() -> None:
    """The network that is saved stays an ordinary one. (Its training needs CUDA; there is none here.)"""
    model = network()
    twin = _synchronised(model)
    assert type(model[1]) is nn.BatchNorm2d and type(twin[1]) is nn.SyncBatchNorm
    own, theirs = ([*m.parameters(), *m.buffers()] for m in (model, twin))
    assert len(own) == len(theirs) and all(a is b for a, b in zip(own, theirs, strict=True))


def test_what_this_machine_cannot_do_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--bn sync: .* this is cpu; use local or frozen"):
        require_possible(TrainingConfig(bn="sync"), torch.device("cpu"))
    require_possible(TrainingConfig(bn="sync"), torch.device("cuda"))
    require_possible(TrainingConfig(), torch.device("cpu"))


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_without_a_compiler_compile_is_refused_early(
    device: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingConfig(compile=True)
    require_possible(settings, torch.device(device))
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(ConfigError, match=rf"--compile: .* no-such-compiler is not there: .* in {variable}"):
        require_possible(settings, torch.device(device))


def compiled(world: World, compile: bool) -> list[torch.Tensor]:
    settings = TrainingConfig(epochs=1, batch_size=4, lr=0.1, accumulate=2, ema=0.5, compile=compile)
    trainer = Trainer(network(), settings, 4, world)
    list(trainer.epoch(batches(8, 8, world.rank, world.size)))
    trainer.finish()
    return [t.detach() for t in trainer.model.state_dict().values()]


@pytest.mark.slow
def test_compiled_training_is_the_same_training() -> None:
    """With accumulation on two ranks; and what is saved has the names of the network itself."""
    plain, fast = run_ranks(compiled, 2, False), run_ranks(compiled, 2, True, deadline_s=280)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_the_log_says_what_training_will_be() -> None:
    settings = TuningConfig(epochs=3, batch_size=8, accumulate=4, lr=0.1, ema=0.99, distill="0.5,2")
    lines = format_summary(settings, 10, 2, settings.distillation).splitlines()
    assert lines == [
        "   3 epochs of 3 steps, global batch 64 (8 images × 4 × 2 rank(s)), peak learning rate 0.025 "
        "(0.1 per 256 images), batch norm local",
        "   loss: 0.5 × 4 × KL(dense ‖ compressed) at temperature 2 + 0.5 × cross-entropy to the labels",
        "   weights evaluated and saved: running average, 0.99 of the old at each step",
    ]


def test_bfloat16_and_channels_last_train_too(world: World) -> None:
    settings = TrainingConfig(epochs=1, batch_size=16, lr=1.0, bf16=True)
    trainer = Trainer(channels_last(network()), settings, 60, world)
    progress = list(trainer.epoch(batches(60, 16)))
    assert progress[-1].loss < 0.6 * progress[0].loss
    assert trainer.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
