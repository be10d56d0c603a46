"""The command line of a sweep: what is asked for, shown, submitted or run here, and how far it is."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import submitit
import tyro

from dist_prune.cluster.gathering import gather
from dist_prune.cluster.jobs import (
    Book,
    Gather,
    Launch,
    Shape,
    as_text,
    max_array,
    parameters,
    queued,
    require_slurm,
    snapshot,
    submit,
)
from dist_prune.cluster.profile import ClusterProfile, read_site
from dist_prune.cluster.sweep import Sweep, Task, plan_sweep
from dist_prune.utils.console import adapt_output
from dist_prune.utils.tables import table

POLL_S = 0.5


@dataclass(frozen=True)
class Submission:
    """Submit runs. Flags that are not below are flags of every run."""

    recipe: str = "digits"
    """Recipe of every run."""
    sweep: tuple[str, ...] = ()
    """key=value,value …: every combination is a run; keys are flags of a run without their dashes."""
    sweep_dir: Path | None = None
    """Where everything goes; default sweeps/RECIPE-…, the same for the same command."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: processes on this machine, one per rank; debug: one after the other in this process."""
    array_parallelism: int = 256
    """Runs at a time."""
    nodes: int = 1
    """Nodes of a run."""
    gpus_per_node: int = 8
    """GPUs of a run on each node, and ranks; on a machine without, ranks."""
    cpus_per_task: int = 8
    """Cores of a rank."""
    time: int = 720
    """Time limit of a run, minutes; a run that reaches it is queued again and resumes."""
    partition: str = ""
    """SLURM's partition."""
    account: str = ""
    """SLURM's account."""
    site: Path | None = None
    """What is special about the cluster, see slurm/site.example.toml."""
    dry_run: bool = False
    """Show combinations, batch scripts and GPU-hours, and stop."""
    status: bool = False
    """Show how far the sweep is, and stop."""

    @property
    def shape(self) -> Shape:
        """What one run asks for."""
        return Shape(self.nodes, self.gpus_per_node, self.cpus_per_task, self.time, self.array_parallelism)

    def read_site(self) -> ClusterProfile:
        """The site, flags over its file."""
        given = {name: value for name in ("partition", "account") if (value := getattr(self, name))}
        return replace(read_site(self.site), **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the words say; the exit code: 0 done, 1 a run here failed, 2 could not start as asked."""
    adapt_output(os.environ)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        asked, rest = tyro.cli(Submission, args=words, return_unknown_args=True)
        sweep = plan_sweep(asked.recipe, rest, asked.sweep, asked.sweep_dir)
        site = asked.read_site()
        if asked.dry_run:
            return show(asked, sweep, site)
        if asked.cluster == "slurm":
            require_slurm()
        if asked.status:
            return show_status(sweep, living(asked))
        sweep.folder.mkdir(parents=True, exist_ok=True)
        code = snapshot(sweep.folder)
        if asked.cluster == "slurm":
            return send(sweep, asked.shape, site, code)
        return work_here(sweep, asked, code)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# ── seen before ────────────────────────────────────────────────────────────────────────────────────────────


def show(asked: Submission, sweep: Sweep, site: ClusterProfile) -> int:
    """Combinations, batch scripts, cost."""
    shape, passes, runs = asked.shape, sweep.passes(), sweep.runs()
    code = sweep.folder / "code"
    axes = list(sweep.combinations[0].values)
    rows = [[str(i), *(c.values[a] for a in axes), c.statistics] for i, c in enumerate(sweep.combinations)]
    print(table(["", *axes, "statistics"], rows))
    if asked.cluster == "slurm":
        pieces: list[tuple[str, int, str]] = [("statistics", len(passes), "")] if passes else []
        pieces += [("runs", len(piece), "afterok:STATISTICS" * bool(passes)) for piece in chunks(runs)]
        for name, count, dependency in pieces:
            settings = parameters(name, sweep, shape, site, code, dependency)
            print(f"\n── {name}: {count}\n{as_text(settings, count, sweep.folder / 'jobs', site.python)}")
    tasks = len(passes) + len(runs)
    gpus, limit = shape.nodes * shape.gpus, shape.minutes / 60
    print(
        f"\n{len(runs)} runs after {len(passes)} of statistics, {shape.nodes} × {shape.gpus} GPUs each, in "
        f"{sweep.folder}: at most {tasks * gpus * limit:g} GPU-hours ({tasks} × {gpus} GPUs × {limit:g} h limit)"
    )
    return 0


def chunks(tasks: Sequence[Task]) -> list[Sequence[Task]]:
    """Arrays no longer than the cluster allows."""
    most = max_array()
    return [tasks[start : start + most] for start in range(0, len(tasks), most)]


def living(asked: Submission) -> dict[str, str]:
    """Jobs that have not ended: SLURM's, or processes of this machine."""
    if asked.cluster == "slurm":
        return queued()
    found = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if b"submitit.local" in _content(path)]
    return {path.name: "running" for path in found}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def show_status(sweep: Sweep, living: dict[str, str]) -> int:
    """How far every task is, and why it failed."""
    book, tasks = Book(sweep), [*sweep.passes(), *sweep.runs()]
    states, jobs = book.states(tasks, living), book.jobs()
    why = {t.name: book.reason(t) if states[t.name] == "failed" else "" for t in tasks}
    print(
        table(
            ["task", "state", "job", "why"],
            [[t.name, states[t.name], jobs.get(t.name, ""), why[t.name]] for t in tasks],
        )
    )
    print(", ".join(f"{count} {state}" for state, count in sorted(Counter(states.values()).items())))
    return 0


