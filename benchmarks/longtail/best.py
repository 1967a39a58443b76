"""metakd's own best: learned weights over terms that know the class counts, and their best fixed mixture."""

from collections.abc import Mapping, Sequence

from benchmarks.longtail.fixed import Mixture
from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer, weighting
from metakd.recipes.base import adam, beside
from metakd.terms import BalancedSoftmax, DebiasedSoftTarget, Term


def terms(counts: Sequence[int]) -> Mapping[str, Term]:
    """The label and the teacher, both without the prior of the long tail."""
    return {"label": BalancedSoftmax(counts), "teacher": DebiasedSoftTarget(counts, temperature=4.0)}


def best_mixture(counts: tuple[int, ...]) -> Mixture:
    """The same terms by fixed weights."""
    return {name: (0.5, term) for name, term in terms(counts).items()}


def best(setting: Setting) -> BilevelLossBalancer:
    """The same terms by learned weights, which start at the mixture's."""
    student, teacher, optimizer, counts, preset = setting
    model = beside(student, weighting.LossMLP(2, 2, hidden=(64,)))
    return BilevelLossBalancer(
        student,
        terms(counts),
        optimizer=optimizer,
        teacher=teacher,
        weighting=model,
        weighting_optimizer=adam(model, preset.weighting_lr),
    )
