"""`hypergradient` beyond a flat dict of weights: nested parameters, learning rates, several outer batches."""

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st

from metakd import MetaKDError, check_hypergradient, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, OneStep, Truncated, Unroll
from tests.estimators.problems import RULES, Bilevel, most_kept, relative

EXACT = [Adjoint(), Adjoint("forward"), Adjoint("auto"), Unroll(), Truncated(3)]
each_exact = pytest.mark.parametrize("estimator", EXACT, ids=str)


class Nested:
    """`Bilevel` with its parameters in a nest whose order is neither sorted nor that of the flat names."""

    def __init__(self, **options):
        self.flat = Bilevel(**options)
        p, m = self.flat.params, self.flat.meta_params
        layer = {"weight": p["w10.weight"], "bias": p["w10.bias"]}
        self.params = {"w1": {"0": layer, "-": {"scale": p["scale"]}}, "w1-": p["w2"]}
        self.meta_params = {"weights": {"mix": m["mix"]}, "offset": m["offset"]}

    def inner(self, p, m, batch):
        return self.flat.inner(self._params(p), self._meta(m), batch)

    def outer(self, p, m):
        return self.flat.outer(self._params(p), self._meta(m))

    @staticmethod
    def _params(p):
        layer = p["w1"]["0"]
        return {
            "w10.weight": layer["weight"],
            "w10.bias": layer["bias"],
            "w2": p["w1-"],
            "scale": p["w1"]["-"]["scale"],
        }

    @staticmethod
    def _meta(m):
        return {"mix": m["weights"]["mix"], "offset": m["offset"]}


@pytest.mark.parametrize("rule", sorted(RULES))
@each_exact
def test_nested_parameters_are_flat_ones(estimator, rule):
    problem = Nested(steps=3, rule=rule)
    optimizer = problem.flat.torchopt()
    found = hypergradient(
        problem.inner,
        problem.outer,
        problem.params,
        problem.meta_params,
        problem.flat.batches,
        optimizer=optimizer,
        optimizer_state=optimizer.init(problem.params),
        estimator=estimator,
    )
    expected = problem.flat.double_backward()
    assert relative(problem._meta(found.gradient), expected.gradient) < 1e-10
    assert relative(problem._params(found.params), expected.params) < 1e-12
    again = hypergradient(
        problem.inner,
        problem.outer,
        found.params,
        problem.meta_params,
        problem.flat.batches,
        optimizer=optimizer,
        optimizer_state=found.optimizer_state,
        estimator=estimator,
    )
    expected = Bilevel(steps=6, rule=rule)
    expected.params.update(problem.flat.params)
    expected.batches[:] = problem.flat.batches * 2
    assert relative(problem._params(again.params), expected.double_backward().params) < 1e-10


def test_nested_parameters_pass_the_check():
    problem = Nested(steps=2, rule="momentum")
    found = check_hypergradient(
        problem.inner,
        problem.outer,
        problem.params,
        problem.meta_params,
        problem.flat.batches,
        optimizer=problem.flat.torchopt(),
    )
    assert set(found.relative_error) == {"weights/mix", "offset"}


LEARNED = {
    "sgd": lambda m: torchopt.sgd(lr=m["lr"]),
    "momentum": lambda m: torchopt.sgd(lr=m["lr"], momentum=m["mu"], weight_decay=1e-2),
    "adam": lambda m: torchopt.adam(lr=(m["lr"] - 3).exp(), betas=(0.8, 0.95), eps=1e-3),
    "clip": lambda m: torchopt.chain(torchopt.clip_grad_norm(max_norm=0.2), torchopt.sgd(lr=m["lr"])),
}


def learned(rule, estimator, steps=3, seed=0, check=False, losses_too=True):
    problem = Bilevel(steps=steps, seed=seed)
    meta = {"lr": torch.tensor(0.2).double(), "mu": torch.tensor(0.7).double()}
    if rule != "momentum":
        del meta["mu"]
    if losses_too:
        meta |= problem.meta_params
    known = {**problem.meta_params}
    call = check_hypergradient if check else hypergradient
    return call(
        lambda p, m, batch: problem.inner(p, {**known, **m}, batch),
        lambda p, m: problem.outer(p, {**known, **m}),
        problem.params,
        meta,
        problem.batches,
        optimizer=LEARNED[rule],
        estimator=estimator,
    )


