"""Losses that options are chosen by: spectra replaced by exact second-order losses where these were measured.

Three things are put together for each site and form:

- how much all ranks lose on a part of the images, errors of neighbouring positions together (`second_order`);
- beyond the ranks that save anything, what the spectrum says, in proportion;
- for a site with few rows, losses on images that its directions were not chosen on. A classifier of 1,000 outputs
  after 500 images loses nothing of its own rows: a prediction from these would call all other directions free. So
  the rows are split by image, and the directions of one part lose on the rest what they will lose on new images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.forms import FORMS, Form, set_weight
from dist_prune.factorization.knapsack import Floats
from dist_prune.factorization.nested import Nested
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.sites import Site, weight_of
from dist_prune.statistics.collect import Batches, Statistics
from dist_prune.statistics.second_order import (
    Curve,
    Sample,
    SecondOrder,
    collect_losses,
)
from dist_prune.statistics.terms import ChainTerms, Directions, Terms, offset_of
from dist_prune.utils.decompositions import eigh, eigvalsh

FOLDS = 4
FEW = 4  # rows per dimension, below which a site has few
ROUNDING = 1e-13  # of the largest squared singular value: rows are float32, and smaller ones rounding
DRAWS = 1  # of random signs per image: images differ more than draws


def with_exact_losses(
    spectra: Spectra | None,
    model: nn.Module,
    sites: Sequence[Site],
    bases: Mapping[str, Basis],
    nested: Mapping[str, Mapping[str, Nested]],
    statistics: Statistics,
    batches: Batches,
    world: World,
    method: MethodConfig,
    seed: int,
) -> Spectra | None:
    """The spectra with exact losses: one more forward and `DRAWS` backward passes over `--loss-images`.

    Args:
        spectra: as they are so far; None stays None.
        model: the network that they are of.
        sites: of it.
        bases: of the outputs.
        nested: chains of the other forms.
        statistics: that all of these come from.
        batches: opens the statistics' images.
        world: the ranks to sum over.
        method: of which `fisher` alone predicts a loss that can be measured.
        seed: of random signs.

    Raises:
        StatisticsError: see `second_order.collect_losses`.
    """
    if spectra is None:
        return None
    if method.method != "fisher" or not method.loss_images:
        return with_floors(spectra, sites, statistics)
    few = [site for site in sites if statistics.moments[site.name].count < FEW * site.width]
    families = {
        site: {
            name: terms
            for name, terms in terms_of(model, site, bases[site.name], nested.get(site.name, {})).items()
            if name != "output" or site not in few
        }
        for site in sites
    }
    means = {name: moments.mean for name, moments in statistics.moments.items()}
    loss = method.loss.removesuffix("-reverse")  # both divergences have one Hessian
    found = collect_losses(
        model, families, means, batches(method.loss_images), world, loss, DRAWS, seed, sampled=few
    )
    return replace(spectra, exact=world.from_first(lambda: _curves(spectra, model, sites, found, method.damping)))


def with_floors(spectra: Spectra, sites: Sequence[Site], statistics: Statistics) -> Spectra:
    """The spectra, of which sites with few rows are not free: by generalised cross-validation (Golub et al. 1979).

    A loss of r directions on the n rows that they were chosen on counts 1/(1 − r/n)² times. Beyond as many
    directions as `FOLDS` − 1 of `FOLDS` parts of the rows could show, nothing is known, and the loss stays.
    """
    exact: dict[str, dict[str, Floats]] = {}
    for site in sites:
        tails = spectra.tails(site.name)
        rows = int(statistics.moments[site.name].count) if site.name in statistics.moments else len(tails) * FEW
        if rows < FEW * (len(tails) - 1):
            ranks = np.arange(len(tails)).clip(max=rows * (FOLDS - 1) // FOLDS)
            curve = (tails[ranks] / (1 - ranks / rows) ** 2).clip(max=tails[0])
            curve[min(site.width, site.inputs) :] = 0  # the whole weight
            exact[site.name] = {"output": descending(curve)}
    return replace(spectra, exact=exact)


def terms_of(module: nn.Module, site: Site, basis: Basis, nested: Mapping[str, Nested]) -> dict[str, Terms]:
    """The site's families of nested replacements, as many terms as save multiply-adds or parameters.

    With chains of the form `input` all terms of both it and `output` are there: `tucker` needs them.
    """
    layer = module.get_submodule(site.name)
    rank = site.width if "input" in nested else _most(FORMS["output"], site, site.width)
    encode, decode = basis.encode[:, :rank], basis.decode[..., :rank]
    offset = (decode * (encode @ basis.mean[..., None]).mT).flatten(0, 1)
    dtype = torch.promote_types(layer.get_parameter("weight").dtype, torch.float32)
    found: dict[str, Terms] = {"output": Directions("output", encode.to(dtype), decode.to(dtype), offset)}
    for name, chains in nested.items():
        full = chains.first.shape[1]
        rank = full if name == "input" else _most(FORMS[name], site, full)
        first, second = _layers(layer, FORMS[name], chains.first[:, :rank], chains.second[:, :, :rank])
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
        offset = offset_of(first, second, chains.mean)
        if name == "input" and full == site.channels:  # then the decoder follows from the encoder
            encode = chains.first.flatten(2)
            decode = torch.linalg.inv(encode).to(dtype)
            found[name] = Directions("input", encode.to(dtype), decode, offset)
        else:
            found[name] = ChainTerms(first, second, offset)
    return found


def _most(form: Form, site: Site, full: int) -> int:
    """The largest rank of each group at which the form saves multiply-adds or parameters; at least 1."""
    macs, params = form.macs(site, (site.groups,)), form.params(site, (site.groups,))
    return int(max(1, min(full, max(site.macs // macs, site.dense_weights // params))))


def _layers(module: nn.Module, form: Form, *kernels: Tensor) -> tuple[nn.Module, nn.Module]:
    """The form's two layers with these kernels, (g, r, …) and (g, C, r, …)."""
    made = form.build(module, (kernels[0].shape[0] * kernels[0].shape[1],))
    first, second = (made.get_submodule(name) for name in form.layers)
    for layer, kernel in zip((first, second), kernels, strict=True):
        set_weight(layer, kernel)
    return first, second


