"""Images are decoded as torchvision does, sharded without loss, and damage is named."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.v2.functional import resize

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data.damage import check_files
from dist_prune.data.dataset import Split, list_images
from dist_prune.data.listing import DataError
from dist_prune.data.loader import Stream, evaluation_stream, normalise, training_stream
from tests.pictures import SMALL, One, flat, jpeg_bytes, picture, save, take

AUGMENT = Augment()

# What a picture becomes

SIZES = [
    (300, 400),
    (400, 300),
    (31, 17),
    (224, 224),
    (256, 256),
    (257, 256),
    (255, 511),
    (640, 333),
    (97, 1000),
    (9, 9),
]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_evaluation_matches_torchvision_within_a_grey_level(tmp_path: Path, ending: str) -> None:
    spec = ImageSpec(resize=256, crop=224)
    for i, size in enumerate(SIZES):
        image = picture(*size, seed=i)
        save(tmp_path / f"{i:02d}.{ending}", image.convert("L") if i % 4 == 3 else image)
    split = list_images(tmp_path)
    (batch,) = evaluation_stream(split, spec, One(), len(SIZES), 2).raw()
    for pixels, file in zip(batch.images, split.files, strict=True):
        assert difference(pixels, tmp_path / file, spec) <= 1, file


@pytest.mark.parametrize(("side", "crop"), [(33, 28), (40, 33), (33, 30)])
def test_corners_round_as_torchvision_rounds(tmp_path: Path, side: int, crop: int) -> None:
    spec = ImageSpec(resize=side, crop=crop)
    for i, size in enumerate([(50, 61), (61, 50), (47, 90), (33, 40)]):
        save(tmp_path / f"{i}.png", picture(*size, seed=i))
    split = list_images(tmp_path)
    (batch,) = evaluation_stream(split, spec, One(), 4, 1).raw()
    assert max(difference(p, tmp_path / f, spec) for p, f in zip(batch.images, split.files, strict=True)) <= 1


def test_bicubic_is_torchs_within_a_grey_level_and_near_pillows(tmp_path: Path) -> None:
    """Pillow cuts off what overshoots between its two passes; torch on numbers, and DALI, only at the end."""
    spec = ImageSpec(resize=64, crop=56, interpolation="bicubic")
    for i, size in enumerate([(50, 61), (61, 50), (147, 90), (255, 511)]):
        save(tmp_path / f"{i}.png", picture(*size, seed=i))
    split = list_images(tmp_path)
    (batch,) = evaluation_stream(split, spec, One(), 4, 1).raw()
    for pixels, file in zip(batch.images, split.files, strict=True):
        image = torch.from_numpy(np.array(Image.open(tmp_path / file))).permute(2, 0, 1)
        resized = resize(image.double(), spec.resize, InterpolationMode.BICUBIC).round().clamp(0, 255)
        off = (pixels - CenterCrop(spec.crop)(resized)).abs()
        assert off.max() <= 1, file
        near = resize(Image.open(tmp_path / file), spec.resize, InterpolationMode.BICUBIC)
        off = (pixels.double() - torch.from_numpy(np.asarray(CenterCrop(spec.crop)(near))).permute(2, 0, 1)).abs()
        assert off.mean() < 0.3, file


def difference(pixels: torch.Tensor, path: Path, spec: ImageSpec) -> int:
    image = Compose([Resize(spec.resize), CenterCrop(spec.crop)])(Image.open(path).convert("RGB"))
    wanted = torch.from_numpy(np.asarray(image).astype(np.int32)).permute(2, 0, 1)
    return int((pixels.int() - wanted).abs().max())


def test_without_resize_the_pixels_are_the_file_s_and_rotation_tags_are_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    image = picture(20, 16)
    image.save(tmp_path / "a.png", exif=exif)
    (batch,) = evaluation_stream(list_images(tmp_path), SMALL, One(), 1, 1).raw()
    assert np.array_equal(batch.images[0].permute(1, 2, 0), np.asarray(image)[:, 2:18])


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    for ending in ("jpg", "JPEG", "png", "bmp", "webp", "tif", "TIFF", "ppm"):
        save(tmp_path / f"{ending}.{ending}", Image.new("RGB", (16, 16), (200, 100, 50)))
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (16, 16)))
    (tmp_path / "notes.txt").write_text("not an image")
    split = list_images(tmp_path)
    check_files(split, One())
    assert len(split) == 9
    assert sum(len(b.images) for b in evaluation_stream(split, SMALL, One(), 4, 1)) == 9


def test_normalise() -> None:
    spec = ImageSpec(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    white = normalise(torch.full((2, 3, 1, 1), 255, dtype=torch.uint8), spec)
    assert torch.equal(white[0].flatten(), torch.tensor([1.0, 3.0, 1.0]))


# Which images come, and when


@pytest.mark.parametrize(("count", "batch"), [(11, 3), (7, 2), (10, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_gives_every_image_once(tmp_path: Path, ranks: int, count: int, batch: int) -> None:
    split = flat(tmp_path, count)
    streams = [evaluation_stream(split, SMALL, One(rank, ranks), batch, 1) for rank in range(ranks)]
    first = [[b.indices.tolist() for b in stream] for stream in streams]
    for epoch in (first, [[b.indices.tolist() for b in stream] for stream in streams]):
        assert sorted(i for rank in epoch for indices in rank for i in indices) == list(range(count))
        assert [len(rank) for rank in epoch] == [len(streams[0])] * ranks
        assert epoch == first


def test_batches_carry_their_pixels_labels_and_positions_even_when_empty(tmp_path: Path) -> None:
    split = flat(tmp_path, 5)
    split = Split(split.root, ("a",), split.files, (3, 1, 4, 1, 5))
    batches = [b for rank in range(2) for b in evaluation_stream(split, SMALL, One(rank, 2), 1, 1).raw()]
    assert [len(b.images) for b in batches] == [1, 1, 0, 1, 1, 1]
    for b in batches:
        assert b.images.shape == (len(b.indices), 3, 16, 16)
        assert b.labels.dtype == b.indices.dtype == torch.int64
        assert torch.equal(b.images[:, 0, 0, 0], 2 * b.indices + 1)
        assert b.labels.tolist() == [split.labels[i] for i in b.indices]


def test_normalised_batches_may_be_empty(tmp_path: Path) -> None:
    *_, last = evaluation_stream(flat(tmp_path, 5), SMALL, One(0, 2), 1, 1)
    assert last.images.shape == (0, 3, 16, 16)
    assert last.images.dtype == torch.float32


def test_an_abandoned_evaluation_starts_again(tmp_path: Path) -> None:
    stream = evaluation_stream(flat(tmp_path, 5), SMALL, One(), 2, 1)
    assert next(iter(stream)).indices.tolist() == [0, 1]
    assert [b.indices.tolist() for b in stream] == [[0, 1], [2, 3], [4]]


def test_more_ranks_than_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 images in .* for 3 ranks"):
        evaluation_stream(flat(tmp_path, 2), SMALL, One(0, 3), 1, 1)


def epochs(split: Split, world: One, seed: int, count: int = 2, spec: ImageSpec = SMALL) -> list[list[list[int]]]:
    stream = training_stream(split, spec, world, 4, 1, seed, augment=AUGMENT)
    return [[b.indices.tolist() for b in stream] for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_shows_every_image_each_epoch_in_full_batches(tmp_path: Path, ranks: int) -> None:
    split = flat(tmp_path, 31)
    runs = [epochs(split, One(rank, ranks), seed=1, count=3) for rank in range(ranks)]
    for epoch in range(3):
        batches = [batch for run in runs for batch in run[epoch]]
        assert {i for batch in batches for i in batch} == set(range(31))
        assert {len(batch) for batch in batches} == {4}
        assert len({len(run[epoch]) for run in runs}) == 1
        seen = Counter(i for batch in batches for i in batch)
        assert max(seen.values()) <= 2  # and only as often as it takes to fill the batches of all ranks


def test_a_data_set_smaller_than_a_global_batch_repeats_all_images_about_equally(tmp_path: Path) -> None:
    streams = [training_stream(flat(tmp_path, 3), SMALL, One(r, 2), 4, 1, 1, AUGMENT) for r in range(2)]
    seen = Counter(i for stream in streams for batch in stream for i in batch.indices.tolist())
    assert sorted(seen.values()) == [2, 3, 3]


@pytest.mark.parametrize("spec", [ImageSpec(resize=20, crop=16), SMALL])
def test_training_batches_carry_their_pixels_labels_and_positions(tmp_path: Path, spec: ImageSpec) -> None:
    split = flat(tmp_path, 9)
    split = Split(split.root, ("a",), split.files, tuple(range(10, 19)))
    stream = training_stream(split, spec, One(), 4, 1, seed=1, augment=AUGMENT)
    for batch in [*stream.raw(), *stream.raw()]:
        assert torch.equal(batch.images[:, 0, 8, 8], 2 * batch.indices + 1)
        assert torch.equal(batch.labels, batch.indices + 10)


def test_training_order_follows_the_seed_and_changes_with_the_epoch(tmp_path: Path) -> None:
    split = flat(tmp_path, 32)
    first, second = epochs(split, One(), seed=1)
    assert [first, second] == epochs(split, One(), seed=1)
    assert [i for batch in first for i in batch] != list(range(32))
    assert first != second
    assert epochs(split, One(), seed=2)[0] != first


@pytest.mark.parametrize("spec", [ImageSpec(resize=20, crop=16), SMALL])
def test_random_crops_follow_seed_and_rank(tmp_path: Path, spec: ImageSpec) -> None:
    for i in range(8):
        save(tmp_path / f"{i}.png", picture(24, 18, seed=0))  # the same picture: only the augmentation differs
    split = list_images(tmp_path)

    def crops(rank: int, seed: int) -> torch.Tensor:
        return next(training_stream(split, spec, One(rank, 2), 4, 1, seed, augment=AUGMENT).raw()).images

    assert torch.equal(crops(0, 1), crops(0, 1))
    assert not torch.equal(crops(0, 1), crops(1, 1))
    assert not torch.equal(crops(0, 1), crops(0, 2))


def test_small_images_are_shifted_by_at_most_the_pad_and_flipped_only_if_asked(tmp_path: Path) -> None:
    image = picture(16, 16)
    for i in range(200):
        save(tmp_path / f"{i:03d}.png", image)
    split, padded = list_images(tmp_path), np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    shifts = {padded[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(5) for x in range(5)}

    def seen(flip: bool) -> list[tuple[int, int] | None]:
        (batch,) = training_stream(split, SMALL, One(), 200, 1, 0, Augment(pad=2, flip=flip)).raw()
        return [shifts.get(p.permute(1, 2, 0).numpy().tobytes()) for p in batch.images]

    assert set(seen(False)) == set(shifts.values())
    assert 60 < seen(True).count(None) < 140


@pytest.mark.parametrize("steps", [0, 2, 7, 8, 11, 16])
def test_training_resumes_where_it_stood(tmp_path: Path, steps: int) -> None:
    for i in range(30):
        save(tmp_path / f"{i:02d}.png", picture(20, 18, seed=i))
    split = list_images(tmp_path)

    def stream() -> Stream:
        return training_stream(split, SMALL, One(0, 1), 4, 1, seed=3, augment=AUGMENT)

    whole = take(stream(), 24)
    before, after = stream(), stream()
    take(before, steps)
    after.load_state_dict(before.state_dict())
    if steps == 8:  # a whole epoch
        assert len(list(after.raw())) == 8
        after.load_state_dict(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(take(after, 24 - steps), whole[steps:], strict=True))


@pytest.mark.parametrize(("rank", "steps"), [(0, 1), (0, 2), (1, 2), (1, 3), (2, 4)])
def test_an_evaluation_resumes_where_it_stood_and_begins_anew_after_that(
    tmp_path: Path, rank: int, steps: int
) -> None:
    split = flat(tmp_path, 11)  # 4, 4 and 3 images, 4 batches: the last rank's last one is empty

    def stream() -> Stream:
        return evaluation_stream(split, SMALL, One(rank, 3), 1, 1)

    before, after = stream(), stream()
    source = iter(before)
    taken = [next(source).indices.tolist() for _ in range(steps)]
    after.load_state_dict(before.state_dict())
    whole = [b.indices.tolist() for b in stream()]
    if steps < 4:
        assert taken + [b.indices.tolist() for b in after] == whole
    assert [b.indices.tolist() for b in after] == whole


def test_a_state_of_other_ranks_is_refused(tmp_path: Path) -> None:
    split = flat(tmp_path, 8)
    state = training_stream(split, SMALL, One(), 4, 1, seed=3, augment=AUGMENT).state_dict()
    with pytest.raises(DataError, match="ranks was 1 and is 2"):
        training_stream(split, SMALL, One(0, 2), 4, 1, seed=3, augment=AUGMENT).load_state_dict(state)
    with pytest.raises(DataError, match="batch_size was 4 and is 2"):
        training_stream(split, SMALL, One(), 2, 1, seed=3, augment=AUGMENT).load_state_dict(state)


# Layout


@pytest.mark.parametrize("spec", [ImageSpec(40, 32), ImageSpec(0, 32)], ids=["resized", "cut"])
@pytest.mark.parametrize(
    "augment", [None, Augment(), Augment(flip=False)], ids=["as they are", "mirrored", "moved"]
)
def test_images_for_channels_last_have_the_same_bits_and_are_never_transposed(
    tmp_path: Path, spec: ImageSpec, augment: Augment | None
) -> None:
    for i, size in enumerate([(40, 50), (33, 32), (90, 41), (64, 64), (32, 70)]):
        save(tmp_path / f"{i}.png", picture(*size, seed=i))
    layouts = (torch.contiguous_format, torch.channels_last)
    both = [Stream(list_images(tmp_path), spec, One(), 2, 1, 3, augment, layout) for layout in layouts]
    for epoch in range(2):
        for first, last in zip(*(s.raw() if epoch else s for s in both), strict=True):
            assert torch.equal(first.images, last.images) and torch.equal(first.indices, last.indices)
            assert first.images.is_contiguous()
            assert last.images.is_contiguous(memory_format=torch.channels_last)


def test_no_images_and_one_column_are_normalised_in_either_layout() -> None:
    spec = ImageSpec(0, 4)
    for shape in [(0, 3, 4, 4), (2, 3, 4, 1), (2, 3, 1, 1), (1, 3, 2, 5)]:
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        last = pixels.contiguous(memory_format=torch.channels_last)
        assert torch.equal(normalise(pixels, spec), normalise(last, spec))


# Damage


DAMAGE = {
    "empty": b"",
    "not an image": b"<html>404 not found</html>",
    "truncated JPEG": jpeg_bytes()[:-400],
}


@pytest.mark.parametrize(("reason", "content"), DAMAGE.items())
def test_damage_is_named_before_and_during_a_stream(tmp_path: Path, reason: str, content: bytes) -> None:
    for i in range(6):
        save(tmp_path / f"{i}.jpg", picture(64, 64))
    (tmp_path / "4.jpg").write_bytes(content)
    split, spec = list_images(tmp_path), ImageSpec(64, 64)
    with pytest.raises(DataError, match=rf"1 damaged in .*: 4\.jpg \({reason}"):
        check_files(split, One())
    for stream in (
        evaluation_stream(split, spec, One(), 2, 1),
        training_stream(split, spec, One(), 2, 1, 0, AUGMENT),
    ):
        with pytest.raises(DataError, match=rf"4\.jpg \({reason}"):
            list(stream)


def test_damage_that_only_decoding_shows_is_named_by_the_stream(tmp_path: Path) -> None:
    flat(tmp_path, 3)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[:20] + bytes(30) + whole[-12:])
    split = list_images(tmp_path)
    check_files(split, One())
    with pytest.raises(DataError, match=r"001\.png \(cannot be decoded"):
        list(evaluation_stream(split, SMALL, One(), 1, 1))


def test_an_image_that_is_too_small_is_named(tmp_path: Path) -> None:
    flat(tmp_path, 3)
    save(tmp_path / "001.png", picture(16, 12))
    with pytest.raises(DataError, match=r"001\.png \(16×12 pixels, need 16\)"):
        list(evaluation_stream(list_images(tmp_path), SMALL, One(), 1, 1))


def test_without_dali_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(DataError, match="install nvidia-dali"):
        evaluation_stream(flat(tmp_path, 2), SMALL, One(), 1, 1)
