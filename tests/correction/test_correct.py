import copy
from functools import partial

import pytest
import torch
from torch import nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.images import ImageSpec
from dist_prune.correction.calibration import Calibration
from dist_prune.correction.correct import concerns, correct
from dist_prune.data.loader import normalise
from dist_prune.data.views import Views
from dist_prune.distributed.world import World
from dist_prune.network.sites import survey


def calibration(indices: list[int], mirrored: bool = False) -> Calibration:
    pixels = torch.arange(len(indices) * 12, dtype=torch.uint8).reshape(-1, 3, 2, 2)
    return Calibration(
        pixels,
        torch.tensor(indices, dtype=torch.int64),
        partial(normalise, spec=ImageSpec(0, 2)),
        3,
        Views(mirrored),
    )


@pytest.mark.parametrize("indices", [list(range(17)), [3, 8, 5, 16, 1], [1, 2, 3], [0, 8], []])
def test_every_eighth_image_is_held_out_and_no_batch_is_empty(indices: list[int]) -> None:
    for held in (True, False):
        batches = list(calibration(indices).batches(held))
        assert all(0 < len(some) <= 3 for _, some in batches)
        assert [i for _, some in batches for i in some.tolist()] == [i for i in indices if (i % 8 == 0) == held]


def test_mirror_images_are_solved_from_but_never_held_out() -> None:
    images = calibration([0, 1, 2], mirrored=True)
    (plain, _), (mirrored, _) = images.batches(held=False)
    assert torch.equal(mirrored, plain.flip(3))
    assert len(list(images.batches(held=True))) == 1


class Wide(nn.Module):
    """One layer too wide to be solved, one called twice, one with more inputs than images."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.twice, self.few = nn.Linear(3 * 74 * 74, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.few(self.twice(self.twice(self.wide(x.flatten(1)))))


def test_what_is_not_solved_or_hardly_determined_is_named(world: World) -> None:
    torch.manual_seed(0)
    dense = Wide().eval()
    compressed = copy.deepcopy(dense)
    compressed.few.weight.data.mul_(0.5)
    pixels = torch.randint(0, 256, (8, 3, 74, 74), dtype=torch.uint8)
    images = Calibration(pixels, torch.arange(8), partial(normalise, spec=ImageSpec(0, 74)), 4)
    sites = survey(dense, torch.zeros(1, 3, 74, 74))
    result = correct(dense, compressed, sites, images, CorrectionConfig(ridge=0.02), 0, world)
    left, few = concerns(result)[:2]
    assert left == ("not solved: wide (16428 + 8 dimensions, more than 16384), twice (not called exactly once)")
    assert few.startswith(
        "fewer rows than inputs in 1 layers (few: 7 for 8): what they leave open stays as in the"
    )
    assert "--ridge 0.02 of the inputs' mean variance" in few
    assert [outcome.site for outcome in result.trials[0].outcomes] == ["few"]
