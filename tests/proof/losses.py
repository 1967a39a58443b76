"""Losses of every kind: (z (B, D), y (B, D)) -> one a sample (B,), or a scalar where the loss knows no less."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.proof.registry import grid, spread

Loss = Callable[[Tensor, Tensor], Tensor]


def label(y: Tensor) -> Tensor:
    return y.argmax(1)


def sign(y: Tensor) -> Tensor:
    """1 or -1 a sample."""
    return torch.where(y[:, 0] > 0, 1.0, -1.0).double()


def hot(y: Tensor) -> Tensor:
    """0 or 1 an entry."""
    return (y > 0).double()


def rows(loss: Callable[..., Tensor], **options) -> Loss:
    """Of an elementwise loss, the mean of each row."""
    return lambda z, y: loss(z, y, reduction="none", **options).mean(1)


def class_weights(y: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)


def _ctc(z: Tensor, y: Tensor) -> Tensor:
    time = spread(z, 4, 3).movedim(1, 0).log_softmax(2)
    targets = 1 + torch.arange(len(y))[:, None].remainder(2).repeat(1, 2)
    return F.ctc_loss(time, targets, torch.full((len(y),), 4), torch.full((len(y),), 2), reduction="none")


def _hinge(z: Tensor, y: Tensor) -> Tensor:
    return (1 - sign(y) * z.sum(1)).relu().square()


def _focal(z: Tensor, y: Tensor) -> Tensor:
    entropy = F.cross_entropy(z, label(y), reduction="none")
    return (1 - (-entropy).exp()) ** 2 * entropy


def _contrastive(z: Tensor, y: Tensor) -> Tensor:
    similar = F.normalize(z, dim=1) @ F.normalize(y, dim=1).T
    return F.cross_entropy(similar / 0.5, torch.arange(len(z)), reduction="none")


def _relations(z: Tensor, y: Tensor) -> Tensor:
    """Relational distillation: distances among the samples."""
    return F.huber_loss(torch.cdist(z, z) + 0.1, torch.cdist(y, y) + 0.1)


def _dice(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - (2 * (p * hot(y)).sum(1) + 1) / (p.sum(1) + hot(y).sum(1) + 1)


def _wasserstein(z: Tensor, y: Tensor) -> Tensor:
    return (z.sort(1).values - y.sort(1).values).square().mean(1)


LOSSES: dict[str, Loss] = {
    "mse": rows(F.mse_loss),
    "mse_mean": lambda z, y: F.mse_loss(z, y),
    "mse_weighted": lambda z, y: F.mse_loss(z, y, weight=class_weights(y).expand_as(y)),
    "l1": rows(F.l1_loss),
    "smooth_l1": rows(F.smooth_l1_loss, beta=0.5),
    "huber": rows(F.huber_loss, delta=0.6),
    "log_cosh": lambda z, y: (z - y).cosh().log().mean(1),
    "cross_entropy": lambda z, y: F.cross_entropy(z, label(y), reduction="none"),
    "cross_entropy_mean": lambda z, y: F.cross_entropy(z, label(y)),
    "cross_entropy_weighted": lambda z, y: F.cross_entropy(z, label(y), class_weights(y)),
    "cross_entropy_smooth": lambda z, y: F.cross_entropy(z, label(y), reduction="none", label_smoothing=0.2),
    "cross_entropy_soft": lambda z, y: F.cross_entropy(z, y.softmax(1), reduction="none"),
    "cross_entropy_ignore": lambda z, y: F.cross_entropy(z, F.pad(label(y)[1:], (1, 0), value=-1), ignore_index=-1),
    "cross_entropy_dense": lambda z, y: F.cross_entropy(spread(z, 3, 4), label(spread(y, 3, 4))),
    "binary_cross_entropy": lambda z, y: F.binary_cross_entropy(0.1 + 0.8 * z.sigmoid(), hot(y), reduction="none").mean(
        1
    ),
    "bce_with_logits": rows(lambda z, y, **kw: F.binary_cross_entropy_with_logits(z, hot(y), **kw)),
    "bce_with_weights": lambda z, y: F.binary_cross_entropy_with_logits(
        z, y.sigmoid(), class_weights(y), pos_weight=1 + class_weights(y)
    ),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), label(y), reduction="none"),
    "nll_weighted": lambda z, y: F.nll_loss(z.log_softmax(1), label(y), class_weights(y)),
    "kl_div": lambda z, y: F.kl_div(z.log_softmax(1), y.softmax(1), reduction="none").sum(1),
    "kl_div_log": lambda z, y: F.kl_div(z.log_softmax(1), y.log_softmax(1), reduction="batchmean", log_target=True),
    "kl_div_both": lambda z, y: F.kl_div(y.log_softmax(1), z.softmax(1), reduction="none").sum(1),
    "jensen_shannon": lambda z, y: (lambda p, q: ((p - q) * (p.log() - q.log())).sum(1))(z.softmax(1), y.softmax(1)),
    "poisson_nll": rows(lambda z, y, **kw: F.poisson_nll_loss(z, y.square(), **kw)),
    "poisson_nll_full": lambda z, y: F.poisson_nll_loss(0.5 + z.square(), 2 + y.square(), log_input=False, full=True),
    "gaussian_nll": lambda z, y: F.gaussian_nll_loss(z, y, 0.2 + z.flip(1).square(), full=True),
    "ctc": _ctc,
    "cosine_embedding": lambda z, y: F.cosine_embedding_loss(z, y, sign(y), margin=-0.9, reduction="none"),
    "triplet": lambda z, y: F.triplet_margin_loss(z, y, y.roll(1, 0), margin=3.0, reduction="none"),
    "triplet_swap": lambda z, y: F.triplet_margin_loss(z, y, z.flip(0) + 0.3, margin=3.0, swap=True),
    "margin_ranking": lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 1], sign(y), margin=2.0, reduction="none"),
    "multi_margin": lambda z, y: F.multi_margin_loss(z, label(y), margin=2.0, reduction="none"),
    "multi_margin_2": lambda z, y: F.multi_margin_loss(z, label(y), p=2, weight=class_weights(y)),
    "multilabel_margin": lambda z, y: F.multilabel_margin_loss(
        z, F.pad(label(y)[:, None], (0, z.shape[1] - 1), value=-1)
    ),
    "multilabel_soft_margin": lambda z, y: F.multilabel_soft_margin_loss(z, hot(y), reduction="none"),
    "soft_margin": rows(lambda z, y, **kw: F.soft_margin_loss(z, 2 * hot(y) - 1, **kw)),
    "hinge": _hinge,
    "hinge_embedding": rows(lambda z, y, **kw: F.hinge_embedding_loss(z.square(), 2 * hot(y) - 1, margin=3.0, **kw)),
    "focal": _focal,
    "contrastive": _contrastive,
    "relations": _relations,
    "dice": _dice,
    "wasserstein": _wasserstein,
    "negative_log_of_mean": lambda z, y: -(0.1 + z.sigmoid()).mean(1).log(),
    "entropy": lambda z, y: torch.special.entr(z.softmax(1)).sum(1) + (z * grid(*y.shape)).mean(1),
    "determinantal": lambda z, y: -torch.logdet(z.T @ z + torch.eye(z.shape[1], dtype=z.dtype)),
    "power": lambda z, y: (z - y).abs().pow(2.5).mean(1),
}
