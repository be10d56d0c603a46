"""The greedy order and its losses, against solving every candidate from the start in float64."""

import time

import pytest
import torch
from torch import Tensor

from dist_prune.width.elimination import PANEL, Term, eliminate, predict

Consumer = tuple[Tensor, Tensor, Tensor]  # covariance (c, c), weights (o, c), metric (o, o)


def consumer(channels: int, outputs: int, seed: int) -> Consumer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, metric = normal(channels, 2 * channels) * torch.logspace(0, -2, 2 * channels), normal(outputs, outputs)
    return rows @ rows.T / channels, normal(outputs, channels), metric @ metric.T


def term(each: Consumer) -> Term:
    covariance, weight, metric = each
    return Term(covariance, weight.T @ metric @ weight)


def loss(consumers: list[Consumer], kept: list[int]) -> float:
    """½ tr(G Cov(error)) of the best linear consumer of the channels kept, by regression on them."""
    total = 0.0
    for covariance, weight, metric in consumers:
        outputs = weight @ covariance
        solved = torch.linalg.lstsq(covariance[kept][:, kept], outputs[:, kept].T).solution.T
        error = outputs @ weight.T - solved @ outputs[:, kept].T
        total += 0.5 * torch.trace(metric @ error).item()
    return total


def test_each_step_removes_the_channel_that_costs_least_and_predicts_its_loss_exactly() -> None:
    consumers = [consumer(12, 5, 0), consumer(12, 7, 1)]
    found = eliminate([term(each) for each in consumers], ridge=0)
    left = list(range(12))
    for place, channel in enumerate(found.order):
        costs = {j: loss(consumers, [i for i in left if i != j]) for j in left}
        assert min(costs, key=costs.__getitem__) == channel
        left.remove(channel)
        torch.testing.assert_close(found.losses[11 - place], costs[channel], rtol=1e-9, atol=1e-12)
    assert found.losses[12] == 0


def test_panels_change_nothing() -> None:
    channels = 2 * PANEL + 9
    consumers = [consumer(channels, 20, 2)]
    found = eliminate([term(each) for each in consumers], ridge=0)
    assert sorted(found.order) == list(range(channels))
    for width in (3, PANEL - 1, PANEL + 5, channels - 2):
        exact = loss(consumers, list(found.kept(width)))
        torch.testing.assert_close(found.losses[width], exact, rtol=1e-6, atol=1e-12)


def test_dead_and_doubled_channels_go_first_and_cost_nothing() -> None:
    covariance, weight, metric = consumer(6, 4, 3)
    mixing = torch.eye(6, dtype=torch.float64)
    mixing[1], mixing[4] = 0, mixing[0] * 2  # channel 1 is constant, channel 4 twice channel 0
    found = eliminate([term((mixing @ covariance @ mixing.T, weight, metric))], ridge=1e-9)
    assert set(found.order[:2]) in ({1, 4}, {1, 0})
    assert found.losses[4] < 1e-6 * found.losses[3]


def test_prediction_is_the_regression_on_the_channels_kept() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = (
        torch.randn(100, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    )
    found = predict(rows.mean(0), torch.cov(rows.T, correction=0), (0, 2, 3), ridge=0)
    inputs = torch.cat([rows[:, [0, 2, 3]], torch.ones(100, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, rows).solution
    torch.testing.assert_close(rows[:, [0, 2, 3]] @ found.weights.T + found.offset, inputs @ solution)


@pytest.mark.slow
def test_4096_channels_take_less_than_20_seconds_of_one_core() -> None:
    """An MLP's hidden units: 1,024 outputs, more rows than channels."""
    count, threads = 4096, torch.get_num_threads()
    rows = torch.randn(5000, count, dtype=torch.float64)
    weight = torch.randn(1024, count, dtype=torch.float64)
    term = Term(rows.mT @ rows / len(rows), weight.mT @ weight)
    torch.set_num_threads(1)
    try:
        begun = time.process_time()
        found = eliminate([term], 1e-3)
        spent = time.process_time() - begun
    finally:
        torch.set_num_threads(threads)
    assert sorted(found.order) == list(range(count))
    assert spent < 20, f"{spent:.1f} s"
