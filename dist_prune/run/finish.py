"""The end of a run: the network saved, the results printed, the pages drawn, and result.json last."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_prune.artifacts.answers import ANSWERS, Answers
from dist_prune.artifacts.answers import save as save_answers
from dist_prune.artifacts.saved_model import Description, save_compressed
from dist_prune.distributed.fingerprint import digest
from dist_prune.factorization.plan import Cost
from dist_prune.factorization.release import release
from dist_prune.network.published import options_of
from dist_prune.reporting.html import page
from dist_prune.run.job import STAGES, Job, probe
from dist_prune.utils import files
from dist_prune.utils.tables import table


def finished(folder: Path) -> bool:
    """result.json is written last."""
    return (folder / "result.json").is_file()


def finish(job: Job) -> None:
    """Prove the network sound and measure it, save it, print the results, and write result.json last."""
    after = release(job.state.compressed, probe(job.config, job.world, 1))
    description = Description(
        job.config.network.arch,
        job.config.network.classes,
        job.config.images.image,
        job.dataset.train.classes,
        job.state.chosen,
        options_of(job.config.network.arch, job.config.network.weights),
        job.state.kept,
    )
    job.world.from_first(lambda: save_compressed(job.folder, job.state.compressed, description))
    answers = Answers(job.dataset.val.digest(), job.state.right)
    job.world.from_first(lambda: save_answers(job.folder / ANSWERS, answers))
    result = outcome(job, after)
    job.world.from_first(lambda: draw(job, result))
    job.world.from_first(lambda: files.write_text(job.folder / "result.json", files.to_json(result)))
    job.report.say(format_outcome(job, result))
    if job.report.curves is not None:
        job.report.curves.settings(*to_compare(job, result))


def draw(job: Job, result: dict[str, Any]) -> None:
    """The pages of the run, which is worth more than they are: whatever goes wrong with them is only a warning."""
    try:
        page.write(job.folder, result)
    except Exception as error:
        job.report.warn(f"{page.HTML} could not be drawn ({error!r}); try dist-prune report {job.folder}")


def outcome(job: Job, after: Cost) -> dict[str, Any]:
    """What result.json holds; `after` is the compressed network's cost, as measured."""
    return {
        **{stage: asdict(job.state.metrics[stage]) if stage in job.state.metrics else None for stage in STAGES},
        "macs": {"dense": job.dense_survey.macs, "compressed": after.macs},
        "params": {"dense": job.dense_survey.params, "compressed": after.params},
        "seconds": {phase: round(seconds, 3) for phase, seconds in job.report.seconds.items()},
        "world_size": job.world.size,
        "seed": job.config.seed,
        "method": job.config.compression.basis.method,
        "ranks": job.config.compression.ranks,
        "warnings": job.report.warnings,
        "parameter_hash": digest(job.state.compressed),
    }


def to_compare(job: Job, result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The settings that runs differ in most, and what they came to, for TensorBoard."""
    config, last = job.config, list(job.state.metrics.values())[-1]
    settings = {
        "network": config.network.arch,
        "method": config.compression.basis.method,
        "ranks": config.compression.ranks,
        "sites": config.compression.sites,
        "correct": config.correction.correct,
        "distill-steps": config.distillation.distill_steps,
        "epochs": config.tuning.epochs,
        "lr": config.tuning.lr,
        "batch-size": config.tuning.batch_size,
        "seed": config.seed,
        "processes": job.world.size,
    }
    shares = {f"final/{kind}": result[kind]["compressed"] / result[kind]["dense"] for kind in ("macs", "params")}
    return settings, {"final/top1": last.top1, "final/kl": last.kl or 0.0, "final/loss": last.loss} | shares


def format_outcome(job: Job, result: dict[str, Any]) -> str:
    """The summary: accuracy at every stage, cost, and where everything is."""
    rows = [
        [stage, f"{m.top1:.2f} %", f"{m.top5:.2f} %", f"{m.loss:.4f}", "" if m.kl is None else f"{m.kl:.4f}"]
        for stage, m in job.state.metrics.items()
    ]
    macs, params = result["macs"], result["params"]
    return (
        f"{table(['stage', 'top-1', 'top-5', 'loss', 'KL'], rows)}\n"
        f"MACs ×{macs['compressed'] / macs['dense']:.3f}, "
        f"parameters ×{params['compressed'] / params['dense']:.3f}\n"
        f"written to {job.folder}: {', '.join(sorted(p.name for p in job.folder.iterdir()))}\n"
        f"curves: tensorboard --logdir {job.folder.parent}"
    )