@pytest.mark.parametrize("rule", LEARNED)
def test_a_learning_rate_is_a_meta_parameter(rule):
    found = learned(rule, Unroll(), check=True)
    assert max(found.relative_error.values()) < 1e-6
    expected = learned(rule, Unroll()).gradient
    assert all(relative(learned(rule, estimator).gradient, expected) < 1e-10 for estimator in EXACT)


@given(st.sampled_from(sorted(LEARNED)), st.integers(1, 5), st.integers(0, 1000), st.booleans())
@settings(max_examples=25)
def test_adjoint_of_a_learning_rate_is_unroll(rule, steps, seed, losses_too):
    adjoint, unroll = (learned(rule, e, steps, seed, losses_too=losses_too).gradient for e in (Adjoint(), Unroll()))
    assert relative(adjoint, unroll) < 1e-10


@pytest.mark.parametrize("estimator", [OneStep("forward"), OneStep("reverse"), FiniteDifference(1e-4)], ids=str)
def test_a_learning_rate_alone_by_one_step(estimator):
    """d outer / d lr = -<grad outer(theta'), grad inner(theta)>: the classic hypergradient descent."""
    x, target = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.0]).double()
    found = hypergradient(
        lambda p, m, batch: p["x"].pow(2).sum(),
        lambda p, m: (p["x"] - target).pow(2).sum() / 2,
        {"x": x},
        {"lr": torch.tensor(0.1).double()},
        [None],
        optimizer=lambda m: torchopt.sgd(lr=m["lr"]),
        estimator=estimator,
    )
    ahead = x - 0.1 * 2 * x
    torch.testing.assert_close(found.gradient["lr"], -((ahead - target) * 2 * x).sum())


@pytest.mark.parametrize("estimator", [*EXACT, OneStep()], ids=str)
def test_several_outer_batches_are_their_mean(estimator):
    steps = 1 if estimator == OneStep() else 3
    problem = Bilevel(steps=steps, rule="momentum", direct=True)
    others = [Bilevel(seed=seed, direct=True) for seed in (1, 2, 3)]

    def outer(p, m, other):
        return other.outer(p, m)

    common = {"optimizer": problem.torchopt(), "estimator": estimator}
    arguments = problem.params, problem.meta_params, problem.batches
    several = hypergradient(problem.inner, outer, *arguments, outer_batches=others, **common)
    mean = hypergradient(
        problem.inner, lambda p, m: sum(outer(p, m, other) for other in others) / 3, *arguments, **common
    )
    assert relative(several.gradient, mean.gradient) < 1e-12
    torch.testing.assert_close(several.outer_loss, mean.outer_loss, rtol=1e-13, atol=0)
    check_hypergradient(problem.inner, outer, *arguments, outer_batches=others, **common)


def test_one_outer_batchs_graph_at_a_time():
    problem = Bilevel()

    def most(number):
        return most_kept(
            lambda: hypergradient(
                problem.inner,
                lambda p, m, x: problem.outputs(p, x).exp().mean(),
                problem.params,
                problem.meta_params,
                problem.batches,
                optimizer=problem.torchopt(),
                outer_batches=[torch.ones(200, 3, dtype=torch.float64)] * number,
            )
        )

    assert most(6) == most(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {"a": {}}}, r"params\['a'\] is empty"),
        ({"params": {"a": {"b": torch.tensor([1])}}}, r"params\['a/b'\] is torch.int64"),
        ({"params": {"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}}, "two entries with the path 'a/b'"),
        ({"outer_batches": []}, "outer_batches is empty"),
        ({"optimizer": lambda m: 0.1}, "a function meta_params -> GradientTransformation, got float"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {
        "inner": lambda p, m, batch: (m["phi"] * p["x"] ** 2).sum(),
        "outer": lambda p, m, *batch: p["x"].sum(),
        "params": {"x": torch.ones(1)},
        "meta_params": {"phi": torch.ones(1)},
        "batches": [None],
        "optimizer": torchopt.sgd(lr=0.1),
    }
    with pytest.raises(MetaKDError, match=message):
        hypergradient(**{**arguments, **changes})
