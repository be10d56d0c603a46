"""Runs on packed images are the runs on their folder, and check knows both."""

import shutil
from pathlib import Path

import pytest

from tests.commands import PROGRAM
from tests.runs import Bench, result_of


@pytest.fixture(scope="module")
def shards(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards") / "p"
    done = bench.commands.succeed("pack", bench.data, target, function=PROGRAM, ranks=0)
    assert "images in" in done.out and (target / "val" / "index.json").is_file()
    return target


def test_a_run_on_shards_ends_as_the_run_on_files(bench: Bench, shards: Path, tmp_path: Path) -> None:
    """Statistics and validation see the same images once; without training nothing is left to differ but order."""
    flags: dict[str, object] = {"epochs": 0, "method": "fisher", "sites": "*"}
    bench.commands.succeed(*bench.words(tmp_path / "files", **flags), ranks=2)
    staged = {"data": shards, "stage": tmp_path / "disk"}
    done = bench.commands.succeed(*bench.words(tmp_path / "shards", **flags | staged), ranks=2)
    assert "── staging" in done.out and len(list((tmp_path / "disk").iterdir())) == 2
    one, other = result_of(tmp_path / "files"), result_of(tmp_path / "shards")
    for stage, within in (("dense", 1e-6), ("projected", 1e-4)):
        for name in ("top1", "loss", "images"):
            assert one[stage].get(name) == pytest.approx(other[stage].get(name), rel=within)


def test_fine_tuning_on_shards_resumes_in_the_middle_of_an_epoch(
    bench: Bench, shards: Path, tmp_path: Path
) -> None:
    flags: dict[str, object] = {"epochs": 3, "sites": "5", "save_minutes": 0, "data": shards}
    bench.commands.succeed(*bench.words(tmp_path / "whole", **flags), ranks=2)
    folder = tmp_path / "killed"
    done = bench.commands(
        *bench.words(folder, **flags), ranks=2, kill_when=f"{folder}/checkpoints/00000009-mid.pt.sha256"
    )
    assert set(done.codes) == {-9}
    bench.commands.succeed(*bench.words(folder, **flags, resume=True), ranks=2)
    assert result_of(folder)["parameter_hash"] == result_of(tmp_path / "whole")["parameter_hash"]


def test_check_looks_into_shards(bench: Bench, shards: Path, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", data=shards)
    done = bench.commands("check", *words, ranks=2, function=PROGRAM)
    text = " ".join(done.out.split())
    assert f"shards of {shards / 'train'}, both ends of each sound" in text, done.out + done.err
    assert text.endswith("ready")
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    first = damaged / "train" / "000000.tar"
    first.write_bytes(bytes(first.stat().st_size))
    done = bench.commands("check", *bench.words(tmp_path / "run", data=damaged), ranks=2, function=PROGRAM)
    assert done.codes == [1, 1]
    assert "damaged in" in done.out and "not an image" in " ".join(done.out.split())


def test_what_was_found_sound_is_not_looked_at_again_and_skip_check_looks_at_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(bench.data, tmp_path / "images"))
    bad = data / "train" / "b" / "3.jpg"
    content = bad.read_bytes()
    flags: dict[str, object] = {"epochs": 0, "method": "weight-svd", "data": data}
    bad.write_bytes(b"")
    refused = bench.commands(*bench.words(tmp_path / "1", **flags), ranks=1)
    assert refused.codes == [2] and "b/3.jpg (empty)" in refused.errors[0]
    bench.commands.succeed(*bench.words(tmp_path / "2", **flags, skip_check=True), ranks=1)
    bad.write_bytes(content)
    bench.commands.succeed(*bench.words(tmp_path / "3", **flags), ranks=1)
    bad.write_bytes(b"")  # in its place: the folder has not changed, no training image is read
    bench.commands.succeed(*bench.words(tmp_path / "4", **flags), ranks=1)
    bad.unlink()
    bad.write_bytes(b"")
    assert bench.commands(*bench.words(tmp_path / "5", **flags), ranks=1).codes == [2]
