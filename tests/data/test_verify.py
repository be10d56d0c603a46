"""A data set checked slice by slice: what is wrong with which file, and counts against what ImageNet has."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_prune.data.verify import CLASSES, IMAGENET, Slice, is_complete, main, summary
from tests.pictures import jpeg_bytes, picture, save

WRONG = {
    "train/n00000001/n00000001_3.JPEG": ("truncated", jpeg_bytes()[:500]),
    "train/n00000001/n00000001_4.JPEG": ("truncated", b""),
    "train/n00000001/n00000001_5.JPEG": ("unreadable", b"no image at all"),
    "val/n00000001/ILSVRC2012_val_00000009.JPEG": (
        "unreadable",
        jpeg_bytes()[:2] + b"\0" * 300 + jpeg_bytes()[-900:],
    ),
    "train/n00000002/n00000001_1.JPEG": ("wrong name", jpeg_bytes()),
    "train/n00000002/notes.txt": ("wrong name", b"text"),
    "val/n00000002/n00000002_1.JPEG": ("wrong name", jpeg_bytes()),
}


def write_images(data: Path) -> None:
    for label in ("n00000001", "n00000002"):
        for i in range(2):
            save(data / "train" / label / f"{label}_{i + 7}.JPEG", picture(40, 30, i))
            save(data / "val" / label / f"ILSVRC2012_val_0000000{i}.JPEG", picture(40, 30, i))


def test_every_fault_is_found_and_named_and_the_last_slice_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, report = tmp_path / "images", tmp_path / "report"
    write_images(data)
    for name, (_, content) in WRONG.items():
        (data / name).write_bytes(content)
    save(data / "train" / "n00000002" / "n00000002_9.JPEG", picture(40, 8))
    codes = [main([str(data), "--slice", f"{i}/2", "--report", str(report)]) for i in (1, 0)]
    assert codes == [1, 1]
    text = (report / "summary.txt").read_text()
    assert text in capsys.readouterr().out
    for name, (kind, _) in WRONG.items():
        assert f"  {name} ({kind}: " in text
    assert "n00000002_9.JPEG (wrong size: 40×8 pixels, need 16)" in text
    for line in (
        "train: 10 files, 2 classes",
        "val: 6 files, 2 classes",
        "truncated: 2",
        "wrong name: 3",
        "8 faults",
    ):
        assert line in text.splitlines()


def test_sound_images_are_said_to_be(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    assert main([str(tmp_path / "images"), "--report", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "summary.txt").read_text().splitlines()[-1] == "no faults"


def test_a_class_that_only_one_part_has_is_told(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save(tmp_path / "images" / "train" / "n00000003" / "n00000003_1.JPEG", picture(40, 40))
    assert main([str(tmp_path / "images"), "--report", str(tmp_path / "report")]) == 1
    assert (
        "val/n00000003 (missing: there is no such class folder)"
        in (tmp_path / "report" / "summary.txt").read_text()
    )


def test_a_thousand_classes_are_counted_against_imagenet() -> None:
    classes = tuple(map(str, range(CLASSES)))
    assert "train: 1,281,167 files of 1,281,167 expected (+0)" in summary([Slice(classes, dict(IMAGENET), ())])
    short = Slice(classes, {"train": 1_281_166, "val": 50_000}, ())
    assert "train: 1,281,166 files of 1,281,167 expected (-1)" in summary([short])
    assert is_complete([Slice(classes, dict(IMAGENET), ())]) and not is_complete([short])


@pytest.mark.parametrize("part", ["1/1", "x", "2"])
def test_a_slice_that_cannot_be_is_refused(part: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--slice", part, "--report", str(tmp_path)])


def test_what_is_no_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--report", str(tmp_path)]) == 2
    assert "train is not a folder" in capsys.readouterr().err
