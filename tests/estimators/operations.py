"""Operations of every kind, on a matrix (8, 4) of numbers between -0.5 and 0.5, and losses of such a matrix.

Grouped by what they do; drawn constants are the same in every process.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo import cdist_is_once_differentiable, differentiable

DOUBLE = torch.float64
Function = Callable[[Tensor], Tensor]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


Y, A = draw(8, 4, seed=1), draw(4, 4, seed=2)
ROWS = torch.tensor([0, 2, 1, 3, 0, 1, 2, 2])
CLASSES = torch.arange(8) % 4


def recurrent(kind):
    layer = kind(4, 3, batch_first=True).double()
    for i, p in enumerate(layer.parameters()):
        p.data.copy_(0.5 * draw(*p.shape, seed=i))
    return lambda h: layer(h[None])[0]


def gram(h):
    return h.T @ h + torch.eye(4, dtype=DOUBLE)


def penalty(h):
    (g,) = torch.autograd.grad(h.sin().sum(), h, create_graph=True)
    return g.square() + h


def assigned(h):
    z = torch.zeros(8, 4, dtype=DOUBLE)
    z[1:5] = h[1:5] * h[0]
    return z


def windowed(h):
    return torch.stft(h.flatten(), 8, window=torch.ones(8, dtype=DOUBLE), return_complex=True)


def rows(h):
    """As images of two channels."""
    return h.reshape(1, 2, 4, 4)


def named(module, names: str, prepare: Function = lambda h: h) -> dict[str, Function]:
    functions = [(name, getattr(module, name)) for name in names.split()]
    return {name: lambda h, f=f: f(prepare(h)) for name, f in functions}


NORMS: dict[str, Function] = {
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "batch_norm_running": lambda h: F.batch_norm(h, Y[0] * 0, Y[0] * 0 + 1, training=True),
    "batch_norm_eval": lambda h: F.batch_norm(h, Y[0], Y[0].exp()),
    "instance_norm": lambda h: F.instance_norm(rows(h)),
    "instance_norm_running": lambda h: F.instance_norm(rows(h), Y[0, :2] * 0, Y[0, :2] * 0 + 1, use_input_stats=True),
    "group_norm": lambda h: F.group_norm(h, 2),
    "local_response_norm": lambda h: F.local_response_norm(rows(h), 2),
    "normalize": F.normalize,
    "weight_norm": lambda h: torch._weight_norm(h, h[:, :1].abs() + 1),
    "weight_norm_last": lambda h: torch._weight_norm(h, h[:1].abs() + 1, 1),
    "norm": lambda h: h.norm(),
    "norm_3": lambda h: h.norm(3, dim=1),
    "norm_inf": lambda h: h.norm(math.inf, dim=1),
    "vector_norm": lambda h: linalg.vector_norm(h, 1.5, dim=1),
    "renorm": lambda h: h.renorm(2, 0, 0.5),
    "std": lambda h: h.std(0),
    "var_mean": lambda h: torch.stack(torch.var_mean(h, 0)),
    "cov": lambda h: torch.cov(h.T),
    "corrcoef": lambda h: torch.corrcoef(h.T),
}

LINEAR_ALGEBRA: dict[str, Function] = {
    **named(linalg, "det inv eigvalsh cholesky cond", gram),
    **named(torch, "logdet matrix_exp trace", gram),
    "slogdet": lambda h: linalg.slogdet(gram(h))[1],
    "pinv": lambda h: linalg.pinv(h + Y),
    "solve": lambda h: linalg.solve(gram(h), A),
    "lstsq": lambda h: linalg.lstsq(h + Y, Y.flip(0)).solution,
    "cholesky_solve": lambda h: torch.cholesky_solve(A, linalg.cholesky(gram(h))),
    "qr": lambda h: linalg.qr(h + Y)[1].abs(),
    "svdvals": lambda h: linalg.svdvals(h + Y),
    "svd": lambda h: linalg.svd(h + Y, full_matrices=False)[0].square(),
    "eigh": lambda h: linalg.eigh(gram(h + Y))[1].square(),
    "eigvals": lambda h: linalg.eigvals(A + h[:4]).abs(),
    "matrix_power": lambda h: linalg.matrix_power(gram(h), 3),
    "nuclear": lambda h: linalg.matrix_norm(h + Y / 9, "nuc"),
    "lu": lambda h: linalg.lu(gram(h))[1],
    "triangular": lambda h: linalg.solve_triangular(gram(h).triu(), A, upper=True),
    "multi_dot": lambda h: linalg.multi_dot([h.T, h, A]),
    "einsum": lambda h: torch.einsum("ij,ik,il->jkl", h, h, Y),
    "tensordot": lambda h: torch.tensordot(h, h, ([0], [0])),
    "baddbmm": lambda h: torch.baddbmm(Y[None], h[None], A[None]),
    "kron": lambda h: torch.kron(h[:2], h[:2]),
    "cross": lambda h: linalg.cross(h[:, :3], Y[:, :3]),
    "vander": lambda h: linalg.vander(h[0]),
    "sparse": lambda h: torch.sparse.mm(h.to_sparse(), A),
}

ATTENTION: dict[str, Function] = {
    "attention": lambda h: F.scaled_dot_product_attention(h[None, None], h[None, None].cos(), h[None, None].sin()),
    "attention_by_hand": lambda h: (h @ h.T / 2).softmax(1) @ h.sin(),
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "logsumexp": lambda h: h.logsumexp(1),
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
}

IMAGES: dict[str, Function] = {
    "conv1d": lambda h: F.conv1d(h.T[None], h[:4, :, None]),
    "conv2d": lambda h: F.conv2d(rows(h), h[:4].reshape(2, 2, 2, 2)),
    "conv_transpose": lambda h: F.conv_transpose2d(rows(h), h[:4].reshape(2, 2, 2, 2)),
    "conv_groups": lambda h: F.conv2d(rows(h), h[:2].reshape(2, 1, 2, 2), groups=2),
    "bilinear": lambda h: F.bilinear(h, h, A[None]),
    "max_pool": lambda h: F.max_pool2d(rows(h), 2),
    "max_pool3d": lambda h: F.max_pool3d(h.reshape(1, 1, 2, 4, 4), 2),
    "avg_pool": lambda h: F.avg_pool2d(rows(h), 2),
    "lp_pool": lambda h: F.lp_pool1d(h[None].abs() + 1, 2, 2),
    "adaptive_avg": lambda h: F.adaptive_avg_pool2d(rows(h), 3),
    "adaptive_max": lambda h: F.adaptive_max_pool2d(rows(h), 3),
    "fractional": lambda h: F.fractional_max_pool2d(rows(h), 2, output_size=3),
    "max_unpool": lambda h: F.max_unpool1d(*F.max_pool1d(h[None], 2, return_indices=True), 2),
    "bicubic": lambda h: F.interpolate(rows(h), scale_factor=2, mode="bicubic"),
    "interpolate": lambda h: F.interpolate(rows(h), size=(5, 3), mode="bilinear", antialias=True),
    "nearest": lambda h: F.interpolate(rows(h), scale_factor=2),
    "area": lambda h: F.interpolate(rows(h), size=(5, 3), mode="area"),
    "grid_sample": lambda h: F.grid_sample(rows(h), h.tanh().reshape(1, 4, 4, 2), align_corners=False),
    "affine_grid": lambda h: F.affine_grid(h[:3].reshape(2, 2, 3), (2, 1, 3, 3), align_corners=False),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.reshape(1, 4, 2, 4), 2),
    "fold": lambda h: F.fold(h[None], (3, 3), (2, 2)),
    "unfold": lambda h: F.unfold(h[None, None], 2),
    "pad_reflect": lambda h: F.pad(h[None], (1, 2), "reflect"),
    "pad_circular": lambda h: F.pad(h[None], (1, 2), "circular"),
}

INDEXING: dict[str, Function] = {
    "gather": lambda h: h.gather(0, ROWS[:, None].expand(8, 4)),
    "scatter": lambda h: Y.scatter(0, ROWS[:4, None].expand(4, 4), h[:4]),
    **{
        f"scatter_{how}": lambda h, how=how: (Y / 4).scatter_reduce(0, ROWS[:, None].expand(8, 4), h, how)
        for how in ("sum", "prod", "mean", "amax", "amin")
    },
    **{
        f"index_{how}": lambda h, how=how: (Y / 4).index_reduce(0, ROWS, h, how)
        for how in ("prod", "mean", "amax", "amin")
    },
    "index_add": lambda h: Y.index_add(0, ROWS, h),
    "index_put": lambda h: Y.index_put((ROWS,), h, accumulate=True),
    "take": lambda h: h.take(ROWS),
    "masked_select": lambda h: h.masked_select(Y > 0),
    "masked_scatter": lambda h: Y.masked_scatter(Y > 0, h),
    "where": lambda h: torch.where(Y > 0, h, h.sin()),
    "embedding": lambda h: F.embedding(ROWS, h),
    **{
        f"embedding_bag_{how}": lambda h, how=how: F.embedding_bag(ROWS.reshape(2, 4), h, mode=how)
        for how in ("sum", "mean", "max")
    },
    "segment_reduce": lambda h: torch.segment_reduce(h, "mean", lengths=torch.tensor([3, 5]), axis=0),
    "assigned": assigned,
    "as_strided": lambda h: h.contiguous().as_strided((3, 3), (2, 1)),
    "windows": lambda h: h.unfold(0, 3, 2),
    "in_place": lambda h: (h * 1).mul_(2).add_(h).mul_(h),
    "nested": lambda h: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([h[:3], h[3:]]), 0.0),
}

ORDER: dict[str, Function] = {
    "sort": lambda h: h.sort(0)[0],
    "topk": lambda h: h.topk(2, 1)[0],
    "kthvalue": lambda h: h.kthvalue(2, 0)[0],
    "median": lambda h: h.median(0)[0],
    "quantile": lambda h: h.quantile(0.3, 0),
    "cummax": lambda h: h.cummax(0)[0],
    "amax": lambda h: h.amax(0),
    "aminmax": lambda h: torch.stack(h.aminmax(dim=0)),
    "cumsum": lambda h: h.cumsum(0),
    "cumprod": lambda h: (h + 1).cumprod(0),
    "prod": lambda h: (h + 1).prod(1),
    "trapezoid": lambda h: torch.trapezoid(h, dim=0),
    "gradient": lambda h: torch.gradient(h, dim=0)[0],
}

FOURIER: dict[str, Function] = {
    "fft": lambda h: torch.fft.fft(h, dim=0).abs(),
    "rfft": lambda h: torch.fft.rfft(h, dim=0).real,
    "irfft": lambda h: torch.fft.irfft(h * 1j, dim=0),
    "fft2": lambda h: torch.fft.fft2(h).imag,
    "stft": lambda h: windowed(h).abs(),
    "istft": lambda h: torch.istft(windowed(h), 8, window=torch.ones(8, dtype=DOUBLE)),
    "complex": lambda h: torch.view_as_real(torch.complex(h, Y) * torch.complex(h, h)),
    "polar": lambda h: torch.view_as_real(torch.polar(h.abs() + 1, h)),
    "angle": lambda h: torch.complex(h, Y).angle(),
}

DISTANCES: dict[str, Function] = {
    **{f"cdist_{p}": lambda h, p=p: torch.cdist(h, Y, p=p) for p in (1.0, 2.0, 3.0)},
    "cdist_by_product": lambda h: torch.cdist(h, Y, compute_mode="use_mm_for_euclid_dist"),
    "pdist": F.pdist,
    "cosine": lambda h: F.cosine_similarity(h, Y),
    "pairwise": lambda h: F.pairwise_distance(h, Y),
}

TRANSFORMS: dict[str, Function] = {
    "penalty": penalty,
    "vmap": lambda h: torch.vmap(lambda r: (r.sin() * r).sum())(h),
    "func_grad": lambda h: torch.func.grad(lambda r: (r.sin() * r * r).sum())(h),
    "func_jvp": lambda h: torch.func.jvp(torch.sin, (h,), (Y,))[1],
    "func_vjp": lambda h: torch.func.vjp(torch.sin, h)[1](Y)[0],
    "jacrev": lambda h: torch.func.jacrev(torch.sin)(h[0]),
    "jacfwd": lambda h: torch.func.jacfwd(torch.sin)(h[0]),
    "hessian": lambda h: torch.func.hessian(lambda r: r.sin().sum())(h[0]),
    "checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
}

RANDOM: dict[str, Function] = {
    "dropout": lambda h: F.dropout(h, 0.4),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.4),
    "channel_dropout": lambda h: F.dropout1d(h[None], 0.4),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "noise": lambda h: h + torch.randn_like(h) * h,
    "gumbel": F.gumbel_softmax,
    "normal": lambda h: torch.distributions.Normal(h, h.exp()).rsample(),
    "gamma": lambda h: torch.distributions.Gamma(h.exp() + 1, 1 + h.exp()).rsample(),
    "dirichlet": lambda h: torch.distributions.Dirichlet(h.exp() + 1).rsample(),
    "student_t": lambda h: torch.distributions.StudentT(h.exp() + 1).log_prob(Y),
    "gaussian": lambda h: torch.distributions.MultivariateNormal(h[0], gram(h)).log_prob(Y),
}

ACTIVATIONS = "relu relu6 elu selu celu gelu silu mish softplus softsign hardsigmoid"
ACTIVATIONS += " hardswish tanhshrink logsigmoid leaky_relu glu sigmoid tanh"
ELEMENTWISE = "sin cos tan sinh cosh exp expm1 erf erfc atan asinh abs square frac sinc i0 nan_to_num"
POSITIVE = "sqrt rsqrt log log2 log1p lgamma digamma reciprocal"

SCALARS: dict[str, Function] = {
    **named(F, ACTIVATIONS),
    **named(torch, ELEMENTWISE),
    **named(torch, POSITIVE, lambda h: h + 1),
    **named(torch, "asin acos atanh erfinv"),
    **named(torch.special, "erfcx i0e i1 i1e log_ndtr ndtr"),
    **named(F, "softshrink hardshrink hardtanh", lambda h: 3 * h),
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "prelu": lambda h: F.prelu(h, h[0].abs()),
    "logit": lambda h: torch.logit(h + 0.5 + 1e-3),
    "polygamma": lambda h: torch.polygamma(1, h + 1),
    "xlogy": lambda h: torch.xlogy(h, h + 1),
    "atan2": lambda h: torch.atan2(h, Y),
    "hypot": lambda h: torch.hypot(h, Y),
    "logaddexp": lambda h: torch.logaddexp(h, Y),
    "fmod": lambda h: torch.fmod(h * 5, Y.abs() + 0.1),
    "pow": lambda h: (h + 1).pow(Y),
    "power": lambda h: Y.abs().pow(h),
    "copysign": lambda h: torch.copysign(h, Y),
    "lerp": lambda h: torch.lerp(h, Y, h.sigmoid()),
    "addcdiv": lambda h: torch.addcdiv(Y, h, h.exp()),
    "clamp": lambda h: h.clamp(-0.2, 0.2),
    "minimum": lambda h: torch.minimum(h, Y),
    "dist": lambda h: torch.dist(h, Y),
}

OPERATIONS: dict[str, Function] = {
    **NORMS,
    **LINEAR_ALGEBRA,
    **ATTENTION,
    **IMAGES,
    **INDEXING,
    **ORDER,
    **FOURIER,
    **DISTANCES,
    **TRANSFORMS,
    **RANDOM,
    **SCALARS,
}

# What torch has no second derivative of.
ONCE = {"attention", "segment_reduce", "cdist_1.0", "cdist_2.0", "cdist_3.0", "pdist", "gamma", "dirichlet"}
ONCE |= {"hardsigmoid", "embedding_bag_sum", "embedding_bag_mean", "embedding_bag_max"}
ONCE |= {"multi_margin", "multilabel_margin", "ctc"}
if not differentiable(OPERATIONS["grid_sample"], times=2):
    ONCE |= {"grid_sample"}
if not cdist_is_once_differentiable():
    ONCE -= {"cdist_1.0", "cdist_2.0", "cdist_3.0", "pdist"}
if not differentiable(OPERATIONS["aminmax"]):
    del OPERATIONS["aminmax"]

LOSSES: dict[str, Function] = {
    "mse": lambda z: F.mse_loss(z, Y),
    "l1": lambda z: F.l1_loss(z, Y),
    "smooth_l1": lambda z: F.smooth_l1_loss(z, Y),
    "huber": lambda z: F.huber_loss(z, Y, delta=0.7),
    "bce": lambda z: F.binary_cross_entropy(z.sigmoid(), Y.sigmoid()),
    "bce_logits": lambda z: F.binary_cross_entropy_with_logits(z, Y.sigmoid(), pos_weight=Y[0].exp()),
    "cross_entropy": lambda z: F.cross_entropy(z, CLASSES, weight=Y[0].abs()),
    "soft_labels": lambda z: F.cross_entropy(z, Y.softmax(1), label_smoothing=0.1),
    "nll": lambda z: F.nll_loss(z.log_softmax(1), CLASSES),
    "kl": lambda z: F.kl_div(z.log_softmax(1), Y.softmax(1), reduction="batchmean"),
    "poisson": lambda z: F.poisson_nll_loss(z, Y.abs()),
    "gaussian_nll": lambda z: F.gaussian_nll_loss(z, Y, z.exp()),
    "hinge": lambda z: F.hinge_embedding_loss(z, Y.sign()),
    "multi_margin": lambda z: F.multi_margin_loss(z, CLASSES),
    "multilabel": lambda z: F.multilabel_soft_margin_loss(z, (Y > 0).double()),
    "multilabel_margin": lambda z: F.multilabel_margin_loss(z, CLASSES[:, None].expand(8, 4)),
    "soft_margin": lambda z: F.soft_margin_loss(z, Y.sign()),
    "cosine_loss": lambda z: F.cosine_embedding_loss(z, Y, torch.ones(8)),
    "triplet": lambda z: F.triplet_margin_loss(z, Y, Y.flip(0)),
    "ranking": lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], Y[:, 0].sign()),
    "ctc": lambda z: F.ctc_loss(
        z[:, None].log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2])
    ),
    "sine": lambda z: (z * torch.linspace(0.5, 1.5, 32, dtype=DOUBLE).view(8, 4)).sin().mean(),
}
