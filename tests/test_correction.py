import pytest
import torch

from dist_prune.config import ImageSpec
from dist_prune.correction import Calibration


def calibration(indices: list[int], mirrored: bool = False) -> Calibration:
    pixels = torch.arange(len(indices) * 12, dtype=torch.uint8).reshape(-1, 3, 2, 2)
    return Calibration(pixels, torch.tensor(indices, dtype=torch.int64), ImageSpec(0, 2), 3, mirrored)


@pytest.mark.parametrize("indices", [list(range(17)), [3, 8, 5, 16, 1], [1, 2, 3], [0, 8], []])
def test_every_eighth_image_judges_and_no_batch_is_empty(indices: list[int]) -> None:
    for held in (True, False):
        batches = list(calibration(indices).batches(held))
        assert all(0 < len(some) <= 3 for _, some in batches)
        assert [i for _, some in batches for i in some.tolist()] == [i for i in indices if (i % 8 == 0) == held]


def test_mirror_images_are_solved_from_but_never_judge() -> None:
    images = calibration([0, 1, 2], mirrored=True)
    (plain, _), (mirrored, _) = images.batches(held=False)
    assert torch.equal(mirrored, plain.flip(3))
    assert len(list(images.batches(held=True))) == 1
