"""The settings of a run, in sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

METHODS = {
    "pca": "their covariance (PCA)",
    "fisher": "their covariance in the metric of the output's gradients (Fisher)",
    "gradient": "the first-order change of the task loss",
    "hessian-local": "the expected local Hessian of the loss",
    "hessian-global": "the loss under random directions tried one at a time",
    "weight-svd": "the singular vectors of the weights, no data",
    "whitened-svd": "the singular vectors of the weights for whitened inputs",
    "random": "chance",
    "random-init": "none: the layers begin untrained",
}


def account(settings: Mapping[str, Any], stages: Collection[str] = ()) -> list[str]:
    """Sentences on data, method, ranks, correction and training.

    Args:
        settings: of config.json.
        stages: those that ran; without them everything asked for counts as done.
    """
    return list(_sentences(settings, stages))


def _sentences(settings: Mapping[str, Any], stages: Collection[str]) -> Iterator[str]:
    network, images, compression = settings["network"], settings["images"], settings["compression"]
    recipe = f"Recipe {settings['recipe']}. " if settings.get("recipe") else ""
    yield (
        f"{recipe}Network {network['arch']} with {network['classes']:,} outputs, {_weights(settings)}; images of "
        f"{images['data']}, cut to {images['image']['crop']}×{images['image']['crop']} pixels."
    )
    yield from _directions(compression)
    yield f"Ranks: {compression['ranks']}, of the layers {compression['sites']}."
    if compression.get("search"):
        yield (
            f"The best of {compression['search']:,} candidate plans, each corrected from some of the calibration "
            f"images and measured on others."
        )
    yield from _rounds(settings)
    yield _correction(settings, stages)
    yield _distillation(settings)
    yield _tuning(settings["tuning"], stages)


def _weights(settings: Mapping[str, Any]) -> str:
    weights = settings["network"]["weights"]
    if weights == "none":
        return f"trained by this program for {settings['pretrain']['epochs']} epochs"
    return f"weights {weights}"


def _directions(compression: Mapping[str, Any]) -> Iterator[str]:
    basis = compression["basis"]
    seen = f"{basis['statistics_images']:,}" if basis["statistics_images"] else "all"
    source = f" Statistics of {seen} training images, without labels."
    source = "" if basis["method"] in ("weight-svd", "random", "random-init") else source
    if basis["method"] == "gradient":
        source = source.replace("without", "with")
    if basis.get("statistics"):
        source = f" Statistics taken from {basis['statistics']}."
    yield f"Directions of each layer's {basis['side']}s by {basis['method']}: {METHODS[basis['method']]}.{source}"


def _rounds(settings: Mapping[str, Any]) -> Iterator[str]:
    rounds = settings["iteration"]
    if rounds["step"]:
        yield (
            f"In rounds: each layer keeps {rounds['step']} of its ranks from one to the next, with "
            f"{rounds['tune_epochs']} epochs of training in between."
        )
    if rounds["alternate"]:
        yield f"{rounds['alternate']} alternations with dense layers, trained for {rounds['tune_epochs']} epochs."


def _correction(settings: Mapping[str, Any], stages: Collection[str]) -> str:
    correction = settings["correction"]
    asked = correction["correct"] != "none" or correction["reestimate_bn"]
    if not asked or (stages and "corrected" not in stages):
        return "No correction."
    source = correction["calibrate_data"] or "the training images"
    parts = [] if correction["correct"] == "none" else [f"correction in closed form ({correction['correct']})"]
    parts += ["batch norm's statistics taken again"] if correction["reestimate_bn"] else []
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]}, from {correction['calibrate_images']:,} of {source}, without labels."


def _distillation(settings: Mapping[str, Any]) -> str:
    how = settings["distillation"]
    if not how["distill_steps"]:
        return "No label-free distillation."
    features = f" and its blocks' outputs, weight {how['distill_features']:g}" if how["distill_features"] else ""
    return (
        f"Label-free distillation on: {how['distill_steps']:,} steps towards the dense network's softmax at "
        f"temperature {how['distill_temperature']:g}{features}, {how['distill_batch_size']} images per "
        f"process and step, {how['distill_cutmix']:.0%} of them with a piece of another, batch norm frozen."
    )


def _tuning(tuning: Mapping[str, Any], stages: Collection[str]) -> str:
    if "tuned" not in stages and (stages or not tuning["epochs"]):
        return "No fine-tuning."
    epochs = f"{tuning['epochs']} epochs" if tuning["epochs"] else "as many epochs as between rounds"
    parts = [
        f"fine-tuned with labels for {epochs}",
        f"{tuning['batch_size']} × {tuning['accumulate']} images per process and step",
        f"peak learning rate {tuning['lr']} per 256 images",
        f"batch norm {tuning['bn']}",
    ]
    parts += [f"running average of the weights {tuning['ema']}"] if tuning["ema"] else []
    alpha, _, temperature = tuning["distill"].partition(",")
    teacher = "Distillation from the dense network was off."
    if temperature:
        teacher = f"Distillation from the dense network was on, share {alpha} at temperature {temperature}."
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}. {teacher}"
