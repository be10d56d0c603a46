"""What stands in a network where a site was."""

from __future__ import annotations

from torch import nn


class Factored(nn.Sequential):
    """A site's replacement: small layers in a chain; `form` says which, see `factorization.forms`."""

    def __init__(
        self, reduce: nn.Module, expand: nn.Module, core: nn.Module | None = None, form: str = "output"
    ) -> None:
        super().__init__()
        self.form = form
        self.reduce = reduce
        if core is not None:
            self.core = core
        self.expand = expand
