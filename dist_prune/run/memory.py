"""Memory that ran out, on a GPU or a host: in which phase, and which flag of a run changes it."""

from __future__ import annotations

import re

import torch

from dist_prune.config.run import Run

ON_HOST = re.compile(r"DefaultCPUAllocator: (?:can't|not enough|.*failed)", re.IGNORECASE)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    on_host = isinstance(error, MemoryError) or bool(ON_HOST.search(str(error)))
    return on_host or isinstance(error, torch.OutOfMemoryError)


def format_exhausted(error: BaseException, phase: str, config: Run) -> str:
    """One line: the phase, what to lower, and the first sentence of what was said."""
    first = re.split(r"(?<=[a-z])\. |\n", str(error) or type(error).__name__)[0]
    return f"out of memory in phase {phase!r}: {advice(phase, config)} ({first})"


def advice(phase: str, config: Run) -> str:
    """What of this run's settings takes memory in a phase."""
    each = f"lower --eval-batch-size (it is {config.images.eval_batch_size})"
    if phase == "pretrain":
        return f"lower --pretrain.batch-size (it is {config.pretrain.batch_size})"
    if phase == "finetune" or phase.endswith("training"):
        tuning = config.tuning
        accumulate = f"raise --accumulate (it is {tuning.accumulate}) as much, to keep the global batch"
        return f"lower --batch-size (it is {tuning.batch_size}), and {accumulate}"
    if phase == "distillation":
        return f"lower --distill-batch-size (it is {config.distillation.distill_batch_size})"
    if phase in ("correction", "batch norm", "width", "search"):
        kept = config.correction.calibration_gb
        now = f"it is {kept:g} GiB per rank" if kept else "it is half of what was free"
        return f"lower --calibration-gb ({now}), or --calibrate-images; or {each}"
    if phase in ("bases", "projection"):
        return "leave the widest layers dense by --sites, or compute with --device cpu"
    return each
