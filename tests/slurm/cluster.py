"""A real SLURM cluster on this host: one slurmctld and four slurmd with two fake GPUs each, on own ports.

Nodes share the host's processors and files; what differs is the node's name, and what `hidden_on` hides.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
GPUS = 2
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
MAX_ARRAY = 8

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=3,bf_interval=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
KillWait=15
MaxArraySize={max_array}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL State=UP MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    if absent := [name for name in DAEMONS if shutil.which(name, path=_search_path()) is None]:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "slurmd and device nodes need root"


def _search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Cluster:
    """The daemons, and SLURM's commands against them; `home` is on the file system all nodes share."""

    home: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environ(self) -> dict[str, str]:
        """What a user's shell on this cluster has."""
        hidden = re.compile("SLURM_|SBATCH_|SUBMITIT_|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_|CUDA_VISIBLE")
        clean = {name: value for name, value in os.environ.items() if not hidden.match(name)}
        return clean | {"SLURM_CONF": str(self.home / "slurm.conf"), "PATH": _search_path()}

    # ── daemons ────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Write the configuration and start all daemons; return when all nodes are idle."""
        (self.home / "state").mkdir(parents=True)
        for index in range(GPUS):
            os.mknod(self.home / f"nvidia{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gpus = f"NodeName=n[1-4] Name=gpu File={self.home}/nvidia[0-{GPUS - 1}]\n"
        (self.home / "gres.conf").write_text(gpus)
        first = free_ports(1 + len(NODES))
        ports = (first, first + 1, first + len(NODES))
        facts = {"host": socket.gethostname(), "home": self.home, "ports": ports, "gpus": GPUS}
        (self.home / "slurm.conf").write_text(CONFIGURATION.format(**facts, max_array=MAX_ARRAY))
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, f"four idle nodes, see {self.home}")

    def start_node(self, node: str, prefix: Sequence[str] = ()) -> None:
        """Start one slurmd, under the command `prefix` if given."""
        self._spawn(node, [*prefix, "slurmd", "-D", "-N", node])

    def _spawn(self, name: str, words: Sequence[str]) -> None:
        with (self.home / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environ, stdout=out, stderr=out, start_new_session=True
            )

    def stop_daemon(self, name: str, how: int = signal.SIGTERM) -> None:
        """End one daemon by its pid."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(how)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """Cancel what runs, and end all daemons and whatever process of a job is left."""
        for job in self.jobs():
            self.run("scancel", "--full", job)
        with_patience(lambda: not self.jobs(), 20)
        for name in [*self.daemons]:
            self.stop_daemon(name)
        for pid in processes(f"SLURM_CONF={self.home / 'slurm.conf'}", "SLURM_JOB_ID="):
            os.kill(pid, signal.SIGKILL)

    def states(self) -> dict[str, str]:
        """Each node's state, as sinfo has it."""
        lines = self.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%N %T").out.split("\n")
        return dict(line.split() for line in lines if line)

    @contextmanager
    def hidden_on(self, node: str, folder: Path) -> Iterator[None]:
        """On one node, let something else lie over `folder`: a file system that it does not share."""
        self.stop_daemon(node)
        cover = f'mount -t tmpfs none {folder} && exec "$@"'
        self.start_node(node, ["unshare", "-m", "sh", "-c", cover, "sh"])
        self.ready(node)
        yield
        self.stop_daemon(node)
        self.start_node(node)
        self.ready(node)

    def ready(self, node: str) -> None:
        """Bring a node back, and wait until it is idle."""
        wait_for(lambda: (self.home / f"slurmd.{node}.pid").exists(), 20, f"the daemon of {node}")
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_for(lambda: self.states()[node] == "idle", 40, f"{node} idle, it is {self.states()[node]}")

    # ── jobs ───────────────────────────────────────────────────────────────────────────────────────────

    def run(self, *words: object, cwd: Path | None = None, deadline_s: float = 60, **environ: str) -> Said:
        """Run a command as a user of the cluster."""
        done = subprocess.run(
            [*map(str, words)],
            env=self.environ | environ,
            cwd=cwd or self.home,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def submit(self, *words: object, cwd: Path | None = None, **environ: str) -> str:
        """`sbatch` these words; the job's number."""
        said = self.run("sbatch", "--parsable", *words, cwd=cwd, **environ)
        assert said.code == 0, said.err
        return said.out.strip().partition(";")[0]

    def jobs(self) -> list[str]:
        """All that is queued or running; an array's elements apart."""
        return self.run("squeue", "--noheader", "--array", "-o", "%i").out.split()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        said = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(\S*)", said.out))

    def state(self, job: str) -> str:
        """The job's state; empty once forgotten."""
        return self.show(job).get("JobState", "")

    def release(self, job: str) -> None:
        """A requeued job waits two minutes before it may start again: not this one."""
        time.sleep(5)  # a node that has just revoked a job's credential refuses to start it
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def finish(self, job: str, deadline_s: float = 120) -> str:
        """Wait until the job ended, releasing it whenever it was requeued; its last state."""
        deadline = time.monotonic() + deadline_s
        while True:
            shown = self.show(job)
            state = shown.get("JobState", "")
            if state not in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING", "REQUEUED"):
                return state
            if state == "PENDING" and shown.get("Reason") == "BeginTime":
                self.release(job)
            assert time.monotonic() < deadline, f"job {job} still {state} after {deadline_s:g} s: {shown}"
            time.sleep(0.5)

    def processes_of(self, job: str) -> list[int]:
        """Processes of a job, on all nodes: they are one host's."""
        return processes(f"SLURM_CONF={self.home / 'slurm.conf'}", f"SLURM_JOB_ID={job}\0")


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that were free a moment ago."""
    for first in range(17000 + os.getpid() % 500 * 8, 32000, count):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def processes(*variables: str) -> list[int]:
    """Who was started with all of these, `NAME=` or `NAME=value\\0`, in the environment; zombies have none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = b"\0" + (folder / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if all(b"\0" + variable.encode() in environ for variable in variables):
            found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_for(holds: Callable[[], object], deadline_s: float, what: str) -> None:
    """Poll until it holds; AssertionError after the deadline."""
    assert with_patience(holds, deadline_s), f"timed out after {deadline_s:g} s: {what}"


def with_patience(holds: Callable[[], object], deadline_s: float) -> bool:
    """Poll until it holds; whether it did before the deadline."""
    deadline = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True
