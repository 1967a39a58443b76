"""Activations, softmax and its kin, special functions, reductions, sorting."""

import torch
import torch.nn.functional as F

from tests.proof.registry import grid, operations, shaped, spread
from tests.zoo import differentiable

special = torch.special


def at(function):
    """A function of one number, at the product."""
    return lambda x, a: function(x @ a)


def above(function):
    """A function of one positive number, at a positive number."""
    return lambda x, a: function(0.5 + (x @ a).square())


def within(function):
    """A function on (-1, 1)."""
    return lambda x, a: function(0.8 * (x @ a).tanh())


operations(
    linear=at(lambda z: z),
    softmax=at(lambda z: z.softmax(1)),
    softmin=at(lambda z: F.softmin(z, 1)),
    log_softmax=at(lambda z: z.log_softmax(1)),
    log_softmax_rows=at(lambda z: z.log_softmax(0)),
    logsumexp=at(lambda z: z.logsumexp(1)),
    logaddexp=lambda x, a: torch.logaddexp(x, x @ a),
    logaddexp2=lambda x, a: torch.logaddexp2(x, x @ a),
    logcumsumexp=at(lambda z: z.logcumsumexp(1)),
    celu=at(F.celu),
    elu=at(F.elu),
    gelu=at(F.gelu),
    gelu_tanh=at(lambda z: F.gelu(z, approximate="tanh")),
    glu=lambda x, a: F.glu(torch.cat([x, x @ a], 1)),
    hardsigmoid=at(F.hardsigmoid),
    hardswish=at(F.hardswish),
    hardtanh=at(lambda z: F.hardtanh(0.5 * z)),
    leaky_relu=at(F.leaky_relu),
    logsigmoid=at(F.logsigmoid),
    mish=at(F.mish),
    prelu=lambda x, a: F.prelu(x, a[0]),
    relu=at(F.relu),
    relu6=at(F.relu6),
    selu=at(F.selu),
    sigmoid=at(torch.sigmoid),
    silu=at(F.silu),
    softplus=at(lambda z: F.softplus(z, beta=2)),
    softshrink=at(lambda z: F.softshrink(z, 0.2)),
    softsign=at(F.softsign),
    tanhshrink=at(F.tanhshrink),
    threshold=at(lambda z: F.threshold(z, 0.1, 0.1)),
    swiglu=lambda x, a: F.silu(x @ a) * (x @ a.T),
    abs=at(torch.abs),
    atan2=lambda x, a: torch.atan2(x, 1 + (x @ a).square()),
    cosh=at(lambda z: z.cosh().log()),
    exp=at(lambda z: (-z.square()).exp()),
    expm1=at(lambda z: torch.expm1(-z.square())),
    hypot=lambda x, a: torch.hypot(x, x @ a),
    log1p=above(torch.log1p),
    reciprocal=above(torch.reciprocal),
    rsqrt=above(torch.rsqrt),
    power=above(lambda z: z**1.7),
    power_of_tensor=lambda x, a: (1 + x.square()) ** (x @ a).tanh(),
    float_power=above(lambda z: torch.float_power(z, 0.3)),
    sinc=at(torch.sinc),
    erf=at(torch.erf),
    erfc=at(torch.erfc),
    erfinv=within(torch.erfinv),
    erfcx=at(lambda z: special.erfcx(z.square())),
    entr=above(lambda z: special.entr(z / (1 + z))),
    log_ndtr=at(special.log_ndtr),
    ndtri=within(lambda z: special.ndtri(0.5 + 0.4 * z)),
    digamma=above(torch.digamma),
    lgamma=above(torch.lgamma),
    mvlgamma=above(lambda z: torch.mvlgamma(z + 1, 2)),
    polygamma=above(lambda z: torch.polygamma(1, z + 1)),
    i0=at(lambda z: torch.i0(z.tanh())),
    i0e=at(special.i0e),
    i1=at(lambda z: special.i1(z.tanh())),
    i1e=at(special.i1e),
    logit=within(lambda z: torch.logit(0.5 + 0.4 * z)),
    gammainc=lambda x, a: special.gammainc(torch.full_like(x, 1.5), 0.3 + (x @ a).square()),
    zeta=lambda x, a: special.zeta(torch.full_like(x, 2.5), 1.3 + (x @ a).square()),
    xlogy=lambda x, a: torch.xlogy(x, 1 + (x @ a).square()),
    xlog1py=lambda x, a: special.xlog1py(x, (x @ a).square()),
    acos=within(torch.acos),
    asin=within(torch.asin),
    atanh=within(torch.atanh),
    asinh=at(torch.asinh),
    clamp=at(lambda z: z.clamp(-0.5, 0.7)),
    clamp_by_tensors=lambda x, a: x.clamp((x @ a) - 0.5, (x @ a) + 0.5),
    maximum=lambda x, a: torch.maximum(x, x @ a),
    fmin=lambda x, a: torch.fmin(x, x @ a),
    copysign=lambda x, a: torch.copysign(x, x @ a),
    fmod=at(lambda z: torch.fmod(z, 0.7)),
    remainder=lambda x, a: torch.remainder(x, 1 + (x @ a).square()),
    frac=at(torch.frac),
    nan_to_num=at(torch.nan_to_num),
    addcdiv=lambda x, a: torch.addcdiv(x, x @ a, 1 + x.square(), value=0.7),
    addcmul=lambda x, a: torch.addcmul(x, x @ a, x, value=0.7),
    lerp=lambda x, a: torch.lerp(x, x @ a, (x @ a.T).sigmoid()),
    where=lambda x, a: torch.where(x > 0.1, x @ a, x @ a.T),
    cumsum=at(lambda z: z.cumsum(1)),
    cumprod=at(lambda z: (1 + z.tanh()).cumprod(1)),
    cummax=at(lambda z: z.cummax(1).values),
    cummin=at(lambda z: z.cummin(0).values),
    prod=at(lambda z: (1 + z.tanh()).prod(1)),
    prod_with_a_zero=lambda x, a: torch.cat([x @ a, torch.zeros_like(x[:, :1])], 1).prod(1, keepdim=True) + x,
    prod_with_two_zeros=lambda x, a: torch.cat([x @ a, torch.zeros_like(x[:, :2])], 1).prod(1, keepdim=True) + x @ a,
    prod_of_all_with_a_zero=lambda x, a: torch.cat([x @ a, torch.zeros_like(x[:, :1])], 1).prod() + x @ a,
    cumprod_with_a_zero=lambda x, a: torch.cat([x @ a, torch.zeros_like(x[:, :1]), x], 1).cumprod(1),
    prod_of_all=at(lambda z: z.tanh().prod() + z),
    sum_of_squares=at(lambda z: z.square().sum(1)),
    mean=at(lambda z: z.mean(0) * z),
    nanmean=at(lambda z: z.nanmean(0) * z),
    nansum=at(lambda z: z.nansum(1)),
    diff=at(lambda z: z.diff(dim=1)),
    trapezoid=lambda x, a: torch.trapezoid(x, x @ a, dim=1),
    cumulative_trapezoid=lambda x, a: torch.cumulative_trapezoid(x @ a, dim=1),
    gradient=at(lambda z: torch.cat(torch.gradient(spread(z, 4), dim=1), 1)),
    amax=at(lambda z: z.amax(1)),
    max_of_row=at(lambda z: z.max(1).values),
    sort=at(lambda z: z.sort(1).values),
    msort=at(torch.msort),
    topk=at(lambda z: z.topk(2, 1).values),
    kthvalue=at(lambda z: z.kthvalue(2, 1).values),
    median=at(lambda z: z.median(1).values),
    nanmedian=at(lambda z: z.nanmedian(0).values * z),
    quantile=at(lambda z: z.quantile(0.4, dim=1)),
    dist=lambda x, a: x * torch.dist(x, x @ a, 3),
    pairwise_distance=lambda x, a: F.pairwise_distance(x, x @ a + 1),
    cosine_similarity=lambda x, a: F.cosine_similarity(x, x @ a),
    cdist_1=lambda x, a: torch.cdist(x, a, p=1.0),
    cdist_2=lambda x, a: torch.cdist(x, a, p=2.0),
    cdist_2_by_products=lambda x, a: torch.cdist(x, a, compute_mode="use_mm_for_euclid_dist"),
    cdist_3=lambda x, a: torch.cdist(x, a, p=3.0),
    cdist_inf=lambda x, a: torch.cdist(x, a, p=torch.inf),
    pdist=lambda x, a: F.pdist(x @ a).sum() * x,
    pdist_3=lambda x, a: F.pdist(x @ a, 3).sum() * x,
    polynomial=lambda x, a: sum((shaped(a, 4)[i] * x**i for i in range(4)), torch.zeros_like(x)),
    bucket=lambda x, a: (x @ a) * grid(4)[torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0]).double())],
)

extremes = at(lambda z: torch.stack(torch.aminmax(z, dim=1), 1))
if differentiable(lambda z: extremes(z, torch.eye(4, dtype=z.dtype))):
    operations(aminmax=extremes)
