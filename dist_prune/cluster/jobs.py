"""A sweep's tasks as jobs: one srun task for each GPU through submitit, on SLURM or on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import _make_sbatch_string

from dist_prune.cli import main as cli
from dist_prune.cluster.gathering import gather
from dist_prune.cluster.profile import ClusterProfile
from dist_prune.cluster.sweep import Sweep, Task
from dist_prune.config.flags import ConfigError
from dist_prune.distributed.preemption import PREEMPTED
from dist_prune.utils.text import append_text, read_damaged, read_text

PROJECT = Path(__file__).parents[2]
MAX_ARRAY = 1001  # SLURM's default
TIMEOUTS = 10_000  # a run may reach its time limit as often as it needs to: it resumes each time
WARNING_S = 180  # how long before the time limit the ranks are warned


@dataclass(frozen=True)
class Shape:
    """What one run asks for."""

    nodes: int = 1
    gpus: int = 8
    cpus: int = 8
    minutes: int = 720
    parallel: int = 256


class Launch:
    """A task as submitit calls it on every rank: the run starts, or resumes."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> None:
        known = ["--resume"] if (self.task.folder / "config.json").is_file() else []
        code = cli.main([*self.task.words, "--run-dir", str(self.task.folder), *known])
        if code == PREEMPTED and is_wanted(os.environ):
            # All is saved. submitit's own handler is in place again: on rank 0 it calls `checkpoint` and requeues.
            signal.raise_signal(signal.SIGUSR2)
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs next time: the same, as everything else is in the run's directory."""
        return DelayedSubmission(self)


class Gather:
    """The last job of a sweep."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def __call__(self) -> None:
        print(gather(self.sweep), flush=True)


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the job that this process belongs to shall resume: SLURM counts a cancelled one as not running."""
    job = environ.get("SLURM_JOB_ID") if environ.get("SUBMITIT_EXECUTOR") == "slurm" else None
    text = "" if job is None else _asked("scontrol", "show", "job", "-o", job)
    return job is None or re.search(r"JobState=(RUNNING|SIGNALING) ", text) is not None


# ── the files that jobs need ───────────────────────────────────────────────────────────────────────────────


