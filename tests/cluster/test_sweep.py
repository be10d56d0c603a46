"""A sweep without a cluster: combinations, what they share, bad input, the table, and runs on this machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dist_prune.cluster import gathering, jobs, submission
from dist_prune.cluster.profile import main as tell_site
from dist_prune.cluster.profile import read_site
from dist_prune.cluster.submission import main
from dist_prune.cluster.sweep import Combination, Task, plan_sweep, statistics_key
from dist_prune.config.flags import ConfigError
from dist_prune.config.recipes import parse
from dist_prune.config.settings import settings
from dist_prune.reporting.outcomes import Outcome, front
from tests.commands import ROOT, shared_commands
from tests.slurm.jobs import write_inputs

GIVEN = ["--data", "/images", "--weights", "w.pt"]


# ── what is swept ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_is_every_combination_once(tmp_path: Path) -> None:
    sweep = plan_sweep(
        "cifar10", GIVEN, ["method=pca,fisher", "ranks=budget:macs=0.6,uniform:0.5", "seed=0,1"], tmp_path
    )
    assert len(sweep.runs()) == 8
    first = sweep.runs()[0]
    assert first.name == "method=pca_ranks=budget-macs=0.6_seed=0"
    run = parse(first.words)
    assert (run.compression.basis.method, run.compression.ranks, run.seed) == ("pca", "budget:macs=0.6", 0)


def test_without_axes_it_is_one_run(tmp_path: Path) -> None:
    assert [task.name for task in plan_sweep("cifar10", GIVEN, [], tmp_path).runs()] == ["run"]


def test_the_same_command_gives_the_same_folder_and_another_one_another() -> None:
    one, same, other = (
        plan_sweep("cifar10", GIVEN, [axis], None).folder for axis in ("seed=0", "seed=0", "seed=1")
    )
    assert one == same != other


def test_keys_are_the_flags_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    shown = capsys.readouterr().out
    assert [flag for flag in settings() if f"--{flag} " not in shown and f"--{flag}," not in shown] == ["recipe"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["methd=pca"], "no 'methd' to sweep over; did you mean method"),
        (["run-dir=a"], "no 'run-dir' to sweep over"),
        (["seed"], "expected values, such as seed=0,1,2"),
        (["seed=0,,1"], "expected values"),
        (["seed=0,1,0"], "the same combination twice, seed=0"),
        (["seed=0", "seed=1"], "a key is given twice"),
        (["ranks=uniform:2"], "at most 1, got 2"),
        (["method=weight-svd,pcaa"], "its flags are not accepted, see above"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_with_the_reason(axes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sweep("cifar10", GIVEN, axes, tmp_path)


# ── what is shared ─────────────────────────────────────────────────────────────────────────────────────────


def key(*words: str) -> str:
    return statistics_key(parse(["cifar10", *GIVEN, "--statistics-images", "0", *words]))


def test_runs_share_statistics_unless_these_depend_on_what_differs() -> None:
    assert key("--ranks", "uniform:0.3", "--epochs", "3") == key()
    assert key("--seed", "1") == key(), "without draws and without a subset, the seed is in no statistics"
    assert len({key(), key("--method", "fisher"), key("--side", "input"), key("--sites", "layer1*")}) == 4
    assert key("--method", "fisher", "--seed", "1") != key("--method", "fisher")
    assert key("--statistics-images", "99", "--seed", "1") != key("--statistics-images", "99")
    assert key("--weights", "v.pt") != key()
    assert key("--method", "random") == key("--method", "pca", "--statistics", "f") == ""


def test_each_set_of_statistics_is_collected_once_and_given_to_its_runs(tmp_path: Path) -> None:
    axes = ["method=pca,fisher,random", "ranks=uniform:0.5,uniform:0.3"]
    sweep = plan_sweep("cifar10", GIVEN, axes, tmp_path)
    passes = sweep.passes()
    assert [parse(task.words).until for task in passes] == ["statistics"] * 2
    taken = [parse(task.words).compression.basis.statistics for task in sweep.runs()]
    files = [task.folder / "statistics.safetensors" for task in passes]
    assert taken == [files[0]] * 2 + [files[1]] * 2 + [None] * 2


# ── sites, arrays ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_example_of_a_site_reaches_the_batch_script(tmp_path: Path) -> None:
    site = read_site(ROOT / "slurm" / "site.example.toml")
    sweep = plan_sweep("cifar10", GIVEN, ["seed=0,1"], tmp_path)
    shape = jobs.Shape(nodes=2, gpus=4, cpus=3, parallel=1)
    settings = jobs.parameters("runs", sweep, shape, site, tmp_path / "code", "afterok:7")
    text = jobs.as_text(settings, 2, tmp_path / "jobs", site.python)
    lines = text.splitlines()
    for flag in ("partition=gpu", "account=vision", "qos=normal", "constraint=h100", "mem=0", "exclusive"):
        assert f"#SBATCH --{flag}" in lines
    for flag in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=3", "dependency=afterok:7"):
        assert f"#SBATCH --{flag}" in lines
    assert "#SBATCH --array=0-1%1" in lines and "#SBATCH --requeue" in lines
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--distribution=block:block" in srun and "--cpus-per-task=3" in srun
    assert "apptainer exec --nv /images/dist_prune.sif python -u -m submitit" in srun
    assert lines.index("module load cuda/12.8") < lines.index(srun)
    assert f"require_on_every_node {tmp_path}/code/COMMIT /images/train /images/val || exit" in lines


def test_a_site_is_given_to_scripts_as_flags_and_as_lines_of_shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    example = str(ROOT / "slurm" / "site.example.toml")
    assert tell_site([example]) == 0
    flags = ["--partition=gpu", "--account=vision", "--qos=normal", "--constraint=h100"]
    assert capsys.readouterr().out.split() == [*flags, "--exclude=gpu[07,12]", "--mem=0", "--exclusive"]
    assert tell_site([example, "--shell"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "module load cuda/12.8"
    interpreter = shell(lines[-1], "echo ${interpreter[@]}")
    assert interpreter == "apptainer exec --nv /images/dist_prune.sif python"
    assert shell("interpreter=(mine)", lines[-1], "echo ${interpreter[@]}", PYTHON="mine") == "mine"
    (tmp_path / "site.toml").write_text("account = 'two words'")
    assert tell_site([str(tmp_path / "site.toml")]) == 2
    assert "'--account=two words' has a space" in capsys.readouterr().err


def shell(*lines: str, **environ: str) -> str:
    words = ["bash", "-uc", "\n".join(lines)]
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("acount = 'x'", "'acount' is not known; did you mean account"),
        ("setup = 'module load'", "setup is 'module load', expected a list"),
        ("account = ", "cannot be read"),
    ],
)
def test_a_site_file_that_cannot_be_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_site(tmp_path / "site.toml")


def test_an_array_is_no_longer_than_the_cluster_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(submission, "max_array", lambda: 4)
    tasks = [Task(str(i), (), tmp_path) for i in range(10)]
    pieces = submission.chunks(tasks)
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    assert [task for piece in pieces for task in piece] == tasks


def test_without_slurm_it_says_where_to_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["--recipe", "cifar10", *GIVEN, "--sweep", "seed=0,1"]) == 2
    text = capsys.readouterr().err
    assert "sbatch, srun, squeue, scontrol not found; submit from a login node, or use --cluster local" in text


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    words = ["--sweep", "method=pca,fisher", "seed=0,1,2", "--nodes", "2", "--gpus-per-node", "8", "--time", "60"]
    assert main(["--recipe", "cifar10", *GIVEN, *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-5%6" in said
    assert "6 runs after 6 of statistics" in said  # 10,000 of the images: a choice that depends on the seed
    assert "at most 192 GPU-hours (12 × 16 GPUs × 1 h limit)" in said
    assert not [*tmp_path.iterdir()]


# ── what came of it ────────────────────────────────────────────────────────────────────────────────────────


def outcome(macs: float, top1: float, **values: str) -> Outcome:
    return Outcome(Combination(values, (), "", "").name, values, macs, 0.5, 90.0, "tuned", top1, 0.1, 60.0)


def test_the_front_holds_what_nothing_else_beats() -> None:
    points = [outcome(0.5, 80), outcome(0.6, 79), outcome(0.4, 70), outcome(0.7, 85), outcome(0.5, 75)]
    assert [(o.macs, o.top1) for o in front(points)] == [(0.4, 70), (0.5, 80), (0.7, 85)]


def test_seeds_are_told_as_mean_and_deviation() -> None:
    points = [outcome(0.5, top1, method="pca", seed=str(seed)) for seed, top1 in enumerate((80.0, 81.0, 82.0))]
    assert gathering.over_seeds(points).splitlines()[-1].split("  ")[0] == "method=pca"
    assert "81.00 ± 1.00" in gathering.over_seeds(points)
    assert not gathering.over_seeds(points[:1])


# ── on this machine ────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_on_this_machine(tmp_path: Path) -> None:
    """Two ranks a run through submitit's local executor; one run fails alone, and only it is repeated."""
    write_inputs(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text("no plan")
    words = [
        "--cluster",
        "local",
        "--gpus-per-node",
        "2",
        "--array-parallelism",
        "1",
        "--sweep-dir",
        tmp_path / "s",
    ]
    words += ["--sweep", f"ranks=uniform:0.5,{plan}", "--epochs", "1", "--threads", "1", "--device", "cpu"]
    words += ["--arch", f"{tmp_path}/net.py:tiny", "--weights", tmp_path / "weights.pt", "--method", "random"]
    bytecode = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    submit = {"function": "tests.cluster.test_sweep:submitted", "deadline_s": 200, "ranks": 0, **bytecode}
    commands = shared_commands()
    first = commands(*words, **submit)
    assert first.codes == [1]
    assert "failed: error: " in first.err and "plan.json" in first.err
    done = next((tmp_path / "s").glob("ranks=uniform*/result.json"))
    result = json.loads(done.read_text())
    assert result["world_size"] == 2
    plan.write_bytes((done.parent / "plan.json").read_bytes())
    again = commands(*words, **submit)
    assert again.codes == [0], again.err
    assert "ranks=uniform-0.5: process" not in again.out
    assert "pareto.png" in again.out
    assert (tmp_path / "s" / "pareto.png").stat().st_size > 10_000
    assert len((tmp_path / "s" / "results.csv").read_text().splitlines()) == 3


def submitted(*words: str) -> int:
    return main(words)


def test_debug_runs_in_this_process(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words = [
        "--cluster",
        "debug",
        "--sweep-dir",
        tmp_path / "s",
        "--epochs",
        "0",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    words += ["--arch", f"{tmp_path}/net.py:tiny", "--weights", tmp_path / "weights.pt", "--method", "random"]
    done = shared_commands()(*words, function="tests.cluster.test_sweep:submitted", ranks=0, deadline_s=100)
    assert done.codes == [0], done.err
    assert json.loads((tmp_path / "s" / "run" / "result.json").read_text())["world_size"] == 1
