"""The story of a run: load → collect → rank → project → fine-tune → evaluate → save."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune import checkpoint, models, sensitivity, statistics
from dist_prune.bases import solve
from dist_prune.config import DATA_FREE, ConfigError, Run, TrainingConfig, require_complete, to_dict
from dist_prune.data import Everything, Stream, evaluation_stream, normalise, training_stream
from dist_prune.evaluate import Metrics, Predictions, predict, score, time_sites
from dist_prune.export import Description, save_compressed
from dist_prune.finetune import Trainer, scaled_lr
from dist_prune.images import Dataset, Split, check_files, open_dataset, write_digits
from dist_prune.planning import Planner, planner, timed_planner
from dist_prune.projection import project, rebuild
from dist_prune.ranks import Plan, cost
from dist_prune.report import Report, environment, table
from dist_prune.sites import Survey, survey
from dist_prune.spectra import Spectra, spectra_of, unit_of
from dist_prune.statistics import Statistics
from dist_prune.world import World, digest, fingerprint, joined

SITE_IMAGES = 512  # on which sites are measured alone
STAGES = ("dense", "projected", "corrected", "distilled", "tuned")


@dataclass
class Job:
    """A run under way: what was decided before the work, and the figures found so far."""

    config: Run
    world: World
    report: Report
    folder: Path
    dataset: Dataset
    dense: nn.Module
    survey: Survey
    planner: Planner
    metrics: dict[str, Metrics] = field(default_factory=dict)


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
    reference = baseline(job)
    if resumed is None:
        plan, compressed = compress(job)
        job.metrics["projected"] = measure(job, compressed, reference, "projected")
        measure_alone(job, plan, compressed)
    else:
        plan = Plan.from_json(resumed["plan"])
        compressed = rebuild(job.dense, plan)
        compressed.load_state_dict(resumed["model"])
    tune(job, plan, compressed, reference, resumed)
    finish(job, plan, compressed)


# ── before the work: everything that can be wrong ──────────────────────────────────────────────────────────


def prepare(config: Run, world: World, report: Report, folder: Path) -> Job:
    """Check the data, the network and the plan, then open the run's directory. Changes nothing on disk before."""
    dataset = world.from_first(lambda: open_images(config))
    require_classes(config, dataset)
    check_files(dataset.train, world)
    check_files(dataset.val, world)
    dense, found = load_network(config, world)
    ranks = timed_planner(config, dense, found, world, probe(config, world, 1))
    ranks.check()
    job = Job(config, world, report, folder, dataset, dense, found, ranks)
    validation(job), calibration(job, 0)  # both refuse to share fewer images than ranks
    world.from_first(lambda: checkpoint.claim(folder, config, environment()))
    if world.is_first:
        report.open(folder)
    report.say(f"run directory {folder}, {world.size} rank(s) on {world.device.type}")
    return job


def open_images(config: Run) -> Dataset:
    """The data set that `--data` names."""
    if config.images.data == "digits":
        return open_dataset(write_digits(checkpoint.cache_folder() / "digits"))
    return open_dataset(Path(config.images.data), config.images.class_list)


def require_classes(config: Run, dataset: Dataset) -> None:
    """The network's outputs and the data's classes must be one and the same list.

    Raises:
        ConfigError: they are not as many.
    """
    found, expected = len(dataset.train.classes), config.network.classes
    if found != expected:
        raise ConfigError(
            f"--data {config.images.data} has {found} classes, the network {expected} outputs: give --classes "
            f"{found} with weights for them, or --class-list FILE naming all {expected} folders in label order"
        )


def load_network(config: Run, world: World) -> tuple[nn.Module, Survey]:
    """The dense network on this rank's device, and the sites that `--sites` chooses in it."""
    torch.manual_seed(config.seed)
    network = config.network
    dense = models.load(network.arch, network.classes, network.weights).to(world.device)
    world.broadcast_(*dense.state_dict().values())
    image = probe(config, world, 1)
    try:
        found = survey(dense, image).select(config.compression.sites)
    except RuntimeError as error:
        size = " × ".join(map(str, image.shape[1:]))
        raise ConfigError(f"--arch {network.arch} does not take images of {size}, see --crop ({error})") from error
    if found.classes != network.classes:
        raise ConfigError(f"--arch {network.arch} has {found.classes} outputs, --classes is {network.classes}")
    return dense, found


def probe(config: Run, world: World, images: int) -> torch.Tensor:
    """Noise in the shape of images."""
    crop = config.images.image.crop
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(images, 3, crop, crop, generator=generator).to(world.device)


def show_plan(config: Run, world: World, report: Report) -> None:
    """The dry run: the plan's table from the network alone; weights are not even read."""
    unread = replace(config, network=replace(config.network, weights="none"))
    dense, found = load_network(unread, world)
    known = planner(config, found, world)
    plan, note = known.foreseen()
    report.say(known.told(plan, time_sites(dense, found.sites, probe(config, world, 4))))
    if note:
        report.say(note)


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


