"""Better by more than chance, on the same images."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from dist_prune.utils.paired import is_clearly_positive, standard_error, sums_of


def test_the_standard_error_is_that_of_the_mean() -> None:
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = statistics.stdev(values.tolist()) / math.sqrt(50)
    assert float(standard_error(*sums_of(values))) == pytest.approx(expected)


def test_what_is_true_of_shares_is_true_of_their_sum() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sums_of(values[:13]) + sums_of(values[13:]), sums_of(values))


def test_where_nothing_is_gained_it_is_said_to_be_as_often_as_the_chance_given() -> None:
    drawn = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0))
    said = sum(is_clearly_positive(sums_of(values), 0.05) for values in drawn)
    assert said / len(drawn) == pytest.approx(0.05, abs=0.015)


def test_a_clear_gain_is_found_and_a_clear_loss_is_none() -> None:
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    assert is_clearly_positive(sums_of(1 + noise), 0.05)
    assert not is_clearly_positive(sums_of(noise - 1), 0.05)


def test_the_less_chance_is_allowed_the_more_is_asked() -> None:
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    two_errors = 2 * float(standard_error(*sums_of(noise)))
    values = noise - noise.mean() + two_errors
    assert is_clearly_positive(sums_of(values), 0.05)
    assert not is_clearly_positive(sums_of(values), 0.005)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_or_none_says_nothing(count: int) -> None:
    assert not is_clearly_positive(sums_of(torch.ones(count)), 0.05)


def test_the_same_gain_of_every_image_is_clear() -> None:
    assert is_clearly_positive(sums_of(torch.full((8,), 0.5)), 0.05)
    assert not is_clearly_positive(sums_of(torch.zeros(8)), 0.05)
