"""Draws from torch's global generator, and from one of the function's own that starts anew each time."""

import torch
import torch.nn.functional as F
from torch.distributions import Normal

from tests.proof.registry import operation, operations

operations(
    dropout=lambda x, a: F.dropout(x @ a, 0.3),
    dropout_of_weights=lambda x, a: x @ F.dropout(a, 0.3),
    alpha_dropout=lambda x, a: F.alpha_dropout(x @ a, 0.3, training=True),
    feature_dropout=lambda x, a: F.dropout1d((x @ a)[:, None], 0.3, training=True),
    rrelu=lambda x, a: F.rrelu(x @ a, training=True),
    noise=lambda x, a: x @ a + 0.3 * torch.randn_like(x) * x,
    rand_mask=lambda x, a: (x @ a) * (torch.rand(len(x), 1) < 0.7),
    bernoulli=lambda x, a: (x @ a) * torch.bernoulli(torch.full_like(x, 0.6)),
    permuted=lambda x, a: x + (x @ a)[torch.randperm(len(x))],
    gumbel_softmax=lambda x, a: F.gumbel_softmax(x @ a),
    reparametrised=lambda x, a: Normal(x @ a, 0.1 + (x @ a.T).square()).rsample(),
    fractional_max_pool2d=lambda x, a: F.fractional_max_pool2d(
        (x @ a).repeat(1, 16 // x.shape[1] + 1)[:, :16].reshape(-1, 1, 4, 4), 2, output_size=2
    ),
    attention_dropout=lambda x, a: F.scaled_dot_product_attention((x @ a)[None], x[None], x[None], dropout_p=0.3)[0],
    mixup=lambda x, a: 0.6 * (x @ a) + 0.4 * (x @ a)[torch.randperm(len(x))],
)


@operation
def own_generator(x, a):
    generator = torch.Generator().manual_seed(3)
    return (x @ a) * torch.rand(x.shape, generator=generator, dtype=x.dtype)


@operation
def forked_generator(x, a):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return F.dropout(x @ a, 0.3)


@operation
def stochastic_depth(x, a):
    return x + (x @ a) * float(torch.rand(()) < 0.5)


@operation(by_autograd=True)
def gamma_sample(x, a):
    """torch has its derivative by implicit reparametrisation, and not a second time."""
    return torch._standard_gamma(1 + (x @ a).square())
