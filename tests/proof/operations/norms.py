"""Normalisations and norms."""

import torch
import torch.nn.functional as F

from tests.proof.registry import operation, operations, shaped, spread

operations(
    layer_norm=lambda x, a: F.layer_norm(x @ a, x.shape[1:], eps=1e-2),
    layer_norm_affine=lambda x, a: F.layer_norm(x, x.shape[1:], a[0], a[-1], eps=1e-2),
    batch_norm_train=lambda x, a: F.batch_norm(x @ a, None, None, training=True, eps=1e-2),
    batch_norm_affine=lambda x, a: F.batch_norm(x, None, None, a[0], a[-1], training=True, eps=1e-2),
    batch_norm_2d=lambda x, a: F.batch_norm(spread(x, 2, 2, 3), None, None, shaped(a, 2), training=True, eps=1e-2),
    instance_norm=lambda x, a: F.instance_norm(spread(x @ a, 3, 4), eps=1e-2),
    instance_norm_affine=lambda x, a: F.instance_norm(
        spread(x, 3, 4), weight=shaped(a, 3), bias=shaped(a, 3), eps=1e-2
    ),
    group_norm=lambda x, a: F.group_norm(spread(x @ a, 4, 3), 2, eps=1e-2),
    group_norm_affine=lambda x, a: F.group_norm(spread(x, 4, 3), 2, shaped(a, 4), shaped(a, 4), eps=1e-2),
    rms_norm=lambda x, a: F.rms_norm(x @ a, x.shape[1:], eps=1e-2),
    rms_norm_affine=lambda x, a: F.rms_norm(x, x.shape[1:], a[0], eps=1e-2),
    local_response_norm=lambda x, a: F.local_response_norm(spread(x @ a, 4, 3), 2),
    normalize=lambda x, a: F.normalize(x @ a, dim=1),
    normalize_3=lambda x, a: F.normalize(x @ a, p=3.0, dim=1),
    rms_norm_of_two=lambda x, a: F.rms_norm(spread(x @ a, 2, 3), (2, 3), shaped(a, 2, 3), eps=1e-2),
    layer_norm_of_two=lambda x, a: F.layer_norm(spread(x @ a, 2, 3), (2, 3), shaped(a, 2, 3), eps=1e-2),
    batch_norm_channels_last=lambda x, a: F.batch_norm(
        spread(x @ a, 2, 2, 2).contiguous(memory_format=torch.channels_last), None, None, training=True, eps=1e-2
    ),
    weight_norm_by_hand=lambda x, a: x @ (a * (a[:, :1] + 2) / torch.norm_except_dim(a, 2, 0)),
    spectral_norm=lambda x, a: x @ (a / torch.linalg.matrix_norm(a, 2)),
    renorm=lambda x, a: torch.renorm(x @ a, 2, 0, 0.5),
    vector_norm=lambda x, a: torch.linalg.vector_norm(x @ a, dim=1),
    vector_norm_1=lambda x, a: torch.linalg.vector_norm(x @ a, 1, dim=1),
    vector_norm_3=lambda x, a: torch.linalg.vector_norm(x @ a, 3, dim=1),
    vector_norm_half=lambda x, a: torch.linalg.vector_norm(0.5 + (x @ a).square(), 0.5, dim=1),
    vector_norm_inf=lambda x, a: torch.linalg.vector_norm(x @ a, torch.inf, dim=1),
    frobenius_norm=lambda x, a: x / torch.linalg.matrix_norm(a),
    nuclear_norm=lambda x, a: x / torch.linalg.matrix_norm(a, "nuc"),
    old_norm=lambda x, a: torch.norm(x @ a, p=4, dim=1),
    standard_deviation=lambda x, a: torch.std(x @ a, dim=1),
    variance=lambda x, a: torch.var(x @ a, dim=0, correction=0) * x,
    std_mean=lambda x, a: torch.cat(torch.std_mean(x @ a, dim=1, keepdim=True), 1),
    covariance=lambda x, a: x @ torch.cov((x @ a).T),
    correlation=lambda x, a: x @ torch.corrcoef((x @ a).T),
)


# The fused norm is an output of its own, which its backward takes for a constant.
operations({"wrong_in_torch": True}, weight_norm=lambda x, a: x @ torch._weight_norm(a, a[:, :1] + 2, 0))


@operation
def batch_norm_eval(x, a):
    mean, var = torch.linspace(-0.2, 0.3, x.shape[1]).double(), torch.linspace(0.5, 1.5, x.shape[1]).double()
    return F.batch_norm(x, mean, var, a[0], a[-1], training=False)
