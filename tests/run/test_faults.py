"""What can happen to a run between its checkpoints: other data, other ranks, bad files, no numbers, no room."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_prune.artifacts.checkpoints import SCHEMA
from dist_prune.artifacts.lock import Lock
from dist_prune.utils import files
from tests.pictures import picture, save
from tests.runs import CLASSES, NETWORK, TRAIN, Bench, content, copied, result_of

EPOCHS = 6
FLAGS: dict[str, object] = {"epochs": EPOCHS, "sites": "5", "save_minutes": 0, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def left(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks that was killed in the middle of an epoch of fine-tuning."""
    folder = tmp_path_factory.mktemp("left") / "run"
    done = bench.commands(
        *bench.words(folder, **FLAGS), ranks=2, kill_when=f"{folder}/checkpoints/00000014-mid.pt.sha256"
    )
    assert set(done.codes) == {-9}
    return folder


def test_another_number_of_ranks_goes_on_from_an_epoch_s_end_where_asked_to(
    bench: Bench, left: Path, tmp_path: Path
) -> None:
    folder = copied(left, tmp_path / "run")
    done = bench.commands.succeed(*bench.words(folder, **FLAGS, resume=True, reshard=True), ranks=3)
    assert "resharding: 2 ranks with batches of 4 → 3 ranks with batches of 4, from the last boundary" in done.out
    assert "is done again" in done.out
    steps = math.ceil(TRAIN * len(CLASSES) / 3 / 4)
    text = re.search(r"(\d+) epochs are done.*steps are of 4 × 3 images now: (\d+) of (\d+) done", done.out)
    assert text
    assert (int(text[2]), int(text[3])) == (int(text[1]) * steps, EPOCHS * steps)
    assert result_of(folder)["world_size"] == 3


def test_another_batch_size_is_refused_and_allowed_where_asked_to(
    bench: Bench, left: Path, tmp_path: Path
) -> None:
    folder = copied(left, tmp_path / "run")
    words = bench.words(folder, **FLAGS, resume=True, batch_size=5)
    refused = bench.commands(*words, ranks=2)
    assert all(refused.codes)
    assert refused.errors[0].endswith("tuning.batch_size: 4 → 5; --reshard allows this")
    done = bench.commands.succeed(*words, "--reshard", ranks=2)
    text = re.search(r"(\d+) epochs are done.*steps are of 5 × 2 images now: (\d+) of 24 done", done.out)
    assert text
    assert int(text[2]) == 4 * int(text[1]) > 0


def test_from_a_checkpoint_at_a_boundary_nothing_is_done_again(bench: Bench, left: Path, tmp_path: Path) -> None:
    folder = copied(left, tmp_path / "run")
    for path in (folder / "checkpoints").glob("*-mid.pt*"):
        path.unlink()
    done = bench.commands.succeed(*bench.words(folder, **FLAGS, resume=True, reshard=True, batch_size=5), ranks=2)
    assert "from the last boundary; nothing is done again" in done.out


@pytest.mark.parametrize("part", ["train", "val"])
def test_other_images_are_refused(bench: Bench, left: Path, tmp_path: Path, part: str) -> None:
    folder, data = copied(left, tmp_path / "run"), Path(shutil.copytree(bench.data, tmp_path / "images"))
    save(data / part / "a" / "new.png", picture(16, 16))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(str(bench.data), str(data)))
    done = bench.commands(*bench.words(folder, **FLAGS, resume=True, data=data), ranks=2)
    assert done.codes == [2, 2]
    name = {"train": "training", "val": "validation"}[part]
    assert f"--resume: the {name} images are not what" in done.errors[0]


def test_an_older_schema_is_refused(bench: Bench, left: Path, tmp_path: Path) -> None:
    folder = copied(left, tmp_path / "run")
    for path in [seal.with_suffix("") for seal in (folder / "checkpoints").glob("*.sha256")]:
        torch.save(torch.load(path, weights_only=True) | {"schema": 1}, path)
        files.seal(path)
    done = bench.commands(*bench.words(folder, **FLAGS, resume=True), ranks=2)
    assert done.codes == [1, 1]
    assert f"has schema 1, this version of dist_prune reads {SCHEMA}" in done.errors[0]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(bench: Bench, left: Path, tmp_path: Path) -> None:
    folder, whole = copied(left, tmp_path / "run"), copied(left, tmp_path / "whole")
    newest = max((folder / "checkpoints").glob("*.sha256")).with_suffix("")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 8
    newest.write_bytes(content)
    done = bench.commands.succeed(*bench.words(folder, **FLAGS, resume=True), ranks=2)
    assert f"warning: {newest}: its SHA-256 differs" in done.out
    parts = [f"{newest.name[:8]}.rank{rank}.pt.damaged" for rank in (0, 1)]
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {f"{newest.name}.damaged", *parts} <= kept, "and its parts are kept with it"
    bench.commands.succeed(*bench.words(whole, **FLAGS, resume=True), ranks=2)
    assert result_of(folder)["parameter_hash"] == result_of(whole)["parameter_hash"]


