"""The program as its user starts it, on any number of ranks, without the seconds that imports take.

A server process imports everything once; each command is then forked from it into fresh processes with the
variables that torchrun would set, an output of their own and a deadline.
"""

import atexit
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAIN = "dist_prune.cli.main:main"
PROGRAM = "dist_prune.cli.commands:main"


@dataclass(frozen=True)
class Done:
    """How the ranks ended: their exit codes (−signal where killed), all they said, and how long it took."""

    codes: list[int]
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines for the user."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Commands:
    """Runs commands in `home`; what they cache goes below it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environ = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environ = environ | {
            "OMP_NUM_THREADS": "1",
            "DIST_PRUNE_CACHE": str(home / "cache"),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=self.environ,
            text=True,
        )

    def __call__(
        self, *words: object, ranks: int = 1, function: str = MAIN, deadline_s: float = 120, **more: str
    ) -> Done:
        """Call `function`, a `module:name` that takes the words and returns an exit code, on every rank.

        Args:
            words: the command line; with another function than MAIN and PROGRAM, its arguments.
            ranks: how many processes, told by torchrun's variables; 0 is a single one without them.
            function: what to call.
            deadline_s: all ranks are killed, and AssertionError raised, after so long.
            more: `kill_when=GLOB` kills once such a file exists, `kill_after=SECONDS` later; all ranks, unless
                `kill_rank=N`; by SIGKILL, unless `kill_with=SIGNAME`. Other names are environment variables.
        """
        assert self.server.stdin and self.server.stdout
        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            request = {
                "function": function,
                "words": [str(word) for word in words],
                "ranks": ranks,
                "deadline_s": deadline_s,
                "kill_when": more.pop("kill_when", ""),
                "kill_after": float(more.pop("kill_after", "0")),
                "kill_rank": more.pop("kill_rank", ""),
                "kill_with": more.pop("kill_with", "SIGKILL"),
                "environ": more,
                "cwd": str(self.home),
                "folder": folder,
            }
            began = time.monotonic()
            print(json.dumps(request), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            out, err = (
                "".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{k}"))) for k in ("out", "err")
            )
        done = Done(codes or [], out, err, time.monotonic() - began)
        assert codes is not None, f"{words} hung and was killed after {deadline_s:g} s\n{out}\n{err}"
        return done

    def succeed(self, *words: object, **more: Any) -> Done:
        """As a call, where every rank must end well."""
        done = self(*words, **more)
        assert not any(done.codes), f"exit codes {done.codes} of {words}\n{done.out}\n{done.err}"
        return done

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(60)


@functools.cache
def shared_commands() -> Commands:
    """One server for all tests of a session, in a folder that goes with it."""
    home = Path(tempfile.mkdtemp(prefix="dist-prune-tests-"))
    commands = Commands(home)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    atexit.register(commands.close)
    return commands


def _serve() -> None:
    importlib.import_module("dist_prune.cli.commands")
    importlib.import_module("nvidia.dali.plugin.pytorch")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_ended(request, _start(request))), flush=True)


def _start(request: dict[str, Any]) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    pids = []
    for rank in range(max(request["ranks"], 1)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"])} | meeting
        pids.append(os.fork())
        if not pids[-1]:
            _become(request, rank, place if request["ranks"] else {})
    return pids


def _become(request: dict[str, Any], rank: int, place: dict[str, str]) -> None:
    """Be one rank, and end."""
    code = 1
    try:
        for kind, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{request['folder']}/{rank}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(request["cwd"])
        os.environ.update(place | request["environ"])
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        code = (
            function(request["words"]) if request["function"] in (MAIN, PROGRAM) else function(*request["words"])
        )
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _ended(request: dict[str, Any], pids: list[int]) -> list[int] | None:
    """Wait for all; their exit codes, or None past the deadline."""
    codes: dict[int, int] = {}
    deadline, target = time.monotonic() + request["deadline_s"], Path(request["kill_when"] or "/never")
    late, due = False, float("inf")
    victims = [pids[int(request["kill_rank"])]] if request["kill_rank"] else list(pids)
    while len(codes) < len(pids):
        late = late or time.monotonic() > deadline
        if due == float("inf") and any(target.parent.glob(target.name)):
            due = time.monotonic() + request["kill_after"]
        if time.monotonic() > due:
            for pid in [p for p in victims if p not in codes]:
                os.kill(pid, signal.Signals[request["kill_with"]])
            victims = []
        for pid in [p for p in pids if p not in codes]:
            if late:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None if late else [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
