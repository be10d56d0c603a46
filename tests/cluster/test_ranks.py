"""How the batch script starts ranks, with a stand-in for srun: without a cluster."""

import subprocess

from tests.commands import ROOT


def test_neighbouring_ranks_lie_on_one_socket_with_the_jobs_processors_and_end_together() -> None:
    script = """
        source slurm/common.sh
        srun() { printf '%s\\n' "$@"; return 75; }
        SLURM_TASKS_PER_NODE="4(x2)" SLURM_CPUS_PER_TASK=3
        run_ranks python launch/local.py "two words"
        echo "status $?"
    """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    *flags, python, program, words, status = done.stdout.splitlines()
    assert sorted(flags) == [
        "--cpus-per-task=3",  # srun does not inherit it
        "--distribution=block:block",
        "--kill-on-bad-exit=1",
        "--ntasks-per-node=4",
    ]
    assert (python, program, words, status) == ("python", "launch/local.py", "two words", "status 75")
