import pytest

from dist_prune.config.compression import MethodConfig
from dist_prune.factorization.spectra import Spectra, spectra_of
from tests.surveys import spectrum


def test_the_tail_is_half_the_sum_left_out_for_a_metric_and_a_share_otherwise() -> None:
    values = {"a": spectrum([8, 4, 2, 2])}
    assert Spectra(values, "KL", halved=True).tails("a").tolist() == [8, 4, 2, 1, 0]
    assert Spectra(values).tails("a").tolist() == [1, 0.5, 0.25, 0.125, 0]


def test_every_group_keeps_as_many_directions() -> None:
    assert Spectra({"a": spectrum([8, 4, 1], [2, 1, 0])}).tails("a").tolist() == [1, 6 / 16, 1 / 16, 0]


def test_harm_and_nothing_at_all_count_as_nothing() -> None:
    spectra = Spectra({"a": spectrum([3, 1, -7]), "b": spectrum([0, 0, 0])})
    assert spectra.tails("a").tolist() == [1, 0.25, 0, 0]
    assert spectra.tails("b").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("method", "unit", "halved"),
    [
        (MethodConfig("fisher"), "KL", True),
        (MethodConfig("fisher", loss="kl-reverse"), "KL", True),
        (MethodConfig("fisher", loss="mse"), "½·squared change", True),
        (MethodConfig("pca"), "relative loss", False),
        (MethodConfig("hessian-local"), "relative loss", False),
    ],
)
def test_only_the_fisher_metric_gives_an_absolute_unit(method: MethodConfig, unit: str, halved: bool) -> None:
    assert spectra_of({}, method) == Spectra({}, unit, halved)


def test_random_directions_say_nothing() -> None:
    assert spectra_of({}, MethodConfig("random")) is None
