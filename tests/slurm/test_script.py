"""`sbatch slurm/prune_resnet18.sh DATA -- FLAGS` on a real cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.commands import ROOT, shared_commands
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SCRIPT, Jobs

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def ended(jobs: Jobs) -> dict[str, str]:
    """Jobs of several shapes at once, two of them on one node; how each ended."""
    shapes = {
        "one-node": jobs.submit("one-node", "--nodelist=n1"),
        "two-nodes": jobs.submit("two-nodes", "--nodelist=n2,n3", nodes=2),
        "left": jobs.submit("left", "--nodelist=n4", gpus=1),
        "right": jobs.submit("right", "--nodelist=n4", gpus=1),
    }
    states = {name: jobs.cluster.finish(job, 300) for name, job in shapes.items()}
    assert set(states.values()) == {"COMPLETED"}, "\n".join(map(jobs.log, shapes))
    return shapes


@pytest.mark.parametrize(("run", "ranks"), [("left", 1), ("one-node", 2), ("two-nodes", 4)])
def test_the_result_equals_torchruns(
    jobs: Jobs, ended: dict[str, str], tmp_path: Path, run: str, ranks: int
) -> None:
    words = ["digits", *jobs.flags(), "--run-dir", tmp_path / "run"]
    shared_commands().succeed(*words, ranks=ranks, deadline_s=120)
    expected = json.loads((tmp_path / "run" / "result.json").read_text())
    found = jobs.result(run)
    assert (found["world_size"], found["parameter_hash"]) == (ranks, expected["parameter_hash"])
    assert found["tuned"] == expected["tuned"]


def test_two_jobs_on_one_node_do_not_disturb_each_other(jobs: Jobs, ended: dict[str, str]) -> None:
    left, right = (jobs.cluster.show(ended[name]) for name in ("left", "right"))
    assert left["NodeList"] == right["NodeList"] == "n4"
    assert left["StartTime"] < right["EndTime"] and right["StartTime"] < left["EndTime"], "they did not overlap"
    assert jobs.result("left")["parameter_hash"] == jobs.result("right")["parameter_hash"]


def test_the_log_begins_with_where_everything_is(jobs: Jobs, ended: dict[str, str]) -> None:
    said, run = jobs.log("two-nodes").splitlines(), jobs.home / "two-nodes"
    assert said[0] == f"run      {run}, job {ended['two-nodes']}, start 1 on n[2-3]"
    assert said[1:4] == [
        f"log      {run}/log.txt",
        f"result   {run}/result.json",
        f"curves   tensorboard --logdir {jobs.home}",
    ]


def test_no_process_is_left(jobs: Jobs, ended: dict[str, str]) -> None:
    assert not [pid for job in ended.values() for pid in jobs.cluster.processes_of(job)]


def test_the_run_holds_the_code_it_ran_and_its_commit(jobs: Jobs, ended: dict[str, str]) -> None:
    code = jobs.home / "one-node" / "code"
    for path in (ROOT / "dist_prune").rglob("*.py"):
        assert (code / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    config = json.loads((jobs.home / "one-node" / "config.json").read_text())
    assert config["environment"]["commit"] == (code / "COMMIT").read_text().strip()
    assert str(code) in config["environment"]["command"]


def test_edits_after_the_start_change_nothing(jobs: Jobs, ended: dict[str, str], tmp_path: Path) -> None:
    """The job is requeued with a project that has since been broken: it still runs the code it began with."""
    project = copied_project(tmp_path / "project")
    shutil.copytree(jobs.home / "left" / "code", jobs.home / "edited" / "code")
    (project / "dist_prune" / "pipeline.py").write_text("raise SystemExit('edited')\n")
    job = jobs.submit("edited", gpus=1, script=project / "slurm" / "prune_resnet18.sh")
    assert jobs.cluster.finish(job) == "COMPLETED", jobs.log("edited")


@pytest.mark.parametrize(
    ("name", "sbatch", "data", "message"),
    [
        (
            "tasks",
            ["--ntasks-per-node=1"],
            "digits",
            "error: 2 GPUs per node but ntasks-per-node=1: set --ntasks-per-node=2",
        ),
        ("recipe", [], "digits", "error: unknown recipe 'digit'; did you mean digits?"),
        ("missing", [], "nowhere", "nowhere/train is not there on node n"),
    ],
)
def test_bad_input_is_told_in_one_line_and_ends_the_job_with_2(
    jobs: Jobs, name: str, sbatch: list[str], data: str, message: str
) -> None:
    environ = {"RECIPE": "digit"} if name == "recipe" else {}
    job = jobs.submit(name, *sbatch, data=data, environ=environ)
    assert jobs.cluster.finish(job) == "FAILED"
    assert jobs.cluster.show(job)["ExitCode"] == "2:0"
    assert message in jobs.log(name)


def test_data_missing_on_one_node_only_is_told_with_that_node(jobs: Jobs, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
    with jobs.cluster.hidden_on("n3", tmp_path / "images"):
        job = jobs.submit("hidden", "--nodelist=n2,n3", nodes=2, data=tmp_path / "images")
        assert jobs.cluster.finish(job) == "FAILED"
    said = jobs.log("hidden")
    assert f"error: {tmp_path}/images/train is not there on node n3" in said
    assert "on node n2" not in said


def test_a_run_directory_that_a_node_does_not_share_is_told(jobs: Jobs, tmp_path: Path) -> None:
    with jobs.cluster.hidden_on("n3", tmp_path):
        job = jobs.submit("unshared", "--nodelist=n2,n3", nodes=2, environ={"RUN_DIR": str(tmp_path / "run")})
        assert jobs.cluster.finish(job) == "FAILED"
    text = f"error: {tmp_path}/run/code/COMMIT is not there on node n3: put it on a file system all nodes share"
    assert text in jobs.log("unshared")


@pytest.mark.slow
def test_a_site_file_says_where_a_job_goes_and_how_it_is_set_up(jobs: Jobs, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        f'python = "env DIST_PRUNE_CACHE={tmp_path}/cache {sys.executable}"\n'
        'setup = ["echo set up by the site"]\n[sbatch]\nexclude = "n[1-2]"\n'
    )
    flags = jobs.cluster.run(
        sys.executable, "-m", "dist_prune.cluster.profile", site, PYTHONPATH=str(ROOT)
    ).out.split()
    job = jobs.submit("site", *flags, gpus=1, environ={"SITE": str(site)}, epochs=0)
    assert jobs.cluster.finish(job) == "COMPLETED", jobs.log("site")
    assert jobs.cluster.show(job)["ExcNodeList"] == "n[1-2]"
    assert "set up by the site" in jobs.log("site").splitlines()
    assert (tmp_path / "cache" / "digits").is_dir(), "the site's interpreter ran"


@pytest.mark.slow
def test_environments_work_on_nodes_as_they_are_where_the_job_is_submitted(jobs: Jobs, tmp_path: Path) -> None:
    """An active one, one of uv in the project's .venv, one inside a container; each has a cache of its own."""
    system = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    project = copied_project(tmp_path / "project")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, project / ".venv"], check=True)
    for folder, name in ((tmp_path / "venv", "venv"), (project / ".venv", "uv")):
        (packages,) = folder.glob("lib/python*/site-packages")
        mark = f"import os; os.environ['DIST_PRUNE_CACHE'] = '{tmp_path}/{name} cache'"
        (packages / "mark.pth").write_text(f"{sysconfig.get_path('purelib')}\n{mark}\n")
    active = {"VIRTUAL_ENV": str(tmp_path / "venv"), "PATH": f"{tmp_path}/venv/bin:{system}"}
    words = f"unshare --mount env DIST_PRUNE_CACHE={tmp_path}/container.cache"
    kinds = {
        "venv": {"environ": active},
        "uv": {"environ": {"PATH": system}, "script": project / "slurm" / SCRIPT.name},
        "container": {"environ": {"CONTAINER": words, "PYTHON": sys.executable}},
    }
    started = {run: jobs.submit(run, gpus=1, epochs=0, **how) for run, how in kinds.items()}
    for run, job in started.items():
        assert jobs.cluster.finish(job) == "COMPLETED", jobs.log(run)
    assert sorted(path.name[:-6] for path in tmp_path.glob("*?cache")) == ["container", "uv", "venv"]


def copied_project(folder: Path) -> Path:
    for name in ("dist_prune", "launch", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
def test_in_an_salloc_shell_the_same_script_works(jobs: Jobs) -> None:
    size = ["--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=5"]
    words = ["salloc", *size, "bash", SCRIPT, "digits", *jobs.flags(epochs=1)]
    environ = jobs.environ | {"RUN_DIR": str(jobs.home / "shell")}
    said = jobs.cluster.run(*words, cwd=jobs.home, deadline_s=120, **environ)
    assert said.code == 0, said.err
    assert jobs.result("shell")["world_size"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "DATA is missing"),
        (["digits"], "not in a SLURM job: submit this script with sbatch"),
        (["digits", "--", "--run-dir", "x"], "--run-dir: set RUN_DIR instead"),
    ],
)
def test_outside_of_a_job_it_says_how_to_start_it(cluster: Cluster, words: list[str], message: str) -> None:
    job = {"SLURM_JOB_ID": "1"} if len(words) > 1 else {}
    said = cluster.run("bash", SCRIPT, *words, **job)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
