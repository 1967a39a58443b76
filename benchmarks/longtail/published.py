"""Other authors' learned weights, and a gate that is given."""

from collections.abc import Callable

from torch import nn

from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer, recipes
from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget
from metakd.weighting import ClassAware, EntropyGate, LossMLP, Normalised, entropies
from metakd.weighting.features import own_losses


def amal(setting: Setting) -> BilevelLossBalancer:
    """AMAL's table of weights, the lookahead of the last layer alone."""
    student, teacher, optimizer, counts, _ = setting
    names = [name for name, _ in student.named_parameters()]
    last = [name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0]]
    return recipes.amal(student, teacher, optimizer=optimizer, samples=sum(counts), last_layer=last)


def meta_weight_net(published: str) -> Callable[[Setting], BilevelLossBalancer]:
    """Meta-Weight-Net as one of its two published codes has it."""
    return lambda setting: recipes.meta_weight_net(setting.student, optimizer=setting.optimizer, setting=published)


def weight_net(setting: Setting, *, rarity: bool = False) -> BilevelLossBalancer:
    """Meta-Weight-Net's network, normalised as in one code, by Adam as in the other; it may see class rarity."""
    network = Normalised(LossMLP(3 if rarity else 1, 1, hidden=(100,), activation=nn.ReLU))
    features = ClassAware(setting.counts) if rarity else own_losses
    alone = {"teacher": None, "features": features}
    return setting.balancer({"hard": CrossEntropy()}, network, lr=1e-3, weight_decay=1e-4, **alone)


def auto_balance(setting: Setting) -> BilevelLossBalancer:
    """Learned offsets and scales of the classes' logits."""
    return recipes.auto_balance(setting.student, optimizer=setting.optimizer, classes=len(setting.counts))


def bd_kd(setting: Setting) -> BilevelLossBalancer:
    """BD-KD's gate between both divergences; the teacher stays as it is."""
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=4.0), "reverse": ReverseSoftTarget(temperature=4.0)}
    student, teacher, optimizer, _, _ = setting
    return BilevelLossBalancer(
        student, terms, optimizer=optimizer, teacher=teacher, weighting=EntropyGate(), features=entropies
    )
