"""`hypergradient` on random inner losses: every estimator is exact, or refuses by name."""

import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, reject, settings
from hypothesis import strategies as st

from metakd.estimators import Unroll
from tests.proof import verdict as proof
from tests.proof.compose import Recipe, Stage, drawn
from tests.proof.operations.all import OPERATIONS
from tests.proof.verdict import FAULTS, Unfit, verdicts

EXAMPLES = int(os.environ.get("METAKD_PROOF_EXAMPLES", "60"))
LAYER_NORM = Recipe((Stage("layer_norm", before="m"),))


@st.composite
def recipes(draw):
    recipe = drawn(lambda options: draw(st.sampled_from(options)))
    assume(recipe.coupled)
    return recipe


@given(recipes())
@example(LAYER_NORM)
@example(Recipe((Stage("batch_norm_train", before="m"),), steps=3))
@example(Recipe((Stage("logdet_each", before="m"),), steps=2, rule="adam"))
@example(Recipe((Stage("dropout"),), end="weighted", steps=3))
@example(Recipe((Stage("hook_scales", before="m"),)))
@example(Recipe((Stage("custom_op", before="m"),), steps=2))
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_every_estimator_is_exact_or_refuses(recipe):
    try:
        found = verdicts(recipe)
    except Unfit:
        reject()
    faults = [f"{v.kind}: {v.estimator}: {v.words}" for v in found if v.kind in FAULTS]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.wrong_in_torch])
def test_what_torch_gets_wrong_is_right_or_refused(name):
    found = verdicts(Recipe((Stage(name, "both"),), steps=2))
    assert not [v for v in found if v.kind in (*FAULTS, "as torch")]


def test_a_wrong_estimator_is_seen(monkeypatch):
    def slightly_wrong(problem):
        found = Unroll()(problem)
        return found._replace(gradient={name: 1.0001 * g for name, g in found.gradient.items()})

    monkeypatch.setattr(proof, "estimators", lambda steps: [(slightly_wrong, 1e-7), (Unroll(), 1e-7)])
    assert [v.kind for v in verdicts(LAYER_NORM)] == ["wrong", "right"]


@pytest.mark.parametrize("size", [(3, 3), (6, 5)], ids=str)
def test_every_operation_is_a_function_of_features(size):
    """A recipe's own failure would be no finding."""
    broken = []
    for name, operation in OPERATIONS.items():
        x, a = torch.randn(*size).double().requires_grad_(), torch.randn(size[1], size[1]).double().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = operation.function(x, a)
            found = torch.autograd.grad(answer.sin().sum(), [x, a], allow_unused=True)
        finite = [g is None or bool(g.to_dense().isfinite().all()) for g in (answer, *found)]
        if len(answer) != len(x) or answer.dtype != x.dtype or not all(finite) or found == (None, None):
            broken.append(name)
    assert not broken
