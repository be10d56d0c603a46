"""The story of a run: load → collect → rank → project → correct → fine-tune → evaluate → save."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune import checkpoint, correction, models, sensitivity, statistics
from dist_prune.bases import solve
from dist_prune.config import DATA_FREE, Run, require_complete, to_dict
from dist_prune.data import Everything, evaluation_stream, normalise
from dist_prune.distillation import distill
from dist_prune.evaluate import Metrics, Predictions, predict, score, time_sites
from dist_prune.export import Description, save_compressed
from dist_prune.job import STAGES, Job, calibration, prepare, probe, show_plan, statistics_split, validation
from dist_prune.projection import balance, project, rebuild
from dist_prune.ranks import Plan, cost
from dist_prune.report import Report, table
from dist_prune.spectra import Spectra, spectra_of, unit_of
from dist_prune.statistics import Statistics
from dist_prune.training import resume_point, train
from dist_prune.world import digest, fingerprint, joined

SITE_IMAGES = 512  # on which sites are measured alone


def run(config: Run) -> Path | None:
    """Do the whole job on all ranks; the run's directory, or None for a dry run.

    Raises:
        ValueError: in its many kinds: something in the configuration, data or weights cannot be used. Raised
            before long work starts, and on every rank.
    """
    require_complete(config)
    with joined(config.device, config.timeout) as world:
        report = Report(speaks=world.is_first)
        if config.dry_run:
            show_plan(config, world, report)
            return None
        folder = world.from_first(lambda: checkpoint.run_directory(config))
        world.from_first(lambda: checkpoint.require_free(folder, config))
        if config.resume and world.from_first(lambda: finished(folder)):
            report.say(f"{folder} holds a finished run; nothing to resume")
            return folder
        job = prepare(config, world, report, folder)
        try:
            compress_and_tune(job)
        finally:
            report.close()
        return job.folder


def compress_and_tune(job: Job) -> None:
    """The story."""
    resumed = resume_point(job)
    train_dense(job)
    if job.config.until == "statistics":
        gather(job)
        return
    reference = baseline(job)
    if resumed is None:
        plan, compressed = compress(job)
        job.metrics["projected"] = measure(job, compressed, reference, "projected")
        measure_alone(job, plan, compressed)
        correct(job, compressed, reference)
        distill_further(job, compressed, reference)
    else:
        plan = Plan.from_json(resumed["plan"])
        compressed = rebuild(job.dense, plan)
        compressed.load_state_dict(resumed["model"])
    tune(job, plan, compressed, reference, resumed)
    finish(job, plan, compressed)


# ── the work ───────────────────────────────────────────────────────────────────────────────────────────────


def train_dense(job: Job) -> None:
    """Without given weights, train the dense network, or take the one an earlier run trained the same way."""
    config = job.config
    if config.network.weights != "none":
        return
    settings = [
        config.network,
        config.images,
        config.pretrain,
        config.seed,
        job.world.size,
        torch.__version__,
    ]
    source = Path(config.network.arch.partition(":")[0])  # where the architecture is a file of the user's own
    code = checkpoint.checksum(source) if source.is_file() else ""
    key = [*map(str, map(to_dict, settings)), job.dataset.train.digest(), code]
    cached = checkpoint.cache_folder() / f"{config.network.arch.replace('/', '_')}-{checkpoint.name_of(key)}.pt"
    if job.world.from_first(lambda: checkpoint.is_intact(cached)):
        job.report.say(f"dense weights from {cached}")
        job.dense.load_state_dict(models.read_weights(config.network.arch, config.network.classes, str(cached)))
        return
    with job.report.phase("pretrain"):
        train(job, job.dense, config.pretrain, "pretrain")
    job.world.from_first(lambda: checkpoint.save_weights(cached, job.dense))
    job.report.say(f"dense weights kept in {cached}")


def baseline(job: Job) -> Predictions:
    """The dense network on the validation images: figures, and logits for the divergence."""
    job.world.require_same("parameters (dense)", fingerprint(job.dense))
    with job.report.phase("baseline"):
        found = predict(job.dense, validation(job))
        metrics = score(found, len(job.dataset.val), job.world)
    if "dense" not in job.metrics:  # a resumed run has told it before
        job.metrics["dense"] = metrics
        told(job, "dense", metrics)
    return found


def measure(job: Job, model: nn.Module, reference: Predictions, stage: str) -> Metrics:
    """The compressed network on the validation images; all ranks must hold the same network."""
    job.world.require_same(f"parameters ({stage})", fingerprint(model))
    with job.report.phase(f"evaluate {stage}"):
        found = predict(model, validation(job))
        metrics = score(found, len(job.dataset.val), job.world, reference)
    told(job, stage, metrics)
    return metrics


def told(job: Job, stage: str, metrics: Metrics) -> None:
    """One line for people, one point on the curves."""
    job.report.scalars("val", STAGES.index(stage), {k: v for k, v in asdict(metrics).items() if k != "images"})
    job.report.flush()
    divergence = "" if metrics.kl is None else f", KL to dense {metrics.kl:.4f}"
    job.report.say(
        f"   {stage}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}{divergence}"
    )


def compress(job: Job) -> tuple[Plan, nn.Module]:
    """Statistics → bases → plan → projected network."""
    config, sites, method = job.config, job.survey.sites, job.config.compression.basis
    if method.method == "random-init":
        plan = decide(job, None)
        torch.manual_seed(config.seed)
        untrained = models.build(config.network.arch, config.network.classes)
        return plan, rebuild(untrained, plan).to(job.world.device)
    gathered = gather(job)
    with job.report.phase("bases"):
        bases = solve(job.dense, sites, gathered, method, config.seed, job.world)
    plan = decide(job, spectra_of(bases, method))
    job.report.site_spectra(job.survey, bases, plan)
    with job.report.phase("projection"):
        return plan, project(job.dense, sites, bases, plan, method.side)


def decide(job: Job, spectra: Spectra | None) -> Plan:
    """The plan, made on rank 0, and told."""
    plan = job.world.from_first(lambda: job.planner.plan(spectra))
    noise = probe(job.config, job.world, 16)
    shares = job.world.from_first(lambda: time_sites(job.dense, job.survey.sites, noise))
    job.report.say(job.planner.told(plan, shares, spectra.unit if spectra else ""))
    return plan


def measure_alone(job: Job, plan: Plan, compressed: nn.Module) -> None:
    """With --measure-sites: what each site loses by itself, next to what was predicted."""
    if not job.config.compression.measure_sites:
        return
    images, split = job.config.images, statistics_split(job, SITE_IMAGES)
    with job.report.phase("measure sites"):
        everything = Everything(job.world.device, job.world.local_rank)
        stream = evaluation_stream(split, images.image, everything, images.eval_batch_size, images.threads)
        decoded = list(stream.raw())
        losses = sensitivity.measure_sites(
            job.dense,
            compressed,
            plan,
            lambda: (replace(b, images=normalise(b.images, images.image)) for b in decoded),
            job.world,
        )
    unit = unit_of(job.config.compression.basis)
    job.report.say(sensitivity.told(losses, unit))
    path = job.folder / "sites.json"
    job.world.from_first(lambda: sensitivity.save(path, losses, unit, len(split)))


def gather(job: Job) -> Statistics:
    """The statistics the method needs: from the file given, or collected now and kept in the run's directory."""
    method, sites, seed = job.config.compression.basis, job.survey.sites, job.config.seed
    if method.method in DATA_FREE:
        return Statistics()
    split, image = statistics_split(job, 0), to_dict(job.config.images.image)
    made_of = statistics.origin(method, digest(job.dense), split.digest(), image, seed)
    if method.statistics is not None:
        return statistics.load(method.statistics, sites, made_of, job.world.device)
    with job.report.phase("statistics"):
        found = statistics.collect(job.dense, sites, lambda n: calibration(job, n), job.world, method, seed)
    for warning in statistics.warnings(found, sites, method, len(split)):
        job.report.say(f"warning: {warning}")
    path = job.folder / "statistics.safetensors"
    job.world.from_first(lambda: statistics.save(path, found, made_of))
    return found


