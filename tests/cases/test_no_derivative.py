"""Where an operation has no second derivative: what is advised, and that it helps."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metakd import MetaKDError, check_hypergradient, estimators
from tests.cases.real_optimizers import Case, assert_right, balanced, seeded, sgd
from tests.cases.real_steps import data
from tests.cases.test_batch_sizes import reader, symbols
from tests.zoo import cdist_is_once_differentiable


class Distances(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.centres, self.how = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5)), how

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.first(x), self.centres, compute_mode=self.how)


def distances(how: str) -> Callable[[], Case]:
    return lambda: sgd(seeded(lambda: Distances(how)))


FUSED, PRODUCTS = "donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist"
ALL = [
    estimators.OneStep(),
    estimators.OneStep("forward"),
    estimators.OneStep("reverse"),
    estimators.Adjoint(),
    estimators.Adjoint("auto"),
    estimators.Unroll(),
]


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("what", [*["cdist"] * cdist_is_once_differentiable(), "ctc"])
def test_where_no_derivative_is_left_the_advice_is_finite_differences(what, estimator):
    build, given = (distances(FUSED), data()) if what == "cdist" else (reader, (symbols(5, 0, joined=False),) * 2)
    balancer = balanced(build(), estimator=estimator)
    steps = [lambda: balancer(*given), lambda: check_hypergradient(balancer, [given[0]], given[1])]
    if not isinstance(estimator, estimators.OneStep):
        steps.append(lambda: balancer.meta_step(given, given[1]))
    for step in steps * 2:  # a second call knows no more than the first
        with warnings.catch_warnings(record=True) as caught, pytest.raises(MetaKDError) as error:
            warnings.simplefilter("always")
            step()
        said = str(error.value)
        assert "estimators.FiniteDifference()" in said and "'forward'" not in said, said
        assert ("vector_norm" if what == "cdist" else "over alignments") in said and "SDPBackend" not in said, said
        assert not [w for w in caught if "takes its place" in str(w.message)]
    tolerance = {"estimator": estimators.FiniteDifference(), "tolerance": 1e-4}
    assert_right(build, given=([given[0]], given[1]), **tolerance)


@pytest.mark.filterwarnings("ignore:.*no forward-mode derivative.*reverse mode takes its place")
def test_a_distance_with_a_second_derivative():
    for estimator in (estimators.OneStep(), estimators.OneStep("reverse"), estimators.Adjoint(), estimators.Unroll()):
        assert_right(distances(PRODUCTS), estimator=estimator)
    assert_right(distances(PRODUCTS), 2)
    with pytest.raises(MetaKDError, match=r"mode='forward'\) fails: .*use mode='auto' or 'reverse'"):
        balanced(distances(PRODUCTS)(), estimator=estimators.OneStep("forward"))(*data())
