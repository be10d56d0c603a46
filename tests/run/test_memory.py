"""Memory that runs out is said in one line, with the phase and the flag that changes it."""

from pathlib import Path

import pytest
import torch

from dist_prune.config.recipes import parse
from dist_prune.run.memory import advice, format_exhausted, is_exhausted
from tests.runs import NETWORK, Bench

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 is free."
)

HUNGRY = (
    NETWORK
    + f"""
import torch

class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.fails = False
    def forward(self, x):
        if self.training and len(x) == 4 or not self.training and len(x) == 7:
            raise torch.OutOfMemoryError({SAID!r})
        return x

def hungry(num_classes):
    return nn.Sequential(*tiny(num_classes), Hungry())
"""
)


@pytest.mark.parametrize(
    ("flags", "phase", "flag"),
    [
        ({"epochs": 1, "batch_size": 4}, "finetune", "--batch-size (it is 4), and raise --accumulate (it is 1)"),
        ({"epochs": 0, "eval_batch_size": 7}, "baseline", "--eval-batch-size (it is 7)"),
        (
            {"epochs": 0, "distill_steps": 2, "distill_batch_size": 4},
            "distillation",
            "--distill-batch-size (it is 4)",
        ),
    ],
)
def test_a_run_out_of_memory_names_the_phase_and_the_flag(
    bench: Bench, tmp_path: Path, flags: dict[str, object], phase: str, flag: str
) -> None:
    (tmp_path / "net.py").write_text(HUNGRY)
    words = bench.words(tmp_path / "run", **{"arch": f"{tmp_path}/net.py:hungry"} | flags)
    done = bench.commands(*words, ranks=1)
    assert done.codes == [1]
    (line,) = done.errors
    assert line.startswith(f"error: out of memory in phase '{phase}': lower {flag}")
    assert line.endswith("(CUDA out of memory)")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("phase", "flag"),
    [
        ("pretrain", "--pretrain.batch-size (it is"),
        ("round 2: training", "--batch-size (it is"),
        ("statistics", "--eval-batch-size (it is"),
        ("evaluate tuned", "--eval-batch-size (it is"),
        ("correction", "--calibration-gb (it is half of what was free)"),
        ("bases", "--sites"),
    ],
)
def test_each_phase_has_a_flag(phase: str, flag: str) -> None:
    assert flag in advice(phase, parse(["cifar10"]))


def test_memory_of_the_host_counts_and_other_errors_do_not() -> None:
    assert is_exhausted(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_exhausted(caught.value)
    assert not is_exhausted(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert "MemoryError" in format_exhausted(MemoryError(), "bases", parse(["cifar10"]))