def test_two_runs_do_not_write_into_one_directory(bench: Bench, left: Path, tmp_path: Path) -> None:
    folder = copied(left, tmp_path / "run")
    before = content(folder)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env=bench.commands.environ
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        done = bench.commands(*bench.words(folder, **FLAGS, overwrite=True), ranks=2)
        holder.kill()
    assert done.codes == [1, 1]
    assert f"--run-dir {folder} is in use by process {holder.pid} on " in done.errors[0]
    after = content(folder)
    assert [name for name in before if after.get(name) != before[name]] == ["owner.json"]
    Lock(folder).release()  # it went with the process that was killed


HOLD = """
import sys, time
from pathlib import Path
from dist_prune.artifacts.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_an_image_that_goes_bad_in_an_epoch_is_named_and_the_last_checkpoint_stays(
    bench: Bench, left: Path, tmp_path: Path
) -> None:
    folder, data = copied(left, tmp_path / "run"), Path(shutil.copytree(bench.data, tmp_path / "images"))
    (data / "train" / "b" / "3.jpg").write_bytes(b"\xff\xd8\xff garbage")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(str(bench.data), str(data)))
    done = bench.commands(*bench.words(folder, **FLAGS, resume=True, data=data), ranks=2)
    assert done.codes == [1, 1]
    assert done.errors and all("b/3.jpg" in line for line in done.errors)
    assert "resuming at epoch" in done.out
    assert any((folder / "checkpoints").glob("*.sha256"))
    shutil.rmtree(data)
    shutil.copytree(bench.data, data)
    bench.commands.succeed(*bench.words(folder, **FLAGS, resume=True, data=data), ranks=2)


POISONED = (
    NETWORK
    + """
import os
import torch

class Poison(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, x):
        self.calls += self.training
        bad = self.calls == 7 and os.environ["RANK"] in os.environ["POISON"]
        return x * float("nan") if bad else x

def poisoned(num_classes):
    return nn.Sequential(*tiny(num_classes), Poison())
"""
)


@pytest.mark.parametrize("ranks", ["1", "01"])
def test_a_loss_that_is_no_number_ends_the_run_and_what_was_saved_before_stays_good(
    bench: Bench, tmp_path: Path, ranks: str
) -> None:
    (tmp_path / "net.py").write_text(POISONED)
    words = bench.words(tmp_path / "run", **FLAGS | {"arch": f"{tmp_path}/net.py:poisoned", "bn": "frozen"})
    done = bench.commands(*words, ranks=2, POISON=ranks)
    assert all(done.codes) and done.errors
    assert any("step 7" in line for line in done.errors), done.err
    kept = max((tmp_path / "run" / "checkpoints").glob("*.sha256")).with_suffix("")
    state = torch.load(kept, weights_only=True)["common"]["standing"]["common"]["model"]
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_and_one_that_cannot_be_written_are_said(
    bench: Bench, left: Path, tmp_path: Path
) -> None:
    size = sum(p.stat().st_size for p in left.rglob("*") if p.is_file())
    folder = tmp_path / "small" / "run"
    folder.parent.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 2_000_000}", "tmpfs", str(folder.parent)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        copied(left, folder)
        free = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 36_864))  # less than a checkpoint
        done = bench.commands(*bench.words(folder, **FLAGS, resume=True), ranks=2)
        assert all(done.codes) and "No space left" in done.errors[0]
        (folder / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
        done = bench.commands(*bench.words(folder, **FLAGS, resume=True), ranks=2)
        assert all(done.codes) and "could not be written (Read-only file system)" in done.errors[0]
        subprocess.run(["mount", "-o", "remount,rw,size=64m", str(folder.parent)], check=True)
        bench.commands.succeed(*bench.words(folder, **FLAGS, resume=True), ranks=2)
    finally:
        subprocess.run(["umount", "-l", str(folder.parent)], check=True)
