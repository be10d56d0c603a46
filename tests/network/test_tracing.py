"""The network as a list of operations: it must compute what the network computes, wherever it stops."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_prune.network.tracing import Pass, TraceError, trace
from tests.networks import NETWORKS, at_every_stop, ended, seeded, traced


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_stop_by_stop_it_is_the_network_exactly(name: str) -> None:
    make, size = NETWORKS[name]
    model = seeded(make)
    x = torch.randn(2, 3, size, size)
    program = traced(model, x)
    given: dict[str, Tensor] = {}
    order: list[str] = []

    def note(site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _y: Tensor) -> None:
            order.append(site)
            given[site] = inputs[0].clone()

        return hook

    hooks = [model.get_submodule(site).register_forward_hook(note(site)) for site in program.stops]
    expected = model(x)
    for hook in hooks:
        hook.remove()
    walk = Pass(program, model, x)
    for site in at_every_stop(walk):
        assert torch.equal(walk.input_of(site), given[site])
    assert torch.equal(ended(walk), expected)
    moved = {site for site in program.stops if site in program.shortcuts}  # a projection is computed before it
    assert len(program.stops) > 3
    assert [site for site in program.stops if site not in moved] == [site for site in order if site not in moved]
    places = list(program.stops.values())
    assert places == sorted(places)


# ── what is traced, what is held ───────────────────────────────────────────────────────────────────────────


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x.mean((2, 3)))))


def test_a_site_called_twice_or_never_is_no_stop() -> None:
    assert list(trace(Shared(), ["twice", "once", "never"]).stops) == ["once"]


def test_control_flow_that_depends_on_values_is_told() -> None:
    class Deciding(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Deciding()
    with pytest.raises(TraceError, match=r"torch\.fx cannot trace Deciding"):
        trace(model, ["once"])
    assert model.training


class Optional(Shared):
    """Arguments besides the images, and a constant made on the way."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2, debug: bool = False) -> Tensor:
        if mask is not None or debug:
            x = x * mask
        return super().forward(x * scale + torch.arange(3.0).view(3, 1, 1))


def test_other_arguments_keep_their_defaults_and_constants_belong_to_the_program() -> None:
    torch.manual_seed(0)
    model = Optional().eval()
    before, copied = set(vars(model)), copy.deepcopy(model)
    program = trace(model, ["once"])
    assert set(vars(model)) == before
    x = torch.randn(2, 3, 4, 4)
    for root in (model, copied):
        assert torch.equal(ended(Pass(program, root, x)), model(x))


def test_every_module_keeps_its_own_mode() -> None:
    model = seeded(NETWORKS["resnet20"][0]).train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    trace(model, ["linear"])
    assert [m.training for m in model.modules()] == modes


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "swin_t"])
def test_values_are_dropped_after_their_last_use(name: str) -> None:
    """A pass that waits holds no more than what is yet to be read."""
    make, size = NETWORKS[name]
    model = seeded(make)
    x = torch.randn(2, 3, size, size)
    program = traced(model, x)
    walk = Pass(program, model, x)
    for site in at_every_stop(walk):
        coming = program.steps[walk.position :]
        needed = {n for step in coming for n in step.all_input_nodes}
        assert set(walk.values) <= needed
        assert program.steps[walk.position].all_input_nodes[0] in walk.values, site
        held = [v for v in walk.values.values() if isinstance(v, Tensor)]
        assert walk.bytes <= sum(v.untyped_storage().nbytes() for v in held)
    ended(walk)
    assert list(walk.values) == [program.steps[-1]]
    walk.restart()
    assert not walk.bytes


def test_bytes_count_shared_memory_once_and_look_into_lists() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            parts = x.chunk(2, 1)
            first = self.two(self.one(parts[0]))
            return self.head((first + parts[1]).mean((2, 3)))

    model = Halves().eval()
    x = torch.randn(2, 8, 4, 4)
    walk = Pass(trace(model, ["one", "two"]), model, x)
    walk.advance(walk.program.stops["one"])
    assert walk.bytes == x.nbytes
    walk.advance(walk.program.stops["two"])
    assert walk.bytes == x.nbytes + walk.input_of("two").nbytes


@torch.no_grad()
def test_a_restarted_pass_computes_again_with_the_weights_of_today() -> None:
    model = seeded(NETWORKS["resnet20"][0])
    x = torch.randn(2, 3, 16, 16)
    program = traced(model, x)
    walk = Pass(program, model, x)
    place = program.stops["layer2.0.conv1"]
    walk.advance(place)
    before = walk.input_of("layer2.0.conv1")
    model.conv1.weight.mul_(1.5)
    walk.restart()
    assert walk.position == 0 and not walk.bytes
    walk.advance(place)
    assert not torch.equal(walk.input_of("layer2.0.conv1"), before)
    assert torch.equal(ended(walk), model(x))
