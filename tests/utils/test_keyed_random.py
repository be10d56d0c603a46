import pytest
import torch

from dist_prune.utils import keyed_random

INDICES = torch.arange(100_000)


def test_what_is_drawn_depends_on_the_image_not_on_its_batch() -> None:
    whole = keyed_random.uniform(3, "x", INDICES, 4)
    shuffled = torch.randperm(len(INDICES))
    assert torch.equal(keyed_random.uniform(3, "x", INDICES[shuffled], 4), whole[shuffled])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = keyed_random.uniform(0, "x", INDICES, 3)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 6000).square() / 6000).sum() < 90  # chi-squared, 49 degrees of freedom: 1 in 3000
    neighbours = torch.stack([*u.T, *u.roll(1, 0).T])
    assert (torch.corrcoef(neighbours) - torch.eye(6)).abs().max() < 0.015


@pytest.mark.parametrize(("seed", "purpose"), [(1, "x"), (0, "y"), (0, "x ")])
def test_other_seeds_and_purposes_give_unrelated_numbers(seed: int, purpose: str) -> None:
    both = torch.stack(
        [keyed_random.uniform(0, "x", INDICES, 1)[:, 0], keyed_random.uniform(seed, purpose, INDICES, 1)[:, 0]]
    )
    assert torch.corrcoef(both)[0, 1].abs() < 0.015


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    n = keyed_random.normal(0, "x", INDICES, 2)
    assert n.mean().abs() < 0.01
    assert n.square().mean() == pytest.approx(1, abs=0.02)
    assert n.pow(4).mean() == pytest.approx(3, abs=0.15)
    assert torch.corrcoef(n.T)[0, 1].abs() < 0.015


def test_directions_are_uniform_on_the_sphere() -> None:
    v = keyed_random.directions(0, "x", INDICES, 5)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v), dtype=torch.float64))
    torch.testing.assert_close(v.T @ v / len(v), torch.eye(5).double() / 5, rtol=0, atol=0.005)


def test_labels_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 3.0, -30.0]).expand(len(INDICES), 5)
    drawn = keyed_random.labels(0, "x", INDICES, logits)
    shares = torch.bincount(drawn, minlength=5) / len(INDICES)
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.006)
