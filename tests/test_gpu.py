"""On a GPU, with its own kernels: hypergradients are finite differences there, too, for each module of the zoo."""

import pytest
import torch

from metakd import BilevelLossBalancer, check_hypergradient
from metakd.estimators import Adjoint, OneStep
from metakd.terms import CrossEntropy
from tests.zoo import QUIET, ZOO, meet

pytestmark = [*QUIET, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROUGH = {"weight_norm": 1e-2}  # differences of torch's fused CUDA kernel are no finer, in float64


@pytest.mark.parametrize("estimator", [OneStep(), OneStep("reverse"), Adjoint()], ids=str)
@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].true_slope and name != "lstm_dropout"])
@pytest.mark.filterwarnings("ignore:.*no forward.mode", "ignore:RNN module weights are not part of single contiguous")
def test_a_hypergradient_is_finite_differences(name, estimator):
    student, *batches = meet(name)
    batch, meta_batch = ([t.cuda() for t in one] for one in batches)
    terms = {"hard": CrossEntropy(), "smooth": CrossEntropy(label_smoothing=0.3)}
    params = [p for p in student.cuda().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1)
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, estimator=estimator)
    balancer.to("cuda", torch.float64)
    steps = 2 if isinstance(estimator, Adjoint) else 1
    found = check_hypergradient(balancer, [batch] * steps, meta_batch, directions=1, tolerance=1.0)
    assert max(found.relative_error.values()) < ROUGH.get(name, 1e-6)