def correct(job: Job, compressed: nn.Module, reference: Predictions) -> None:
    """Solve the sites anew against the dense network, in place, and measure what came of it."""
    settings = job.config.correction
    if settings.correct == "none" or job.config.compression.basis.method == "random-init":
        return
    with job.report.phase("correction"):
        images = correction.decode(calibration(job, settings.calibrate_images), settings.mirrored)
        seed = job.config.seed
        result = correction.correct(job.dense, compressed, job.everything, images, settings, seed, job.world)
    job.report.say(correction.told(result))
    job.metrics["corrected"] = measure(job, compressed, reference, "corrected")


def distill_further(job: Job, compressed: nn.Module, reference: Predictions) -> None:
    """With --distill-steps, label-free training, told as a stage of its own."""
    if not job.config.distillation.distill_steps:
        return
    with job.report.phase("distillation"):
        distill(job, compressed)
    job.metrics["distilled"] = measure(job, compressed, reference, "distilled")


def tune(
    job: Job, plan: Plan, compressed: nn.Module, reference: Predictions, resumed: dict[str, Any] | None
) -> None:
    """Fine-tune the compressed network and measure it."""
    if not job.config.tuning.epochs:
        return
    if resumed is None:
        balance(compressed)
    with job.report.phase("finetune"):
        train(job, compressed, job.config.tuning, "train", keep=plan, resumed=resumed)
    job.metrics["tuned"] = measure(job, compressed, reference, "tuned")


