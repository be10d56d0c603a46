"""Accuracy over measured time: what is timed, and which figures stand beside it."""

import pytest
import torch
from torch import nn

from dist_prune.network.models import build
from tests.bench.over_time import ENGINES, Row, accuracy, show, timed


@pytest.mark.slow
def test_a_network_with_much_less_to_do_takes_less_of_the_time() -> None:
    def network(width: int) -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers).eval()

    times = timed(network(64), network(8), torch.randn(8, 3, 32, 32))
    assert list(times) == list(ENGINES)
    for ratio, low, high in times.values():
        assert 0 < low <= ratio <= high
        assert ratio < 0.7


@pytest.mark.slow
def test_a_network_takes_as_long_as_itself() -> None:
    network = build("resnet20", 10).eval()
    for ratio, *_ in timed(network, network, torch.randn(8, 3, 32, 32)).values():
        assert 0.5 < ratio < 2


def test_figures_are_those_of_the_same_way_and_budget() -> None:
    rows = [{"way": "PCA", "macs": 0.581, "drop": 11.0}, {"way": "PCA", "macs": 0.341, "drop": 58.8}]
    assert accuracy(rows, "PCA", 0.346) == rows[1]
    assert accuracy(rows, "PCA", 0.2) is None
    assert accuracy(rows, "BALF", 0.584) is None


def test_the_table_has_a_column_for_each_engine() -> None:
    row = Row("PCA", 0.581, 11.0, 0.1, dict.fromkeys(ENGINES, (0.7, 0.65, 0.8)))
    assert show([row]).count("0.70 (0.65–0.80)") == len(ENGINES)
