"""Images mixed with others of their batch: against the formula, and the same for a run that was resumed."""

import torch

from dist_prune.data.loader import Batch
from dist_prune.training.mixup import mixed


def batches(count: int, images: int = 64) -> list[Batch]:
    """Image i of a batch is one-hot in i, so that a mixture says what it was mixed from."""
    one_hot = torch.eye(images)[:, :, None, None]
    return [Batch(one_hot.clone(), torch.arange(images), torch.arange(images)) for _ in range(count)]


def weights_of(batch: Batch) -> torch.Tensor:
    """(images, images): how much of each image is in each mixture."""
    return batch.images[:, :, 0, 0]


def test_each_mixture_is_of_two_images_whose_shares_add_to_one() -> None:
    (found,) = mixed(batches(1), 1.0, seed=0, rank=0)
    weights = weights_of(found)
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    assert ((weights > 0).sum(1) <= 2).all()
    partners = weights - torch.diag(weights.diag())
    assert int((partners.sum(0) > 0).sum()) >= 62, "each is the partner of one other, perhaps of itself"
    own = weights.diag()[(weights > 0).sum(1) == 2]
    assert 0.35 < own.mean() < 0.65 and own.min() < 0.1 and own.max() > 0.9, "uniform"


def test_a_share_of_the_images_is_mixed_and_none_at_0() -> None:
    (half,) = mixed(batches(1), 0.5, seed=0, rank=0)
    assert 20 <= int((weights_of(half).diag() < 1).sum()) <= 44
    (given,) = given_batches = batches(1)
    assert next(mixed(given_batches, 0.0, seed=0, rank=0)) is given


def test_steps_ranks_and_seeds_draw_their_own_and_a_resumed_run_the_same() -> None:
    whole = list(mixed(batches(3), 0.5, seed=1, rank=0))
    rest = list(mixed(batches(1), 0.5, seed=1, rank=0, first=2))
    assert torch.equal(whole[2].images, rest[0].images)
    others = [next(mixed(batches(1), 0.5, seed=2, rank=0)), next(mixed(batches(1), 0.5, seed=1, rank=1)), whole[1]]
    assert not any(torch.equal(whole[0].images, other.images) for other in others)


def test_labels_and_numbers_stay_and_so_does_the_batch_that_was_given() -> None:
    (given,) = given_batches = batches(1)
    before = given.images.clone()
    (found,) = mixed(given_batches, 1.0, seed=0, rank=0)
    assert found.labels is given.labels and found.indices is given.indices
    assert torch.equal(given.images, before)