# ── the end ────────────────────────────────────────────────────────────────────────────────────────────────


def finished(folder: Path) -> bool:
    """result.json is written last."""
    return (folder / "result.json").is_file()


def finish(job: Job, plan: Plan, compressed: nn.Module) -> None:
    """Save the model, tell the figures, and write result.json last."""
    description = Description(
        job.config.network.arch,
        job.config.network.classes,
        job.config.images.image,
        job.dataset.train.classes,
        plan,
    )
    job.world.from_first(lambda: save_compressed(job.folder, compressed, description))
    result = outcome(job, plan, compressed)
    job.world.from_first(
        lambda: checkpoint.write_text(job.folder / "result.json", json.dumps(result, indent=1) + "\n")
    )
    job.report.say(told_outcome(job, result))


def outcome(job: Job, plan: Plan, compressed: nn.Module) -> dict[str, Any]:
    """What result.json holds."""
    after = cost(job.survey, plan)
    return {
        **{stage: asdict(job.metrics[stage]) if stage in job.metrics else None for stage in STAGES},
        "macs": {"dense": job.survey.macs, "compressed": after.macs},
        "params": {"dense": job.survey.params, "compressed": after.params},
        "seconds": {phase: round(seconds, 3) for phase, seconds in job.report.seconds.items()},
        "world_size": job.world.size,
        "seed": job.config.seed,
        "method": job.config.compression.basis.method,
        "ranks": job.config.compression.ranks,
        "parameter_hash": digest(compressed),
    }


def told_outcome(job: Job, result: dict[str, Any]) -> str:
    """The last words: accuracy at every stage, cost, and where everything is."""
    rows = [
        [stage, f"{m.top1:.2f} %", f"{m.top5:.2f} %", f"{m.loss:.4f}", "" if m.kl is None else f"{m.kl:.4f}"]
        for stage, m in job.metrics.items()
    ]
    macs, params = result["macs"], result["params"]
    return (
        f"{table(['stage', 'top-1', 'top-5', 'loss', 'KL'], rows)}\n"
        f"MACs ×{macs['compressed'] / macs['dense']:.3f}, "
        f"parameters ×{params['compressed'] / params['dense']:.3f}\n"
        f"written to {job.folder}: {', '.join(sorted(p.name for p in job.folder.iterdir()))}\n"
        f"curves: tensorboard --logdir {job.folder.parent}"
    )
