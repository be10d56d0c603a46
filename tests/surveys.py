"""Networks that are nothing but the shapes of their sites, and what their directions are worth."""

import torch

from dist_prune.factorization.spectra import Spectra
from dist_prune.network.sites import Site, Skipped, Survey


def site(name: str, outputs: int, inputs: int, rows: int, groups: int = 1, bias: bool = False) -> Site:
    return Site(name, "conv", groups, outputs, inputs, rows, bias=bias)


def surveyed(*sites: Site, macs: int = 0, params: int = 0, skipped: tuple[Skipped, ...] = ()) -> Survey:
    """A network of these sites, and `macs` and `params` of other things."""
    macs += sum(s.macs for s in sites)
    params += sum(s.dense_weights + s.bias * s.outputs for s in sites)
    return Survey(sites, skipped, macs, params, 10)


def spectrum(*groups: list[float]) -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.float64)


def decaying(found: Survey, seed: int = 0) -> Spectra:
    generator = torch.Generator().manual_seed(seed)

    def one(s: Site) -> torch.Tensor:
        worth = torch.rand(s.groups, s.width, generator=generator, dtype=torch.float64) ** 6
        return worth.sort(-1, descending=True).values

    return Spectra({s.name: one(s) for s in found.sites})
