"""The optimizers against their textbook updates, and the learning rate."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_prune.config.training import TrainingConfig
from dist_prune.training.optimizer import optimizer_of, peaks_of, rate_of, scaled_lr, schedule, weight_decay_groups


def test_adamw_is_that_of_loshchilov_and_hutter() -> None:
    """By hand, in float64, three steps: m and v without their bias, decay apart from both, biases spared."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    settings = TrainingConfig(optimizer="adamw", batch_size=256, lr=0.01, weight_decay=0.1, momentum=0.8)
    optimizer = optimizer_of(layer, settings, ranks=1)
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in layer.parameters()]
    for step in range(1, 4):
        gradients = [torch.randn_like(p) for p in layer.parameters()]
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for place, (gradient, decay) in enumerate(zip(gradients, (0.1, 0.0), strict=True)):
            weights, mean, square = expected[place]
            mean, square = 0.8 * mean + 0.2 * gradient, 0.999 * square + 0.001 * gradient.square()
            unbiased = mean / (1 - 0.8**step), square / (1 - 0.999**step)
            weights = weights - 0.01 * (decay * weights + unbiased[0] / (unbiased[1].sqrt() + 1e-8))
            expected[place] = weights, mean, square
    for parameter, (weights, _, _) in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weights, rtol=1e-12, atol=1e-14)


def test_a_relative_rate_is_a_share_of_each_parameters_root_mean_square_and_decay_is_of_the_rate() -> None:
    """Adam's first step is the rate for every entry that has a gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.bias)  # has no size: one of a thousandth is taken
    settings = TrainingConfig(optimizer="adamw-relative", lr=0.01, weight_decay=0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = optimizer_of(layer, settings, ranks=8)
    assert rate_of(optimizer) == pytest.approx(0.01)
    assert peaks_of(optimizer, settings, 8) == [group["lr"] for group in optimizer.param_groups]
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    root_mean_square = float((before[0] ** 2).mean() ** 0.5)
    for now, old, rate, decay in zip(
        layer.parameters(), before, (root_mean_square, 1e-3), (0.1, 0.0), strict=True
    ):
        assert now.grad is not None
        expected = old - 0.01 * (rate * now.grad.sign() + decay * old)
        torch.testing.assert_close(now.detach(), expected, rtol=1e-6, atol=1e-12)


def test_factors_of_any_shape_and_size_move_by_the_same_share_of_themselves() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 2, bias=False), nn.Linear(2, 50, bias=False)).double()
    layers[0].weight.data *= 100
    before = [p.detach().clone() for p in layers.parameters()]
    optimizer = optimizer_of(layers, TrainingConfig(optimizer="adamw-relative", lr=0.01, weight_decay=0), 1)
    layers(torch.randn(5, 40, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    shares = [(p.detach() - old).norm() / old.norm() for p, old in zip(layers.parameters(), before, strict=True)]
    assert [float(share) for share in shares] == pytest.approx([0.01, 0.01], rel=1e-4)


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
    assert scaled_lr(replace(settings, accumulate=2), 4) == pytest.approx(0.2)
    assert scaled_lr(replace(settings, optimizer="adamw-relative"), 4) == 0.1


def test_only_matrices_and_kernels_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    wide, flat = weight_decay_groups(model, 0.01)
    assert (wide["weight_decay"], flat["weight_decay"]) == (0.01, 0.0)
    assert [p.dim() for p in wide["params"]] == [4, 2]
    assert len(flat["params"]) == 4  # two biases, batch norm's scale and shift