# ── on SLURM ───────────────────────────────────────────────────────────────────────────────────────────────


def send(sweep: Sweep, shape: Shape, site: ClusterProfile, code: Path) -> int:
    """Submit what is missing or failed: statistics, then the runs that need them, then the table."""
    book, alive = Book(sweep), queued()
    states = book.states([*sweep.passes(), *sweep.runs()], alive)
    passes = [t for t in sweep.passes() if states[t.name] in ("missing", "failed")]
    runs = [t for t in sweep.runs() if states[t.name] in ("missing", "failed")]
    if not runs:
        under_way = [name for name, state in states.items() if state != "finished"]
        print(f"{len(under_way)} still in the queue, nothing to submit" if under_way else gather(sweep))
        return 0
    awaited = [
        book.jobs()[t.name] for t in sweep.passes() if states[t.name] not in ("missing", "failed", "finished")
    ]
    os.environ["SUBMITIT_EXECUTOR"] = ""

    def submitted(tasks: Sequence[Task], name: str, after: str) -> list[str]:
        settings = parameters(name, sweep, shape, site, code, after)
        jobs = submit([Launch(t) for t in tasks], settings, book.logs, site.python)
        book.note(tasks, jobs)
        print(f"{name}: {', '.join(t.name for t in tasks)} as {jobs[0]}" + (f" … {jobs[-1]}" if jobs[1:] else ""))
        return jobs

    awaited += submitted(passes, "statistics", "") if passes else []
    sent: list[str] = []
    for piece in chunks(runs):  # one array after the other, so that no more runs than asked for work at a time
        last = f"afterany:{_array(sent[-1])}" if sent else ""
        sent += submitted(piece, "runs", ",".join(filter(None, [_after("ok", awaited), last])))
    alone = parameters("gather", sweep, replace(shape, nodes=1, gpus=0, cpus=1), site, code, _after("any", sent))
    submit([Gather(sweep)], alone, book.logs, site.python)
    print(f"table and picture, once they ended: {sweep.folder}; --status shows how far they are")
    return 0


def _after(how: str, jobs: Sequence[str]) -> str:
    arrays = list(dict.fromkeys(map(_array, jobs)))
    return f"after{how}:{':'.join(arrays)}" if arrays else ""


def _array(job: str) -> str:
    return job.partition("_")[0]


# ── here ───────────────────────────────────────────────────────────────────────────────────────────────────


def work_here(sweep: Sweep, asked: Submission, code: Path) -> int:
    """Do what is missing or failed on this machine, some at a time; then the table."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    book = Book(sweep)
    for tasks in (sweep.passes(), sweep.runs()):
        states = book.states(tasks, living(asked))
        todo = [t for t in tasks if states[t.name] in ("missing", "failed")]
        if asked.cluster == "debug":
            _one_by_one(todo, book)
        else:
            _some_at_a_time(todo, book, asked)
        if failed := [t for t in tasks if not t.is_done]:
            print("\n".join(f"{t.name} failed: {book.reason(t)}" for t in failed), file=sys.stderr)
            if tasks is not sweep.runs() and failed[0].product != "result.json":
                return 1
    print(gather(sweep))
    return int(not all(t.is_done for t in sweep.runs()))


def _one_by_one(tasks: Sequence[Task], book: Book) -> None:
    executor = submitit.AutoExecutor(book.logs, cluster="debug")
    for task in tasks:
        job = executor.submit(Launch(task))
        book.note([task], [str(job.job_id)])
        try:
            job.result()
        except SystemExit:
            print(f"{task.name} failed", file=sys.stderr)


def _some_at_a_time(tasks: Sequence[Task], book: Book, asked: Submission) -> None:
    executor = submitit.AutoExecutor(book.logs, cluster="local")
    executor.update_parameters(
        timeout_min=asked.time, tasks_per_node=max(1, asked.gpus_per_node), gpus_per_node=asked.gpus_per_node
    )
    running: list[Any] = []
    for task in tasks:
        while len(running) >= asked.array_parallelism:
            time.sleep(POLL_S)
            running = [job for job in running if not job.done()]
        running.append(executor.submit(Launch(task)))
        book.note([task], [str(running[-1].job_id)])
        print(f"{task.name}: process {running[-1].job_id}", flush=True)
    while not all(job.done() for job in running):
        time.sleep(POLL_S)