def snapshot(folder: Path) -> Path:
    """Copy this project's code below `folder`, once for each state of it: jobs in the queue keep theirs.

    Raises:
        ConfigError: this is no checkout, or nothing can be written there.
    """
    script = PROJECT / "slurm" / "snapshot.sh"
    if not script.is_file():
        raise ConfigError(f"{script} is not there: submit with launch/submit.py of a checkout")
    files = [
        path
        for part in ("dist_prune", "launch", "slurm")
        for path in (PROJECT / part).rglob("*.*")
        if "__pycache__" not in path.parts
    ]
    content = [(str(path.relative_to(PROJECT)), path.read_bytes()) for path in sorted(files) if path.is_file()]
    code = folder / f"code-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
    done = subprocess.run(
        ["bash", str(script), str(PROJECT), str(code)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"--sweep-dir {folder}: the code could not be copied there ({done.stderr.strip()})")
    return code


def parameters(
    name: str, sweep: Sweep, shape: Shape, site: ClusterProfile, code: Path, dependency: str = ""
) -> dict[str, Any]:
    """The parameters of submitit's SLURM executor for a job that has one rank for each GPU."""
    paths = [code / "COMMIT", *sweep.data]
    setup = [
        *site.setup,
        f"source {shlex.quote(str(code / 'slurm' / 'common.sh'))}",
        "trap 'requeue_if_stopped $? 0' EXIT",  # ranks that a warning ended before they could hear it
        "require_a_task_per_gpu || exit",
        "prepare_meeting",
        f"require_on_every_node {' '.join(shlex.quote(str(path)) for path in paths)} || exit",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    found = {
        **site.parameters(),
        "job_name": name,
        "time": shape.minutes,
        "nodes": shape.nodes,
        "ntasks_per_node": max(1, shape.gpus),
        "gpus_per_node": shape.gpus or None,
        "cpus_per_task": shape.cpus,
        "signal_delay_s": min(WARNING_S, shape.minutes * 20),
        "array_parallelism": shape.parallel,
        "setup": setup,
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--distribution=block:block",
            f"--cpus-per-task={shape.cpus}",
            "--open-mode=append",
        ],
        "additional_parameters": {"requeue": True, **site.sbatch},
    }
    if dependency:
        found["dependency"] = dependency
        found["additional_parameters"] |= {"kill-on-invalid-dep": "yes"}
    return {key: value for key, value in found.items() if value is not None}


def as_text(settings: Mapping[str, Any], count: int, folder: Path, python: str) -> str:
    """The batch script that these parameters give; for `count` tasks, as an array."""
    words = f"{python or shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array = count if count > 1 else None
    return str(_make_sbatch_string(command=words, folder=folder, map_count=array, **settings))


# ── on SLURM ───────────────────────────────────────────────────────────────────────────────────────────────


def submit(
    functions: Sequence[Callable[[], object]], settings: Mapping[str, Any], folder: Path, python: str
) -> list[str]:
    """Submit, as one array if there are several; the jobs' ids.

    Raises:
        ConfigError: sbatch refused; its own words are in the message.
    """
    executor = SlurmExecutor(folder, max_num_timeout=TIMEOUTS, python=python or None)
    executor.update_parameters(**settings)
    try:
        jobs = executor.submit_array(functions) if len(functions) > 1 else [executor.submit(functions[0])]
    except Exception as error:  # submitit's own kinds, which hold the words of sbatch
        text = re.findall(r"sbatch: (?:error: )?(.*)", str(error))
        raise ConfigError(f"sbatch refused: {'; '.join(dict.fromkeys(text)) or error}") from error
    return [str(job.job_id) for job in jobs]


def require_slurm() -> None:
    """SLURM's commands must be here.

    Raises:
        ConfigError: they are not.
    """
    if absent := [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]:
        raise ConfigError(
            f"--cluster slurm: {', '.join(absent)} not found; submit from a login node, or use --cluster local"
        )


def queued() -> dict[str, str]:
    """The state of every job of this user that SLURM has not ended, in lower case; elements of arrays apart.

    Raises:
        ConfigError: the controller does not answer.
    """
    lines = _asked("squeue", "--noheader", "--array", "--me", "--format=%i %T", required=True).splitlines()
    return {job: state.lower() for job, state in (line.split() for line in lines)}


def max_array() -> int:
    """How many elements an array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _asked("scontrol", "show", "config"))
    return int(found[1]) if found else MAX_ARRAY


def _asked(*words: str, required: bool = False) -> str:
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        if required:
            message = getattr(error, "stderr", "") or error
            raise ConfigError(f"{words[0]} failed: {str(message).strip()}") from error
        return ""


# ── what became of them ────────────────────────────────────────────────────────────────────────────────────


class Book:
    """Which job each task of a sweep was given to last, in a file of one line per submission."""

    def __init__(self, sweep: Sweep) -> None:
        self.path = sweep.folder / "submitted.jsonl"
        self.logs = sweep.folder / "jobs"

    def note(self, tasks: Sequence[Task], jobs: Sequence[str]) -> None:
        """Remember."""
        lines = [json.dumps({"task": t.name, "job": j}) + "\n" for t, j in zip(tasks, jobs, strict=True)]
        append_text(self.path, "".join(lines))

    def jobs(self) -> dict[str, str]:
        """The last job of each task."""
        lines = read_text(self.path).splitlines() if self.path.is_file() else []
        return {entry["task"]: entry["job"] for entry in map(json.loads, lines)}

    def states(self, tasks: Sequence[Task], living: Mapping[str, str]) -> dict[str, str]:
        """Of each task: finished, what SLURM calls it, failed, or missing."""
        jobs = self.jobs()

        def state(task: Task) -> str:
            if task.is_done:
                return "finished"
            return living.get(jobs.get(task.name, ""), "failed" if task.name in jobs else "missing")

        return {task.name: state(task) for task in tasks}

    def reason(self, task: Task) -> str:
        """The last error that any rank of a task reported, else its last line."""
        job = self.jobs().get(task.name, "")
        lines = (
            [line for path in sorted(self.logs.glob(f"{job}_*_log.err")) for line in _lines(path)] if job else []
        )
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]


def _lines(path: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from (line.strip() for line in read_damaged(path).splitlines() if line.strip())
