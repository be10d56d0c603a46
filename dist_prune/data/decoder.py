"""How pixels come out of encoded files: decoded, cut, resized, mirrored, as nodes of a DALI graph."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from dist_prune.config.images import Augment, ImageSpec

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


@dataclass(frozen=True)
class Decoder:
    """Encoded files → uint8, HWC where `layout` is channels_last, else CHW.

    Attributes:
        dali: the library.
        spec: size and interpolation.
        place: "cpu", or "mixed": by the GPU, where the pixels then are.
        layout: of the pixels.
    """

    dali: ModuleType
    spec: ImageSpec
    place: str
    layout: torch.memory_format

    def centred(self, encoded: DataNode) -> DataNode:
        """Resize and cut as torchvision's Resize + CenterCrop: sizes floored, corners rounded to even."""
        sides, pixels = self._sides(encoded), self._decode(encoded)
        if not self.spec.resize:
            return self._laid_out(self._cut(pixels, self._central(sides)))
        resized = sides * self.spec.resize // self.dali.fn.reductions.min(sides)
        corner, scale = self._central(resized), self._float(sides) / self._float(resized)
        # the part that is kept, in pixels of the file: what a centre crop would cut off is never computed
        part = {"roi_start": corner * scale, "roi_end": (corner + self.spec.crop) * scale}
        return self._laid_out(self._resized(pixels, **part))

    def _laid_out(self, pixels: DataNode, **mirror: DataNode) -> DataNode:
        """HWC → what is wanted, mirrored on the way."""
        if self.layout is not torch.channels_last:
            as_they_are = {"dtype": self.dali.types.UINT8, "mean": [0.0], "std": [1.0], "output_layout": "CHW"}
            return cast("DataNode", self.dali.fn.crop_mirror_normalize(pixels, **as_they_are, **mirror))
        return cast("DataNode", self.dali.fn.flip(pixels, horizontal=mirror["mirror"])) if mirror else pixels

    def _central(self, sides: DataNode) -> DataNode:
        spare = sides - self.spec.crop
        half = spare // 2
        return half + (spare - 2 * half) * (half - half // 2 * 2)

    def _float(self, numbers: DataNode) -> DataNode:
        return cast("DataNode", self.dali.fn.cast(numbers, dtype=self.dali.types.FLOAT))

    def augmented(self, encoded: DataNode, augment: Augment) -> DataNode:
        """Cut at random: an area of any size where the spec resizes, else a shift over a black border."""
        fn, crop = self.dali.fn, self.spec.crop
        if self.spec.resize:
            area, ratio = list(augment.area), list(augment.ratio)
            corner, size = fn.random_crop_generator(
                self._sides(encoded), random_area=area, random_aspect_ratio=ratio
            )
            pixels = self._resized(self._decode_part(encoded, corner, size))
        else:
            places = self._sides(encoded) + (2 * augment.pad - crop + 1)
            place = self.dali.math.floor(fn.random.uniform(range=[0.0, 1.0], shape=[2]) * places)
            pixels = self._cut(self._decode(encoded), place - augment.pad, out_of_bounds_policy="pad")
        return self._laid_out(pixels, **{"mirror": fn.random.coin_flip()} if augment.flip else {})

    def _sides(self, encoded: DataNode) -> DataNode:
        fn = self.dali.fn
        return cast("DataNode", fn.slice(fn.peek_image_shape(encoded, adjust_orientation=False), 0, 2, axes=[0]))

    def _decode(self, encoded: DataNode) -> DataNode:
        return cast("DataNode", self.dali.fn.decoders.image(encoded, device=self.place, **self._like_pillow))

    def _decode_part(self, encoded: DataNode, corner: DataNode, size: DataNode) -> DataNode:
        """The part from a corner on; a GPU decodes all, as its decoders refuse parts with smoothed chroma.

        They say so for every image, and leave it to one three times slower (nvJPEG before 13.2).
        """
        fn, axes = self.dali.fn, [0, 1]
        if self.place == "cpu":
            part = fn.decoders.image_slice(encoded, corner, size, axes=axes, device="cpu", **self._like_pillow)
        else:
            part = fn.slice(self._decode(encoded), corner, size, axes=axes)
        return cast("DataNode", part)

    @property
    def _like_pillow(self) -> dict[str, Any]:
        """Not turned by EXIF, chroma smoothed."""
        return {
            "output_type": self.dali.types.RGB,
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,
        }

    def _resized(self, pixels: DataNode, **part: DataNode) -> DataNode:
        kinds = {"bilinear": self.dali.types.INTERP_LINEAR, "bicubic": self.dali.types.INTERP_CUBIC}
        kind = kinds[self.spec.interpolation]
        how = {"interp_type": kind, "antialias": True, "subpixel_scale": False}
        return cast("DataNode", self.dali.fn.resize(pixels, size=[self.spec.crop] * 2, **how, **part))

    def _cut(self, pixels: DataNode, corner: DataNode, **policy: str) -> DataNode:
        start, side = self.dali.fn.cast(corner, dtype=self.dali.types.INT32), self.spec.crop
        cut = self.dali.fn.slice(pixels, start=start, shape=[side, side], axes=[0, 1], **policy)
        return cast("DataNode", cut)
