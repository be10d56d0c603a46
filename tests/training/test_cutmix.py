"""Images with a piece of another one of their batch: which pixels, how many, and the same for a resumed run."""

import torch

from dist_prune.data.loader import Batch
from dist_prune.training.cutmix import pasted


def batches(count: int, images: int = 64, height: int = 12, width: int = 20) -> list[Batch]:
    """Every pixel of image i is i, so that a mixture says what it is made of."""
    numbered = torch.arange(images, dtype=torch.float32)[:, None, None, None].expand(-1, 3, height, width)
    return [Batch(numbered.clone(), torch.arange(images), torch.arange(images)) for _ in range(count)]


def foreign(batch: Batch) -> torch.Tensor:
    """(images, height, width): which pixels are of another image."""
    return (batch.images != torch.arange(len(batch.images))[:, None, None, None]).any(1)


def test_a_piece_is_one_rectangle_of_one_other_image_in_all_channels() -> None:
    (found,) = pasted(batches(1), 1.0, seed=0, rank=0)
    for number, (image, mask) in enumerate(zip(found.images, foreign(found), strict=True)):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        for side in (rows, columns):
            ends = torch.nonzero(side)[:, 0]
            assert len(ends) == 0 or len(ends) == ends[-1] - ends[0] + 1
        others = {*image.flatten().tolist()} - {number}
        assert len(others) <= 1
        assert torch.equal(image, image[:1].expand_as(image))


def test_areas_are_of_all_sizes_and_a_piece_has_the_proportions_of_the_image() -> None:
    (found,) = pasted(batches(1, images=2000), 1.0, seed=0, rank=0)
    masks = foreign(found)
    areas = masks.double().mean((1, 2))
    # Along each axis a side s whose centre is anywhere keeps s − s²/4 on average.
    area = torch.linspace(0, 1, 10001, dtype=torch.float64)
    expected = (area.sqrt() - area / 4).square().mean()
    assert abs(areas.mean() - expected) < 0.03
    assert areas.min() < 0.01 and areas.max() > 0.9
    whole = masks[(masks.any(2).sum(1) < 12) & ~masks[:, [0, -1]].any((1, 2)) & ~masks[:, :, [0, -1]].any((1, 2))]
    sides = whole.any(2).sum(1) / 12, whole.any(1).sum(1) / 20
    assert (sides[0] - sides[1]).abs().max() <= 1 / 12 + 1 / 20


def test_a_share_of_the_images_is_mixed_and_none_at_0() -> None:
    (half,) = pasted(batches(1, images=400), 0.5, seed=0, rank=0)
    assert 130 <= int(foreign(half).any(2).any(1).sum()) <= 220
    (given,) = given_batches = batches(1)
    assert next(pasted(given_batches, 0.0, seed=0, rank=0)) is given


def test_steps_ranks_and_seeds_draw_their_own_and_a_resumed_run_the_same() -> None:
    whole = list(pasted(batches(3), 0.5, seed=1, rank=0))
    rest = list(pasted(batches(1), 0.5, seed=1, rank=0, first=2))
    assert torch.equal(whole[2].images, rest[0].images)
    others = [
        next(pasted(batches(1), 0.5, seed=2, rank=0)),
        next(pasted(batches(1), 0.5, seed=1, rank=1)),
        whole[1],
    ]
    assert not any(torch.equal(whole[0].images, other.images) for other in others)


def test_labels_and_numbers_stay_and_so_does_the_batch_that_was_given() -> None:
    (given,) = given_batches = batches(1)
    before = given.images.clone()
    (found,) = pasted(given_batches, 1.0, seed=0, rank=0)
    assert found.labels is given.labels and found.indices is given.indices
    assert torch.equal(given.images, before)
