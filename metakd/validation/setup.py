"""Findings about a student's parameters and its optimizer."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn.parameter import is_lazy

from metakd.errors import MetaKDError
from metakd.inner import learning_rate, mirror, param_groups
from metakd.validation.finding import HANDLED, Finding, Subject, listed


def frozen_parameters(subject: Subject) -> Iterator[Finding]:
    """Some or all parameters are frozen."""
    count, frozen = len(subject.params), [name for name, p in subject.params.items() if not p.requires_grad]
    if len(frozen) == count:
        problem = f"none of its {count} parameters is trainable"
        yield Finding("error", "the student", problem, "Call requires_grad_(True) on those to train")
    elif frozen:
        yield Finding("note", f"{len(frozen)} of {count} parameters ({listed(frozen)})", "they are frozen", HANDLED)


def lazy_parameters(subject: Subject) -> Iterator[Finding]:
    """Parameters without a shape before the first batch."""
    if names := [name for name, p in subject.params.items() if is_lazy(p)]:
        yield Finding(
            "error",
            listed(names),
            "lazy parameters have no shape before the first forward pass",
            "Call the student on a batch once, before the balancer is built",
        )


def held_parameters(subject: Subject) -> Iterator[Finding]:
    """The optimizer's parameters and the student's differ."""
    if subject.optimizer is None:
        return
    owners: dict[int, list[str]] = {}
    for optimizer, group in param_groups(subject.optimizer):
        for p in group["params"]:
            owners.setdefault(id(p), []).append(type(optimizer).__name__)
    missing = [name for name, p in subject.trainable().items() if id(p) not in owners]
    others = len(owners.keys() - {id(p) for p in subject.params.values()})
    if missing and len(missing) == len(subject.trainable()):
        yield Finding(
            "error",
            "the optimizer",
            "it holds none of the student's trainable parameters, so it belongs to another model (or to a copy made "
            "earlier)",
            "Build it as torch.optim.SGD(student.parameters(), ...)",
        )
        return
    if missing:
        yield Finding(
            "error",
            listed(missing),
            f"{len(missing)} trainable parameter(s) of the student are not in the optimizer",
            "Add them to it, or freeze them with requires_grad_(False)",
        )
    several = {name: own for name, p in subject.trainable().items() if len(own := owners.get(id(p), [])) > 1}
    if several:
        kinds = " and ".join(next(iter(several.values())))
        yield Finding(
            "error",
            listed(list(several)),
            f"{len(several)} parameter(s) are held more than once (by {kinds}), and each would move them",
            "Leave each parameter in one group of one optimizer",
        )
    if others:
        yield Finding(
            "warning",
            "the optimizer",
            f"{others} of its {len(owners)} parameters are not the student's, and virtual steps do not move them",
            "If the losses depend on them, make them part of the student, in a module that holds both",
        )


def learning_rates(subject: Subject) -> Iterator[Finding]:
    """Groups with a learning rate of zero, or without one."""
    groups = [] if subject.optimizer is None else param_groups(subject.optimizer)
    rates = [learning_rate(group) for _, group in groups]
    still = [i for i, rate in enumerate(rates) if rate == 0.0]
    if still and len(still) == len(groups):
        yield Finding(
            "note",
            "the optimizer",
            "its learning rate is 0, so no weight matters: while it is 0, the balancer's calls take no hypergradient "
            "(see report.skipped)",
            HANDLED,
        )
    elif still:
        where = f"group(s) {listed([str(i) for i in still])} of the optimizer"
        yield Finding("note", where, "the learning rate is 0: virtual steps do not move their parameters", HANDLED)
    if without := [i for i, rate in enumerate(rates) if rate is None]:
        kinds = dict.fromkeys(type(groups[i][0]).__name__ for i in without)
        yield Finding(
            "note",
            f"group(s) {listed([str(i) for i in without])} of the optimizer ({', '.join(kinds)})",
            "the learning rate is not a number (lr=None, or no lr), but inner='sgd' and inner='mirror' need one",
            "Set a number, or pass a torchopt GradientTransformation as inner=",
        )


def mirrored_rule(subject: Subject) -> Iterator[Finding]:
    """Optimizers that inner='mirror' cannot follow."""
    mine = {id(p) for p in subject.trainable().values() if not is_lazy(p)}
    seen: set[str] = set()
    for optimizer, group in [] if subject.optimizer is None else param_groups(subject.optimizer):
        params = [p for p in group["params"] if id(p) in mine]
        if not params or learning_rate(group) is None:
            continue
        try:  # one parameter of each group suffices, and the smallest costs least
            mirror(optimizer, {"": min(params, key=Tensor.numel)})
        except MetaKDError as error:
            problem = str(error).split(";")[0]
            if problem not in seen:
                seen.add(problem)
                where = f"the optimizer ({type(optimizer).__name__})"
                yield Finding("note", where, problem, "Use inner='sgd', or a torchopt GradientTransformation")
