"""What can be wrong with a student's parameters and its optimizer."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn.parameter import is_lazy

from metakd.errors import MetaKDError
from metakd.inner.mirror import mirror
from metakd.validation.finding import HANDLED, Finding, Subject, listed


def frozen_parameters(subject: Subject) -> Iterator[Finding]:
    """Some, or all."""
    count, frozen = len(subject.params), [name for name, p in subject.params.items() if not p.requires_grad]
    if len(frozen) == count:
        problem = f"none of its {count} parameters is trainable"
        yield Finding("error", "the student", problem, "Call requires_grad_(True) on those to train")
    elif frozen:
        yield Finding("note", f"{len(frozen)} of {count} parameters ({listed(frozen)})", "they are frozen", HANDLED)


def lazy_parameters(subject: Subject) -> Iterator[Finding]:
    """Parameters that wait for a first batch."""
    if names := [name for name, p in subject.params.items() if is_lazy(p)]:
        yield Finding(
            "error",
            listed(names),
            "lazy parameters have no shape before the first forward pass",
            "Call the student on a batch once, before the balancer is built",
        )


def held_parameters(subject: Subject) -> Iterator[Finding]:
    """The optimizer's parameters against the student's."""
    if subject.optimizer is None:
        return
    held = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in subject.trainable().items() if id(p) not in held]
    others = len(held - {id(p) for p in subject.params.values()})
    if missing and len(missing) == len(subject.trainable()):
        yield Finding(
            "error",
            "the optimizer",
            "it holds none of the student's trainable parameters, so it is the optimizer of another model (or of a "
            "copy made before it)",
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
    if others:
        yield Finding(
            "warning",
            "the optimizer",
            f"{others} of its {len(held)} parameters are not the student's, and virtual steps do not move them",
            "If the losses depend on them, make them part of the student: a module that holds both",
        )


def learning_rates(subject: Subject) -> Iterator[Finding]:
    """Groups that do not move."""
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    still = [i for i, group in enumerate(groups) if group.get("lr") == 0]
    if still and len(still) == len(groups):
        yield Finding(
            "note",
            "the optimizer",
            "its learning rate is 0, so that no weight can matter: until it is not, the balancer's calls take no "
            "hypergradient (report.skipped says so)",
            HANDLED,
        )
    elif still:
        where = f"group(s) {listed([str(i) for i in still])} of the optimizer"
        yield Finding("note", where, "the learning rate is 0: virtual steps do not move their parameters", HANDLED)


def mirrored_rule(subject: Subject) -> Iterator[Finding]:
    """Optimizers that inner='mirror' cannot follow."""
    if subject.optimizer is None:
        return
    mine = {id(p) for p in subject.trainable().values() if not is_lazy(p)}
    groups = [[p for p in group["params"] if id(p) in mine] for group in subject.optimizer.param_groups]
    try:  # one parameter of each group tells as much as all, and costs less
        mirror(subject.optimizer, {str(i): min(group, key=Tensor.numel) for i, group in enumerate(groups) if group})
    except MetaKDError as error:
        where = f"the optimizer ({type(subject.optimizer).__name__})"
        problem = str(error).split(";")[0]
        yield Finding("note", where, problem, "Use inner='sgd', or a torchopt GradientTransformation")