def _curves(
    spectra: Spectra, model: nn.Module, sites: Sequence[Site], found: SecondOrder, damping: float
) -> Mapping[str, Mapping[str, Floats]]:
    """Site → form → loss of keeping 0, 1, … directions of each group; see the module. `cross` beside the forms."""
    curves: dict[str, dict[str, Floats]] = {site.name: {} for site in sites}
    for family, curve in found.curves.items():
        spectrum = spectra.tails(family.site, family.name)
        curves[family.site][family.name] = continued(curve.loss.cpu().numpy(), spectrum)
    for site in sites:
        if (sample := found.samples.get(site.name)) is not None:
            curve = cross_fitted(sample, damping, weight_of(model.get_submodule(site.name), site))
            curves[site.name]["output"] = descending(curve.loss.numpy())
        if (cross := found.crosses.get(site.name)) is not None:
            curves[site.name]["cross"] = cross.cpu().numpy()
    return curves


def descending(curve: Floats) -> Floats:
    """No rank loses more than a smaller one: what is above is noise, or terms that cancel others."""
    return np.minimum.accumulate(curve)


def continued(exact: Floats, spectrum: Floats) -> Floats:
    """Exact losses of the first ranks, then the spectrum's, in proportion."""
    last = len(exact) - 1
    scale = exact[last] / max(spectrum[last], np.finfo(np.float64).tiny)
    return descending(np.concatenate([exact, scale * spectrum[last + 1 :]]))


def cross_fitted(sample: Sample, damping: float, weight: Tensor) -> Curve:
    """Second-order losses of a site's Fisher basis, each image's in a basis of other images.

    Args:
        sample: all rows of the site.
        damping: of the metric, as in `bases.by_fisher`.
        weight: of the site, (g, c, d). At its full rank nothing is lost. Where d < c, rows lie in its range, but
            for their mean, and bases are those of d dimensions.

    Returns:
        Losses of keeping 0, 1, …, c directions of each group. Beyond as many as a part of the images has rows,
        they stay what they are: nothing is known of those directions. Of a single image all are infinite.
    """
    width = sample.rows.shape[2]
    images = torch.unique(sample.images, return_inverse=True)[1]
    count = int(images.max()) + 1
    if count == 1:
        infinite = torch.full((width + 1,), torch.inf, dtype=torch.float64)
        return Curve(infinite, torch.zeros_like(infinite))
    losses, full_rank = torch.zeros(count, width + 1, dtype=torch.float64), min(weight.shape[1:])
    span = torch.linalg.qr(weight.double())[0].to(sample.rows.device) if full_rank < width else None
    for fold in range(min(FOLDS, count)):
        held = images % FOLDS == fold
        kept, basis = _losses(sample, images, held, damping, span)
        known = kept.shape[1] - 1
        losses[basis, : known + 1] = kept
        losses[basis, known + 1 :] = kept[:, -1:]
    losses[:, full_rank:] = 0
    mean = losses.mean(0)
    return Curve(mean, losses.std(0, correction=0) / count**0.5)


