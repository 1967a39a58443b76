"""On a GPU, with its own kernels: hypergradients are finite differences there, too, for each module of the zoo."""

import pytest
import torch

from metakd import BilevelLossBalancer, check_hypergradient
from metakd.estimators import Adjoint, OneStep
from metakd.terms import CrossEntropy
from tests.zoo import QUIET, ZOO, meet

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLOAT32_INSIDE = {"weight_norm": 1e-4}  # torch's fused CUDA kernel takes a root in float32, also of float64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    ("name", "estimator"),
    [("dropout", OneStep()), *(
        pytest.param(name, estimator, marks=needs_gpu)
        for name in ZOO
        if ZOO[name].true_slope
        for estimator in (OneStep(), OneStep("reverse"), Adjoint())
    )],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*no forward.mode")
def test_a_hypergradient_is_finite_differences(name, estimator, device):
    student, *batches = meet(name)
    student.to(device)
    batch, meta_batch = ([t.to(device) for t in one] for one in batches)
    terms = {"hard": CrossEntropy(), "smooth": CrossEntropy(label_smoothing=0.3)}
    params = [p for p in student.parameters() if p.requires_grad]
    balancer = BilevelLossBalancer(
        student, terms, optimizer=torch.optim.SGD(params, lr=0.1), estimator=estimator
    )  # fmt: skip
    balancer.to(device, torch.float64)
    steps = 2 if isinstance(estimator, Adjoint) else 1
    found = check_hypergradient(balancer, [batch] * steps, meta_batch, directions=1, tolerance=1.0)
    assert max(found.relative_error.values()) < FLOAT32_INSIDE.get(name, 1e-6)


pytestmark = QUIET
