"""Terms that learn in a training: optimizers, state, errors, reports, processes."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import (
    BilevelLossBalancer,
    History,
    MetaKDError,
    check_hypergradient,
    diagnose,
    estimators,
    weighting,
)
from metakd.terms import CrossEntropy
from tests.learned_terms.by_hand import LR, Shifted, balancer_of, data, student
from tests.test_no_trace import assert_same


def balancer_with(terms, **options):
    torch.manual_seed(1)
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    return model, optimizer, BilevelLossBalancer(model, terms, optimizer=optimizer, **options)


def groups_of(optimizer):
    return [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def test_the_default_optimizer_has_a_group_of_its_own_for_terms():
    _, _, both = balancer_with({"shifted": Shifted()})
    assert groups_of(both.weighting_optimizer) == [(6, 1e-3, 1e-4), (2, 1e-2, 0.0)]
    _, _, alone = balancer_with({"shifted": Shifted()}, weighting=weighting.EntropyGate(), features=weighting.entropies)
    assert groups_of(alone.weighting_optimizer) == [(2, 1e-2, 0.0)]


def test_an_optimizer_given_must_hold_all_learned_parameters():
    term, table = Shifted(), weighting.TermScalars(1).double()
    own = torch.optim.SGD(table.parameters(), lr=0.1)
    with pytest.raises(MetaKDError, match=r"lacks .*\.offset, terms\.shifted\.log_scale.*add_param_group"):
        balancer_with({"shifted": term}, weighting=table, weighting_optimizer=own)
    term.log_scale.requires_grad_(False)
    own.add_param_group({"params": [term.offset], "lr": 0.5})
    _, _, balancer = balancer_with({"shifted": term}, weighting=table, weighting_optimizer=own)
    before = term.offset.detach().clone()
    balancer(data(0), data(9))
    torch.testing.assert_close(before - term.offset.detach(), 0.5 * term.offset.grad)
    assert term.log_scale.grad is None


def test_parameters_that_others_train_are_not_learned():
    guide = student()

    class Distance(nn.Module):
        """Holds the student, the teacher, and a projector that the student's optimizer trains."""

        def __init__(self, model):
            super().__init__()
            self.model, self.guide, self.projector = model, guide, nn.Linear(3, 3).double()
            self.tau = nn.Parameter(torch.tensor(0.5).double())

        def forward(self, outputs, batch):
            far = self.projector(outputs) - self.guide(batch.inputs).detach()
            return far.square().mean(1) * self.tau + self.model[2].weight.square().sum()

    model = student()
    term = Distance(model)
    optimizer = torch.optim.SGD([*model.parameters(), *term.projector.parameters()], lr=LR)
    terms = {"distance": term, "hard": CrossEntropy()}
    with pytest.warns(UserWarning, match="2 of its 6 parameters are not the student's"):
        balancer = BilevelLossBalancer(model, terms, optimizer=optimizer, teacher=guide)
    before = copy.deepcopy(guide.state_dict())
    balancer(data(0), data(9)).backward()
    assert list(balancer._step.learned.named) == ["terms.distance.tau"]
    assert all(p.grad.any() for p in term.projector.parameters())  # the user's own backward trains it
    assert_same(before, guide.state_dict())
    assert all(p.grad is None for p in guide.parameters())


def test_a_network_inside_a_term_that_nobody_froze():
    class Guided(Shifted):
        def __init__(self):
            super().__init__()
            self.guide = student()

        def forward(self, outputs, batch):
            with torch.no_grad():
                target = self.guide(batch.inputs).softmax(1)
            return super().forward(outputs, batch) - (target * outputs.log_softmax(1)).sum(1)

    term = Guided()
    _, _, balancer = balancer_with({"guided": term, "hard": CrossEntropy()})
    before = copy.deepcopy(term.guide.state_dict())
    with pytest.warns(UserWarning, match=r"terms\.guided\.guide\.0\.weight, .* and 1 more is exactly zero.*Freeze"):
        balancer(data(0), data(9))
    balancer(data(1), data(9))  # says it once
    assert_same(before, term.guide.state_dict())
    assert term.offset.grad.any()


def test_the_users_backward_gives_terms_no_gradient():
    for accumulate in (1, 3):
        model, term, balancer = balancer_of(lr=0.1, accumulate=accumulate)
        loss = balancer(data(0), data(9))
        kept = [p.grad.clone() for p in term.parameters()]
        loss.backward()
        assert_same(kept, [p.grad for p in term.parameters()])
        for p in term.parameters():
            p.grad = None
        balancer.loss(data(1)).backward()
        assert all(p.grad is None for p in term.parameters()) and all(p.grad is not None for p in model.parameters())