def _losses(
    sample: Sample, images: Tensor, held: Tensor, damping: float, span: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the images `held` out, (images, directions + 1), in the basis of the others; and their numbers.

    `span` (g, c, d) are orthonormal columns in which rows lie; metric and basis are those of coordinates in it.
    """
    seen, gradients = sample.rows[~held].movedim(1, 0), sample.gradients[:, ~held].flatten(0, 1).movedim(1, 0)
    mean = seen.mean(1, keepdim=True)
    rows, g = sample.rows[held].movedim(1, 0) - mean, sample.gradients[:, held].movedim(2, 1)
    seen, largest = seen - mean, None
    if span is not None:
        largest = eigvalsh(_smaller_gram(gradients))[:, -1:]
        seen, gradients, rows, g = seen @ span, gradients @ span, rows @ span, g @ span
    root = _Root(gradients, damping, largest)
    directions = _right_singular(root.times(seen))  # g, q, c
    each = ((root.times(rows) @ directions.mT) * (root.over(g) @ directions.mT)).sum(1)  # draws, rows, q
    total = (rows * g).sum((1, 3))
    tails = torch.cat([total[..., None], total[..., None] - each.cumsum(-1)], -1)
    numbers, place = torch.unique(images[held], return_inverse=True)
    summed = tails.new_zeros(len(tails), len(numbers), tails.shape[2]).index_add_(1, place, tails)
    return summed.square().mean(0) / 2, numbers


def _right_singular(matrix: Tensor) -> Tensor:
    """Right singular vectors (g, min(n, c), c) of (g, n, c), largest first, from the smaller of the Gram matrices.

    What is left of rows that depend on others has no direction: its vectors are zero.
    """
    values, vectors = eigh(_smaller_gram(matrix))
    vectors = vectors.flip(-1).mT
    if matrix.shape[1] > matrix.shape[2]:
        return vectors
    squares = values.flip(-1)[..., None]
    known = squares > ROUNDING * squares[:, :1]
    return torch.where(known, squares, 1).rsqrt() * known * (vectors @ matrix)


def _smaller_gram(matrix: Tensor) -> Tensor:
    """MᵀM or MMᵀ of (g, n, c), whichever is smaller: both have the same eigenvalues above zero."""
    return matrix.mT @ matrix if matrix.shape[1] > matrix.shape[2] else matrix @ matrix.mT


class _Root:
    """The square root of ΓᵀΓ + δI, ΓᵀΓ scaled to a largest eigenvalue of 1, from Γ (g, n, c) itself.

    Or divided by `largest` (g, 1), if that is given. With ΓΓᵀ = UΛUᵀ and B = UᵀΓ the root is
    √δ·I + Bᵀ (√(Λ + δ) + √δ)⁻¹ B: nothing is divided by a small eigenvalue, and no matrix is larger than Γ.
    """

    def __init__(self, gradients: Tensor, damping: float, largest: Tensor | None = None) -> None:
        if gradients.shape[1] > gradients.shape[2]:
            gradients = torch.linalg.qr(gradients, "r")[1]  # ΓᵀΓ is the same
        values, vectors = eigh(gradients @ gradients.mT)
        largest = values[:, -1:] if largest is None else largest
        scale = torch.where(largest > 0, largest, 1)
        self.terms = vectors.mT @ gradients / scale[..., None].sqrt()
        self.shift: float = max(damping, 1e-12) ** 0.5
        self.values = ((values / scale).clamp(min=0) + self.shift**2).sqrt()

    def times(self, rows: Tensor) -> Tensor:
        """Rows (…, g, n, c) times the root."""
        times: Tensor = self.shift * rows + self._along(rows, 1 / (self.values + self.shift))
        return times

    def over(self, rows: Tensor) -> Tensor:
        """Rows times the inverse root."""
        inner = 1 / (self.shift * self.values * (self.values + self.shift))
        over: Tensor = rows / self.shift - self._along(rows, inner)
        return over

    def _along(self, rows: Tensor, values: Tensor) -> Tensor:
        within: Tensor = ((rows @ self.terms.mT) * values[:, None]) @ self.terms
        return within