def validation(job: Job) -> Stream:
    """Every validation image once over all ranks."""
    images = job.config.images
    return evaluation_stream(job.dataset.val, images.image, job.world, images.eval_batch_size, images.threads)


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


def calibration(job: Job, count: int) -> Stream:
    """The statistics' images, at most `count` of them (0: all), as validation sees images."""
    images, split = job.config.images, statistics_split(job, count)
    return evaluation_stream(split, images.image, job.world, images.eval_batch_size, images.threads)


def statistics_split(job: Job, count: int) -> Split:
    """A seeded subset of the training images, never of the validation images."""
    split = job.dataset.train
    for limit in (job.config.compression.basis.statistics_images, count):
        if limit and limit < len(split):
            split = split.subset(limit, job.config.seed)
    return split


def tune(
    job: Job, plan: Plan, compressed: nn.Module, reference: Predictions, resumed: dict[str, Any] | None
) -> None:
    """Fine-tune the compressed network and measure it."""
    if not job.config.tuning.epochs:
        return
    with job.report.phase("finetune"):
        train(job, compressed, job.config.tuning, "train", keep=plan, resumed=resumed)
    job.metrics["tuned"] = measure(job, compressed, reference, "tuned")


def train(
    job: Job,
    model: nn.Module,
    settings: TrainingConfig,
    group: str,
    keep: Plan | None = None,
    resumed: dict[str, Any] | None = None,
) -> None:
    """Train `model` in place; with a plan to `keep`, leave a checkpoint after every epoch."""
    images, split = job.config.images, job.dataset.train
    stream = training_stream(
        split, images.image, job.world, settings.batch_size, images.threads, job.config.seed, images.augment
    )
    trainer = Trainer(model, settings, len(stream), job.world)
    done = restore(trainer, stream, resumed)
    size = settings.batch_size * job.world.size
    job.report.say(
        f"   {settings.epochs} epochs of {len(stream)} steps, global batch {size}, peak learning rate "
        f"{scaled_lr(settings, job.world.size):.4g} ({settings.lr} per 256 images)"
    )
    for epoch in range(done, settings.epochs):
        for progress in trainer.epoch(stream):
            job.report.scalars(group, progress.step, {**asdict(progress), "step": None, "steps": None})
        job.report.say(
            f"   epoch {epoch + 1}/{settings.epochs}: loss {progress.loss:.4f}, "
            f"{progress.images_per_second:.0f} images/s"
        )
        if keep is not None:
            save_progress(job, keep, trainer, stream, epoch + 1)


# ── leaving off and coming back ────────────────────────────────────────────────────────────────────────────


def finished(folder: Path) -> bool:
    """result.json is written last."""
    return (folder / "result.json").is_file()


def save_progress(job: Job, plan: Plan, trainer: Trainer, stream: Stream, epoch: int) -> None:
    """A checkpoint from which `--resume` continues at the next epoch."""
    streams = job.world.gather(stream.state())
    state = {
        "epoch": epoch,
        "world_size": job.world.size,
        "plan": plan.to_json(),
        "model": trainer.model.state_dict(),
        "trainer": trainer.state(),
        "streams": streams,
        "metrics": {stage: asdict(m) for stage, m in job.metrics.items()},
        "seconds": job.report.seconds,
    }
    job.world.from_first(lambda: str(checkpoint.save(job.folder / "checkpoints", epoch, state)))


def resume_point(job: Job) -> dict[str, Any] | None:
    """The newest intact checkpoint of the run to resume, if there is one.

    Raises:
        ConfigError: it was left by another number of ranks.
    """
    if not job.config.resume:
        return None
    state, problems = checkpoint.newest(job.folder / "checkpoints")
    for problem in problems:
        job.report.say(f"warning: {problem}; using the checkpoint before")
    if state is None:
        job.report.say("no checkpoint yet: starting from the beginning")
        return None
    if state["world_size"] != job.world.size:
        raise ConfigError(
            f"--resume: the run was left by {state['world_size']} ranks, these are {job.world.size}; "
            f"start it with {state['world_size']}"
        )
    job.metrics.update({stage: Metrics(**m) for stage, m in state["metrics"].items()})
    job.report.seconds.update(state["seconds"])
    job.report.rewind("train", state["trainer"]["step"])
    job.report.say(f"resuming after epoch {state['epoch']}")
    return state


def restore(trainer: Trainer, stream: Stream, resumed: dict[str, Any] | None) -> int:
    """Put trainer and stream where the checkpoint left them; the epochs already done."""
    if resumed is None:
        return 0
    trainer.restore(resumed["trainer"])
    stream.restore(resumed["streams"][stream.world.rank])
    return int(resumed["epoch"])


# ── the end ────────────────────────────────────────────────────────────────────────────────────────────────


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
