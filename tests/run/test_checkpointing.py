"""Leaving off and coming back: a run that was killed or asked to leave ends as if nothing had happened."""

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_prune.artifacts.answers import ANSWERS
from dist_prune.artifacts.answers import load as load_answers
from dist_prune.distributed.preemption import Flag
from dist_prune.distributed.world import World
from dist_prune.run import checkpointing
from dist_prune.run.checkpointing import CheckpointManager, ResumePoint
from dist_prune.run.resume import place_of
from tests.commands import Done
from tests.runs import CLASSES, SITES, STAGES, TRAIN, Bench, content, copied, curves, points, result_of

# ── checkpointing and resuming ──────────────────────────────────────────────────────────────────────────────

TUNED = 5  # the first checkpoint of fine-tuning, after those of four stages
EPOCHS = 40  # enough that a run killed after its first epoch has not ended when the signal arrives


@pytest.fixture(scope="module")
def killed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks, ended by SIGKILL once it had left its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = bench.commands(
        *bench.words(folder, epochs=EPOCHS), ranks=2, kill_when=f"{folder}/checkpoints/{TUNED:08d}.pt.sha256"
    )
    assert done.codes == [-signal.SIGKILL] * 2
    assert not (folder / "result.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:  # what a longer-lived run would have left
        file.write(json.dumps({"group": "train", "step": 10_000, "time": 0, "loss": 0}) + "\n" + '{"group": "tr')
    return folder


@pytest.fixture(scope="module")
def resumed(bench: Bench, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = copied(killed, tmp_path_factory.mktemp("resumed") / "run")
    return folder, bench.commands.succeed(*bench.words(folder, epochs=EPOCHS, resume=True), ranks=2)


def test_a_killed_run_resumes_to_the_very_same_network(
    bench: Bench, resumed: tuple[Path, Done], tmp_path: Path
) -> None:
    folder, done = resumed
    assert "resuming after finetune, epoch" in done.out
    bench.commands.succeed(*bench.words(tmp_path / "undisturbed", epochs=EPOCHS), ranks=2)
    expected, found = result_of(tmp_path / "undisturbed"), result_of(folder)
    assert found["parameter_hash"] == expected["parameter_hash"]
    whole, resumed = (load_answers(run / ANSWERS).right for run in (tmp_path / "undisturbed", folder))
    assert {k: v.tolist() for k, v in resumed.items()} == {k: v.tolist() for k, v in whole.items()}
    assert [found[stage] for stage in STAGES] == [expected[stage] for stage in STAGES]


def test_the_curves_of_a_resumed_run_do_not_overlap(resumed: tuple[Path, Done]) -> None:
    folder, _ = resumed
    steps = EPOCHS * math.ceil(TRAIN * len(CLASSES) / 2 / 4)
    text = [line["step"] for line in points(folder) if line["group"] == "train"]
    shown = [event.step for event in curves(folder).Scalars("train/loss")]
    assert text == sorted(set(text)) and text[-1] == steps
    assert shown == text
    stages = [line["step"] for line in points(folder) if line["group"] == "val"]
    assert stages == sorted(set(stages)) and len(stages) >= 3


def test_pictures_and_the_plan_are_there_once_after_a_restart(resumed: tuple[Path, Done]) -> None:
    found = curves(resumed[0])
    assert all(len(found.Images(f"layer/{site}/spectrum")) == 1 for site in SITES)
    assert all(len(found.Scalars(f"layer/{site}/rank")) == 1 for site in SITES)
    assert len(found.Tensors("plan/text_summary")) == 1
    assert [event.step for event in found.Scalars("top1/dense")] == [0, 1, 4]
    assert len(list((resumed[0] / "tensorboard").iterdir())) == 1


def test_a_finished_run_is_left_alone(bench: Bench, resumed: tuple[Path, Done]) -> None:
    folder, _ = resumed
    before = content(folder)
    done = bench.commands.succeed(*bench.words(folder, epochs=EPOCHS, resume=True), ranks=2)
    assert f"{folder} holds a finished run; nothing to resume" in done.out
    assert content(folder) == before


def test_another_number_of_ranks_does_not_resume(bench: Bench, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path / "run")
    done = bench.commands(*bench.words(folder, epochs=EPOCHS, resume=True))
    assert done.codes == [2]
    assert done.errors == [
        "error: --resume: the run was stopped with 2 ranks with batches of 4, this is 1 ranks with batches of 4: "
        "start it as it was, or add --reshard to resume from the end of its last epoch",
    ]


def test_other_settings_do_not_resume(bench: Bench, killed: Path) -> None:
    before = content(killed)
    done = bench.commands(*bench.words(killed, epochs=EPOCHS, resume=True, seed=7), ranks=2)
    assert all(done.codes)
    assert len(done.errors) == 1 and done.errors[0].endswith("other settings: seed: 0 → 7")
    assert content(killed) == before


def test_resume_with_nothing_there_starts(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0, resume=True))
    assert "no checkpoint yet: starting from the beginning" in done.out
    assert (tmp_path / "run" / "result.json").exists()


def test_every_stage_every_epoch_and_every_eighth_corrected_layer_leaves_a_checkpoint(
    bench: Bench, tmp_path: Path
) -> None:
    flags = {"correct": "regression", "calibrate_images": 16, "keep_checkpoints": 99}
    twice_four_layers = ["--metric-damping", "0.1", "1"]
    bench.commands.succeed(*bench.words(tmp_path / "run", **flags), *twice_four_layers, ranks=2)
    saved = [path.with_suffix("") for path in sorted((tmp_path / "run" / "checkpoints").glob("*.sha256"))]
    places = [place_of(torch.load(path, weights_only=True)["common"]) for path in saved]
    assert places == [
        *("baseline", "statistics", "projection", "projected"),
        *("correction, site 8 of trial 2", "correction", "corrected"),
        *("finetune, epoch 1", "finetune, epoch 2", "finetune", "tuned"),
    ]


def test_in_between_one_is_left_whenever_it_is_time(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: now))
    manager = CheckpointManager(world, tmp_path, Flag(), print, every_s=10, keep=99)
    left = []
    for _ in manager.watched(range(40), lambda: ResumePoint("on the way")):
        now += 1
        left.append(len(list(tmp_path.glob("????????-mid.pt"))))
    assert [left.count(n) for n in range(4)] == [12, 12, 12, 4], "every 10 s, and a batch to agree"


def test_an_existing_run_is_neither_mixed_with_nor_lost(bench: Bench, runs: dict[int, Path]) -> None:
    before = content(runs[1])
    done = bench.commands(*bench.words(runs[1]), ranks=2)
    assert all(done.codes)
    assert len(done.errors) == 1 and "--resume, or replace it with --overwrite" in done.errors[0]
    assert content(runs[1]) == before


def test_overwrite_replaces_all_of_it(bench: Bench, runs: dict[int, Path], tmp_path: Path) -> None:
    folder = copied(runs[1], tmp_path / "run")
    bench.commands.succeed(*bench.words(folder, epochs=0, overwrite=True))
    assert result_of(folder)["tuned"] is None
    assert not (folder / "checkpoints" / f"{TUNED:08d}.pt").exists()
    assert {line["group"] for line in points(folder)} == {"val", "top1"}
