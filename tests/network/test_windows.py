import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_prune.network.windows import padded, patches


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)},
        {"kernel_size": (3, 2), "dilation": (2, 3), "padding": "same"},
        {"kernel_size": 4, "stride": 3, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 2, "padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("images", [0, 3])
def test_patches_times_the_weight_are_the_convolution(
    options: dict[str, object], layout: torch.memory_format, images: int
) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, bias=False, **options).double()  # type: ignore[arg-type]
    x = torch.randn(images, 4, 11, 13, dtype=torch.float64).contiguous(memory_format=layout)
    found = patches(module, padded(module, x))
    groups = module.groups
    rows = found.view(images, groups, found.shape[1] // groups, found.shape[2])
    y = torch.einsum("gok,ngkp->ngop", module.weight.view(groups, 6 // groups, -1), rows)
    assert torch.allclose(y.reshape(module(x).shape), module(x), rtol=1e-12)


def test_they_are_in_the_order_of_unfold_and_of_a_view_too() -> None:
    module = nn.Conv2d(3, 5, (2, 3), (2, 1), dilation=(1, 2))
    x = torch.arange(2.0 * 6 * 8 * 9).view(2, 6, 8, 9)[:, ::2]
    assert torch.equal(patches(module, x), F.unfold(x, (2, 3), (1, 2), 0, (2, 1)))
