"""Nothing is left behind by a call: no memory, and nothing that only the garbage collector could find."""

import gc
import itertools
import sys
import weakref
from contextlib import contextmanager, suppress

import pytest

from metakd import MetaKDError, estimators, weighting
from tests.slow import slow_but
from tests.tally import Tally
from tests.test_faults import SITUATIONS, call, fused, meta_step, real_step

WALKS = (
    estimators.Adjoint("forward"),
    estimators.Truncated(1),
    estimators.IdentityJacobian(),
    estimators.FiniteDifference(),
    estimators.Implicit("neumann", damping=50.0),
)
MODES = {
    **{name: (make, act) for name, (make, act) in SITUATIONS.items()},
    **{str(walk): (lambda walk=walk: fused(walk), meta_step) for walk in WALKS},
    "every": (lambda: fused(every=2), call),
    "lazy": (lambda: fused(model=lambda: weighting.LossMLP(None, 2, hidden=(4,))), call),
    "real steps": (fused, real_step),
    "save": (fused, lambda balancer: balancer.state_dict()),
}
FAULTS = ("term", "meta loss", "features", "weighting", "teacher", "student", "weight model's optimizer")


@pytest.fixture(autouse=True)
def _no_search_for_drivers(monkeypatch):
    """Lightning sets this, and each `torch.cuda.is_available` of a CUDA build without a GPU then leaves cycles."""
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)


@contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def garbage():
    """What only the collector finds, in words."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [f"{type(found).__name__} {found!r:.200}" for found in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def watched(balancer):
    """References to all outputs of the student from now on, which keep none of them alive."""
    seen = Tally()
    balancer.student.register_forward_hook(lambda module, inputs, outputs: seen(weakref.ref(outputs)))
    return seen.seen


@pytest.mark.parametrize("name", slow_but(("forward", "Adjoint"), MODES))
def test_a_call_leaves_no_garbage(name):
    make, act = MODES[name]
    balancer, _ = make()
    act(balancer)
    seen = watched(balancer)
    with no_collector():
        for _ in range(3):
            act(balancer)
        assert all(ref() is None for ref in seen)
        assert garbage() == []
    assert seen or name == "save"


@pytest.mark.parametrize("part", slow_but(("term", "student"), FAULTS))
@pytest.mark.parametrize("name", slow_but(["Adjoint"], ["forward", "Adjoint"]))
def test_an_error_leaves_no_garbage(name, part):
    make, act = MODES[name]
    balancer, fuses = make()
    seen = watched(balancer)
    with no_collector():
        for _ in range(2):
            fuses[part].set(0, ValueError("boom"))
            with suppress(MetaKDError, ValueError):
                act(balancer)
            assert fuses[part].blown
            fuses[part].error = None  # which has its traceback
        assert all(ref() is None for ref in seen)
        assert garbage() == []


def test_the_collector_would_have_found_a_cycle():
    balancer, _ = fused()
    seen = watched(balancer)
    features = balancer.features

    def cyclic(losses, outputs, batch):
        circle = [outputs]
        circle.append(circle)
        return features(losses, outputs, batch)

    balancer.features = cyclic
    with no_collector():
        call(balancer)
        assert any(ref() is not None for ref in seen)
        assert gc.collect() > 0


def test_a_loss_dies_with_its_last_reference():
    balancer, _ = fused()
    with no_collector():
        loss = call(balancer)
        graph = weakref.ref(loss)
        loss.backward()
        del loss
        assert graph() is None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode derivative .boom.")
def test_2000_iterations_take_no_memory():
    """All modes in turn, every tenth iteration with a fault: objects and resident memory stay where they were."""
    pairs = [(*make(), act) for make, act in MODES.values()]
    pairs.append((*fused(), lambda balancer: balancer.load_state_dict(balancer.state_dict())))
    counts, resident = [], []
    for number, (balancer, fuses, act) in zip(range(2001), itertools.cycle(pairs), strict=False):
        if number % 10 == 9:
            fuse = fuses[FAULTS[number // 10 % len(FAULTS)]]
            fuse.set(number % 3, ValueError("boom"))
            with suppress(MetaKDError, ValueError):
                act(balancer)
            fuse.set(None, None)
        else:
            act(balancer)
        if number % 1000 == 0:
            gc.collect()
            counts.append(len(gc.get_objects()))
            with open("/proc/self/statm") as file:
                resident.append(int(file.read().split()[1]) * 4096)
    assert counts[2] - counts[1] < 100
    assert resident[2] - resident[1] < 4 * 2**20
