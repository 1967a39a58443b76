"""`BilevelLossBalancer` on random students: every call is exact and leaves no trace, or refuses by name."""

import os

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from metakd.estimators import OneStep, Unroll
from tests.proof import run_modules as proof
from tests.proof.run_modules import FAULTS, Recipe, drawn, verdicts
from tests.proof.students import hooks
from tests.proof.students.all import INGREDIENTS

EXAMPLES = int(os.environ.get("METAKD_PROOF_EXAMPLES", "40"))
REFUSED = (
    "array_shares_memory",
    "buffer_is_a_view",
    "cache_by_version",
    "cache_by_version_zero",
    "cache_cleared_by_step",
    "counter_of_itertools",
    "large_array",
    "meta_loss_reads_an_optimizer",
    "parameter_clamped_in_the_pass",
    "parameter_decayed_in_the_pass",
    "scale_of_an_iterator",
    "shares_storage_detached",
    "shares_storage_view",
)


@pytest.fixture(autouse=True)
def no_hook_of_all_modules_stays():
    yield
    if hooks._GLOBAL_HOOK is not None:
        hooks._GLOBAL_HOOK.remove()


def faults(recipe):
    """What is wrong, and what is refused without need."""
    refused = not any(name in REFUSED for name in recipe.parts)
    found = [v for v in verdicts(recipe) if v.kind in FAULTS or (v.kind == "refused" and refused)]
    return [f"{v.kind}: {v.call}: {v.words}" for v in found]


@st.composite
def recipes(draw):
    recipe = drawn(lambda options: draw(st.sampled_from(list(options))))
    assume(len(recipe.parts) == 1 or not set(recipe.parts) & {"orthogonal", "compiled"})
    return recipe


@pytest.mark.slow
@given(recipes())
@example(Recipe(("alias", "shared_batch_norm", "hook_stores_in_dict"), accumulate=2))
@example(Recipe(("dropout", "counter_nonlocal", "generator_of_numpy")))
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_call_is_exact_or_refuses(recipe):
    found = faults(recipe)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INGREDIENTS))
def test_every_part_alone(name):
    found = faults(Recipe((name,), accumulate=1 + len(name) % 2))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_every_call(name):
    kinds = {v.kind for v in verdicts(Recipe((name,)))}
    assert kinds == {"refused"}


@pytest.mark.parametrize("name", ["cache_by_version", "generator_in_slots", "tensor_hook_scales"])
def test_compiled_students_are_proven_as_well(name):
    found = faults(Recipe(("compiled", name), accumulate=2))
    assert not found, "\n".join(found)


def test_a_wrong_estimator_is_seen(monkeypatch):
    def slightly_wrong(problem):
        found = Unroll()(problem)
        return found._replace(gradient={name: 1.0001 * g for name, g in found.gradient.items()})

    monkeypatch.setattr(proof, "calls", lambda: [("call", slightly_wrong), ("call", OneStep())])
    assert [v.kind for v in verdicts(Recipe(("tied",)))] == ["wrong", "right"]