def test_the_returned_loss_is_that_of_the_moved_terms():
    model, term, balancer = balancer_of(lr=2.0)
    before = term.offset.detach().clone()
    loss = balancer(data(0), data(9))
    assert (term.offset - before).abs().max() > 1e-3
    twin = copy.deepcopy(model)
    x, y = data(0)
    z = twin(x)
    shifted = F.cross_entropy(z * term.log_scale.exp().detach() + term.offset.detach(), y, reduction="none")
    expected = torch.stack([shifted, F.cross_entropy(z, y, reduction="none")], 1)
    torch.testing.assert_close(balancer.report.losses, expected.detach())
    own = (F.softplus(balancer.weighting.free.detach())[y] * expected).sum() / len(y)
    torch.testing.assert_close(loss, own)
    loss.backward()
    own.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_hypergradients_are_averaged_before_a_step():
    _, term, balancer = balancer_of(lr=0.5, accumulate=2)
    start = term.offset.detach().clone()
    balancer(data(0), data(9))
    first = term.offset.grad.clone()
    assert torch.equal(term.offset.detach(), start)
    balancer(data(1), data(8))
    torch.testing.assert_close(start - term.offset.detach(), 0.5 * (first + term.offset.grad) / 2)


def train(model, optimizer, balancer, steps):
    for t in steps:
        loss = balancer(data(t), data(100 + t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), balancer.report.scalars()


def test_a_run_resumes_to_the_same_numbers():
    def parts():
        return balancer_with({"shifted": Shifted(), "hard": CrossEntropy()}, accumulate=2)

    model, optimizer, balancer = parts()
    list(train(model, optimizer, balancer, range(3)))
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, balancer)], saved)
    saved.seek(0)
    other = parts()
    for part, state in zip(other, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert list(train(*other, range(3, 8))) == list(train(model, optimizer, balancer, range(3, 8)))


def test_a_state_that_does_not_fit():
    _, _, balancer = balancer_with({"shifted": Shifted(), "hard": CrossEntropy()})
    _, _, plain = balancer_with({"shifted": CrossEntropy(), "hard": CrossEntropy()})
    balancer(data(0), data(9))
    state = balancer.state_dict()
    assert sorted(state["learned_terms"]) == ["terms.shifted.log_scale", "terms.shifted.offset"]
    assert "learned_terms" not in plain.state_dict()
    learned = state["learned_terms"]
    other = {**state, "learned_terms": {**learned, "terms.shifted.offset": torch.zeros(2)}}
    broken = {**state, "learned_terms": {name: value * float("nan") for name, value in learned.items()}}
    for bad, said in (
        (plain.state_dict(), r"missing \['learned_terms'\]"),
        (other, r"shape \(2,\)"),
        (broken, "learned_terms.*holds NaN"),
    ):
        kept = copy.deepcopy(balancer.state_dict())
        with pytest.raises(MetaKDError, match=said):
            balancer.load_state_dict(bad)
        assert_same(kept, balancer.state_dict())
    with pytest.raises(MetaKDError, match=r"not known here \['learned_terms'\]"):
        plain.load_state_dict(state)


@pytest.mark.parametrize("way", ["call", "meta_step"])
def test_after_an_error_everything_is_as_before(way):
    _, term, balancer = balancer_of(lr=1.0, estimator=estimators.Adjoint())
    balancer(data(0), data(9))
    kept = copy.deepcopy((balancer.state_dict(), [p.grad for p in term.parameters()]))
    real = balancer.weighting_optimizer.step

    def broken():
        real()
        raise RuntimeError("out of luck")

    balancer.weighting_optimizer.step = broken
    with pytest.raises((RuntimeError, MetaKDError), match="out of luck"):
        balancer(data(1), data(8)) if way == "call" else balancer.meta_step([data(1), data(2)], data(8))
    assert_same(kept, (balancer.state_dict(), [p.grad for p in term.parameters()]))


def test_a_hypergradient_leaves_no_trace_on_terms():
    for estimator in (estimators.OneStep(), estimators.Adjoint(), estimators.Unroll(), estimators.FiniteDifference()):
        _, term, balancer = balancer_of(estimator=estimator)
        places = [(name, p, p._version) for name, p in term._parameters.items()]
        with balancer.problem([data(0)], data(9)) as problem:
            estimator(problem)
        balancer.loss(data(0))
        balancer(data(0), data(9))
        for name, p, _ in places:
            assert term._parameters[name] is p


def test_reports_and_history():
    _, term, balancer = balancer_of(lr=0.5)
    history, seen = History(balancer.terms), []
    for t in range(4):
        balancer(data(t), data(9))
        history.add(balancer.report)
        seen.append(term.offset.detach().clone())
        found = balancer.report.scalars()
        assert found["terms.shifted.offset/max"] == pytest.approx(term.offset.max().item())
        assert torch.equal(balancer.report.term_parameters["terms.shifted.offset"], term.offset)
    assert history.learned == ["terms.shifted.offset", "terms.shifted.log_scale"]
    torch.testing.assert_close(history.over_time("terms.shifted.offset"), torch.stack(seen), rtol=1e-6, atol=1e-6)
    other = History(balancer.terms)
    other.load_state_dict(history.state_dict())
    other.add(balancer.report)
    history.add(balancer.report)
    assert_same(other.state_dict(), history.state_dict())
    few = History(balancer.terms, points=2)
    for _ in range(3):
        few.add(balancer.report)
    torch.testing.assert_close(few.over_time("terms.shifted.offset"), seen[-1].expand(2, 3), rtol=1e-6, atol=1e-6)


def test_a_diagnosis():
    _, _, balancer = balancer_with({"shifted": Shifted(), "hard": CrossEntropy()})
    batches, meta = [data(t) for t in range(4)], [data(10 + t) for t in range(4)]
    kept = copy.deepcopy(balancer.state_dict())
    assert "Is it learning?" in str(diagnose(balancer, batches, meta))
    assert_same(kept, balancer.state_dict())


def test_a_problem_in_another_dtype():
    model, term = student().float(), Shifted().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"shifted": term}, optimizer=optimizer)
    x, y = data(0)
    found = []
    for dtype in (None, torch.float64):
        with balancer.problem([(x.float(), y)], (x.float(), y), dtype) as problem:
            assert problem.meta_params["terms.shifted.offset"].dtype == (dtype or torch.float32)
            found.append(estimators.OneStep()(problem).gradient["terms.shifted.offset"])
    assert 0 < (found[0].double() - found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: (z, z.exp()), lambda z: SimpleNamespace(logits=z)])
