"""Views of an image: its mirror image, and crops that are what was cut out by hand; the same on any rank."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_prune.config.compression import CompressionConfig, MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.data.loader import Batch
from dist_prune.data.views import SMALLEST, Views, cropped, in_views, views_of, views_of_statistics


def images(count: int = 4, size: tuple[int, int] = (24, 40)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draws(area: float, across: float, down: float, flip: float = 0.9) -> Tensor:
    """Of one image, of a crop with this share of the area."""
    return torch.tensor([[(area - SMALLEST) / (1 - SMALLEST), across, down, flip]], dtype=torch.float64)


def test_a_crop_of_everything_is_the_image() -> None:
    image = images(1)
    torch.testing.assert_close(cropped(image, draws(1, 0.3, 0.7)), image)
    torch.testing.assert_close(cropped(image, draws(1, 0.3, 0.7, 0.2), flips=0.5), image.flip(3))


@pytest.mark.parametrize(("across", "down"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_a_crop_is_the_piece_at_its_place_brought_to_the_size_of_the_image(across: float, down: float) -> None:
    image = images(1)
    top, left = round(down * (24 - 18)), round(across * (40 - 30))  # three quarters of each side
    piece = image[:, :, top : top + 18, left : left + 30]
    wanted = F.interpolate(piece, size=(24, 40), mode="bilinear", align_corners=False)
    found = cropped(image, draws(0.75**2, across, down))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at its edges, a crop sees what lies beyond
    torch.testing.assert_close(found[inside], wanted[inside])


def test_bytes_stay_bytes() -> None:
    found = cropped((255 * images(2)).to(torch.uint8), torch.rand(2, 4, dtype=torch.float64))
    assert found.dtype == torch.uint8 and found.shape == (2, 3, 24, 40) and found.float().std() > 10


def test_there_are_as_many_views_as_wanted_and_crops_depend_on_the_image_and_the_seed_alone() -> None:
    pixels, indices = images(6), torch.arange(6)
    whole, mirrored, *crops = Views(mirrored=True, crops=3, seed=7).of(pixels, indices)
    assert torch.equal(whole, pixels) and torch.equal(mirrored, pixels.flip(3)) and len(crops) == 3
    assert not any(torch.equal(crops[0], other) for other in (*crops[1:], whole, mirrored))
    some = torch.tensor([5, 2])  # as another rank might hold them
    for one, other in zip(crops, list(Views(True, 3, 7).of(pixels[some], indices[some]))[2:], strict=True):
        torch.testing.assert_close(other, one[some])
    other_seed = list(Views(True, 3, 8).of(pixels, indices))[2:]
    assert not any(torch.equal(one, other) for one, other in zip(crops, other_seed, strict=True))


def test_a_batch_in_views_has_each_image_beside_its_label_and_number() -> None:
    batch = Batch(images(3), torch.tensor([5, 6, 7]), torch.tensor([2, 0, 9]))
    (seen,) = in_views([batch], Views(mirrored=True, crops=1, seed=3))
    assert (len(seen.images), seen.labels.tolist(), seen.indices.tolist()) == (9, [5, 6, 7] * 3, [2, 0, 9] * 3)
    torch.testing.assert_close(seen.images, torch.cat(list(Views(True, 1, 3).of(batch.images, batch.indices))))


def test_what_views_statistics_are_of_is_described_where_they_are_wanted() -> None:
    method = MethodConfig("fisher", statistics_views=True)

    def described(**correction: object) -> object:
        run = Run(compression=CompressionConfig(method), correction=CorrectionConfig(**correction), seed=4)
        return views_of_statistics(run).described

    assert described(mirrored=True) == {"mirrored": True, "crops": 0, "seed": None}, "crops alone are drawn"
    assert described(crops=2) == {"mirrored": False, "crops": 2, "seed": 4}
    assert views_of_statistics(Run(correction=CorrectionConfig(mirrored=True))).described is None


def test_without_views_anything_passes() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    assert [each is tokens for each in Views().of(tokens, torch.arange(3))] == [True]
    batch = Batch(tokens, torch.zeros(3), torch.arange(3))
    assert [each is batch for each in in_views([batch], Views())] == [True], "nothing is copied"


def test_the_settings_say_which() -> None:
    assert views_of(CorrectionConfig(mirrored=True, crops=2), 5) == Views(True, 2, 5)
    with pytest.raises(ConfigError, match="--crops -1: expected 0 or more"):
        CorrectionConfig(crops=-1)
