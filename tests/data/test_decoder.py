"""Areas drawn at random: within the bounds asked for, the same whether a file is decoded whole or in part."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia import dali
from nvidia.dali.data_node import DataNode
from PIL import Image

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data.dataset import list_images
from dist_prune.data.decoder import Decoder
from dist_prune.data.loader import training_stream
from tests.pictures import One, picture, save

WIDTH, HEIGHT, COUNT = 240, 200, 96


def positions() -> Image.Image:
    """Every pixel says where it is."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def windows(pixels: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left, top, width and height of what (N, 3, side, side) was resized from."""
    x, y = pixels[:, 0].double().mean(1), pixels[:, 1].double().mean(2)
    inner = slice(side // 4, -(side // 4))  # the border is where resizing has fewer pixels to weigh
    steps = [(line[:, inner][:, -1] - line[:, inner][:, 0]) / (side - side // 4 * 2 - 1) for line in (x, y)]
    width, height = (side * step for step in steps)
    return x.mean(1) + 0.5 - width / 2, y.mean(1) + 0.5 - height / 2, width, height


@pytest.mark.parametrize(("area", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.5), (1.0, 2.0))])
def test_areas_and_shapes_of_random_crops_are_those_asked_for_and_lie_within_the_picture(
    tmp_path: Path, area: tuple[float, float], ratio: tuple[float, float]
) -> None:
    for i in range(COUNT):
        save(tmp_path / f"{i:02d}.png", positions())
    augment, spec = Augment(area=area, ratio=ratio, flip=False), ImageSpec(resize=64, crop=48)
    (batch,) = training_stream(list_images(tmp_path), spec, One(), COUNT, 1, 0, augment).raw()
    left, top, width, height = windows(batch.images, 48)
    assert min(left.min(), top.min()) > -3
    assert (left + width).max() < WIDTH + 3
    assert (top + height).max() < HEIGHT + 3
    shares, shapes = width * height / (WIDTH * HEIGHT), width / height
    assert area[0] * 0.9 < shares.min() < area[0] + 0.3 * (area[1] - area[0])
    assert area[1] - 0.3 * (area[1] - area[0]) < shares.max() < area[1] * 1.1
    assert ratio[0] * 0.9 < shapes.min() < shapes.max() < ratio[1] * 1.1
    assert shapes.max() / shapes.min() > 1.3


class WholeFirst(Decoder):
    """As on a GPU, where a file is decoded before it is cut; here by the CPU."""

    def _decode(self, encoded: DataNode) -> DataNode:
        return dali.fn.decoders.image(encoded, device="cpu", **self._like_pillow)


@pytest.mark.parametrize(("ending", "apart"), [("png", 0), ("jpg", 2)])
def test_a_file_decoded_whole_and_cut_gives_the_pixels_of_its_part(
    tmp_path: Path, ending: str, apart: int
) -> None:
    """Of a JPEG up to rounding, as its blocks are put together in another order."""
    files = [str(save(tmp_path / f"{i}.{ending}", picture(90 + i, 70, seed=i))) for i in range(8)]

    def cut(decoder: Decoder) -> torch.Tensor:
        pipeline = dali.Pipeline(8, 1, None, seed=5)
        with pipeline:
            encoded, _ = dali.fn.readers.file(files=files)
            pipeline.set_outputs(decoder.augmented(encoded, Augment(flip=False)))
        return torch.from_numpy(pipeline.run()[0].as_array().astype(np.int64))

    spec = ImageSpec(resize=40, crop=32)
    part, whole = (
        cut(kind(dali, spec, place, torch.contiguous_format))
        for kind, place in ((Decoder, "cpu"), (WholeFirst, "mixed"))
    )
    assert (part - whole).abs().max() <= apart
    assert part.unique().numel() > 100