def test_outputs_of_any_kind(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = student()

        def forward(self, x):
            return wrap(self.body(x))

    class Reads(Shifted):
        def forward(self, outputs, batch):
            named = isinstance(outputs, dict)
            z = outputs["logits"] if named else outputs[0] if isinstance(outputs, tuple) else outputs.logits
            return super().forward(z, batch)

    model, term = Wrapped(), Reads()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"own": term}, optimizer=optimizer, meta_loss=copy.deepcopy(term))
    check_hypergradient(balancer, [data(0)], data(9))


def test_to_moves_terms_as_well():
    model = student().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"shifted": Shifted()}, optimizer=optimizer)
    assert balancer.to(torch.float32).terms["shifted"].offset.dtype == torch.float32
    x, y = data(0)
    balancer((x.float(), y), (x.float(), y)).backward()


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def forward(self, outputs, batch):
        return self.layer(outputs)[:, 0]


def test_misuse():
    table = weighting.ClassTable(3, 1).double()
    tied = Shifted()
    tied.offset = table.free
    unread = Shifted()
    unread.forward = CrossEntropy()
    for terms, options, said in (
        ({"shifted": Shifted()}, {"weighting": weighting.Rectified(1)}, "Rectified looks ahead with weights of zero"),
        ({"tied": tied}, {"weighting": table}, r"terms\.tied\.offset is the weight model's parameter as well"),
        ({"lazy": Lazy()}, {}, r"terms\.lazy\.layer\.weight has no size yet"),
        ({"a": nn.ModuleDict({"b": Shifted()}), "a.b": Shifted()}, {}, r"terms\.a\.b\.offset is the name of two"),
    ):
        with pytest.raises(MetaKDError, match=said):
            balancer_with(terms, **options)
    fixed = weighting.TermScalars(1).double().requires_grad_(False)
    _, _, balancer = balancer_with({"unread": unread}, weighting=fixed)
    with pytest.raises(MetaKDError, match=r"terms\.unread\.offset"):
        balancer(data(0), data(9))
