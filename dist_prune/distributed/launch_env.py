"""Rank, world size and rendezvous of this process, from the environment of torchrun, srun or submitit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SLURM_STEP_ID_MAX = 0xFFFFFFF0  # above: batch scripts and interactive shells, which srun did not start as ranks


@dataclass(frozen=True)
class LaunchEnv:
    """The launch environment of one process: `rank` of `size`, `local_rank` on its node, the rendezvous url.

    `has_launcher`: its parent is torchrun, without which no rank may continue; `launcher_serves`: torchrun serves
    the store at that url, and did so before any rank was started; `restart`: how often the job was started before.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    source: Literal["torchrun", "submitit", "slurm", "single", "present"]
    has_launcher: bool = False
    launcher_serves: bool = False
    restart: int = 0


def find_launch_env(environ: Mapping[str, str]) -> LaunchEnv:
    """From torchrun's variables, else submitit's on one machine, else srun's, else a single process.

    MASTER_ADDR and MASTER_PORT, where set, override what is derived from SLURM's variables.

    Raises:
        ValueError: a launcher's variables are incomplete or not numbers.
    """
    if "RANK" in environ:
        rank, size, local_rank = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        url = _url(_required(environ, "MASTER_ADDR"), environ)
        launcher = "TORCHELASTIC_RUN_ID" in environ, environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return LaunchEnv(rank, size, local_rank, url, "torchrun", *launcher)
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        rank, size = (_number(environ, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "NTASKS"))
        port = str(_port(_number(environ, "SUBMITIT_LOCAL_JOB_ID")))
        return LaunchEnv(rank, size, rank, _url("127.0.0.1", {"MASTER_PORT": port}), "submitit")
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_ID", SLURM_STEP_ID_MAX)) < SLURM_STEP_ID_MAX:
        return _slurm_launch_env(environ)
    return LaunchEnv(0, 1, 0, "", "single")


def _slurm_launch_env(environ: Mapping[str, str]) -> LaunchEnv:
    # The step's own numbers win: a step may be smaller than its job.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    names = [name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ]
    nodes = _required(environ, names[0] if names else "SLURM_NODELIST")
    # Steps of one job, and jobs of one array, may share a node: neighbours must not get the same port. Nor must
    # the ranks of a start before, which may outlive a preemption (submitit#1613): a requeued job keeps its number.
    restart = _number({"SLURM_RESTART_COUNT": "0", **environ}, "SLURM_RESTART_COUNT")
    port = _port(_number(environ, "SLURM_JOB_ID") + 1009 * _number(environ, "SLURM_STEP_ID") + 4507 * restart)
    master = environ.get("MASTER_ADDR") or expand_nodelist(nodes)[0]
    return LaunchEnv(
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, tasks),
        local_rank=_number(environ, "SLURM_LOCALID"),
        address=_url(master, {"MASTER_PORT": str(port), **environ}),
        source="slurm",
        restart=restart,
    )


def _port(job: int) -> int:
    return 20000 + job % 12000


def _required(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise ValueError(f"{name} is not set although other launcher variables are: start with torchrun or srun")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _required(environ, name)
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}, expected a whole number: start with torchrun or srun")
    return int(value)


def _url(host: str, environ: Mapping[str, str]) -> str:
    return f"tcp://{f'[{host}]' if ':' in host else host}:{_number(environ, 'MASTER_PORT')}"


def expand_nodelist(nodes: str) -> list[str]:
    """Host names of a SLURM node list, in order: `n[08-10],m3` gives n08, n09, n10, m3.

    Raises:
        ValueError: the list is empty or malformed.
    """
    if not re.fullmatch(r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]|(?!^),(?!,|$))+", nodes):
        raise ValueError(f"cannot read the SLURM node list {nodes!r}: expected something like n[1-4,7],m03")
    items = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return [host for item in items for host in _expand_brackets(item)]


def _expand_brackets(item: str) -> list[str]:
    head, _, rest = item.partition("[")
    if not rest:
        return [item]
    ranges, _, tail = rest.partition("]")
    numbers = [number for part in ranges.split(",") for number in _expand_range(part)]
    return [head + number + end for number in numbers for end in _expand_brackets(tail)]


def _expand_range(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [str(i).zfill(len(first)) for i in range(int(first), int(last or first) + 1)]
