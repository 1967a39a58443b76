"""Losses of tokens: which tokens count, how they are averaged, and weights of their own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, terms, weighting
from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget, Tokens, tokens_as_samples


def problem(seed=0, classes=7):
    generator = torch.Generator().manual_seed(seed)
    z, teacher = torch.randn(2, 3, 5, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (3, 5), generator=generator)
    targets[0, 3:] = targets[2, 0] = -100
    targets[1, :] = -100
    return z, Batch(torch.zeros(3, 5), targets, teacher)


@pytest.mark.parametrize("shift", [False, True])
def test_the_mean_over_the_tokens_of_a_sequence_that_count(shift):
    z, batch = problem()
    found = Tokens(CrossEntropy(), shift=shift)(SimpleNamespace(logits=z), batch)
    for i in (0, 2):
        rows, targets = (z[i, :-1], batch.targets[i, 1:]) if shift else (z[i], batch.targets[i])
        torch.testing.assert_close(found[i], F.cross_entropy(rows, targets, ignore_index=-100))
    assert found[1] == 0


@pytest.mark.parametrize("shift", [False, True])
def test_divergences_from_a_teacher_by_token(shift):
    z, batch = problem()
    term = Tokens(SoftTarget(2.0), shift=shift, reduction="token")
    assert term.uses_teacher and not Tokens(CrossEntropy(), shift=shift).uses_teacher
    found = term(z, tokens_as_samples(batch, shift=shift))
    student, teacher, targets = (
        (z[:, :-1], batch.teacher[:, :-1], batch.targets[:, 1:]) if shift else (z, *batch[2:0:-1])
    )
    wanted = 4 * (F.softmax(teacher / 2, -1) * (F.log_softmax(teacher / 2, -1) - F.log_softmax(student / 2, -1))).sum(
        -1
    )
    torch.testing.assert_close(found, wanted[targets != -100])
    ensemble = batch._replace(teacher=[batch.teacher, batch.teacher])
    first = Tokens(lambda z, b: ReverseSoftTarget()(z, b._replace(teacher=b.teacher[0])), shift=shift)
    torch.testing.assert_close(first(z, ensemble), Tokens(ReverseSoftTarget(), shift=shift)(z, batch))


def test_tokens_have_their_sequences_index_and_columns():
    _, batch = problem()
    found = tokens_as_samples(
        batch._replace(index=torch.tensor([7, 8, 9]), columns={"source": torch.tensor([1, 0, 2])}), shift=True
    )
    assert found.size == 6 and found.index.tolist() == [7, 7, 9, 9, 9, 9] and found.columns["source"].tolist()[-1] == 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens)).cumsum(1)))


def tokens(seed):
    found = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(seed))
    labels = found.clone()
    labels[0, 2:] = -100
    return Batch(found, labels, columns={"source": torch.tensor([0, 1, 2, 0, 1, 2])})


def balancer(reduction, model, **options):
    torch.manual_seed(0)
    student = Model().double()
    by_token = Tokens(CrossEntropy(), shift=True, reduction=reduction)
    return BilevelLossBalancer(
        student,
        {"tokens": by_token},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        weighting=model.double(),
        meta_loss=by_token,
        **options,
    )


def test_weights_by_sequence_and_by_token_are_learned_exactly():
    table = weighting.GroupTable("source", 3, 1, output="softplus")
    check_hypergradient(balancer("sample", table), [tokens(0)], tokens(1))
    made = balancer("token", weighting.LossMLP(1, 1), batch_fn=lambda item: tokens_as_samples(item, shift=True))
    batches = [tokens_as_samples(tokens(seed), shift=True) for seed in (0, 1)]
    check_hypergradient(made, batches[:1], batches[1])
    made(*batches).backward()
    report = made.report
    assert report.weights.shape == report.losses.shape == (6 * 4 - 3, 1)


def test_a_token_weighs_what_its_weight_says():
    table = weighting.GroupTable("source", 3, 1, output="softplus")
    by_token = balancer("token", table, batch_fn=lambda item: tokens_as_samples(item, shift=True))
    batch = tokens_as_samples(tokens(0), shift=True)
    with torch.no_grad():
        table.free[:] = torch.tensor([[-1.0], [0.0], [2.0]])
    z, targets = by_token.student(batch.inputs)[:, :-1], batch.targets[:, 1:]
    losses = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100).view(
        targets.shape
    )
    weights = F.softplus(table.free[:, 0])[torch.tensor([0, 1, 2, 0, 1, 2])][:, None]
    torch.testing.assert_close(by_token.loss(batch), (weights * losses).sum() / (targets != -100).sum())


def test_what_does_not_fit_is_named():
    z, batch = problem()
    with pytest.raises(MetaKDError, match=r'reduction is "mean"|reduction is .mean.'):
        Tokens(CrossEntropy(), shift=False, reduction="mean")
    with pytest.raises(MetaKDError, match=r"expected logits of tokens, \(B, T, C\).*use CrossEntropy itself"):
        Tokens(CrossEntropy(), shift=False)(z[:, 0], batch)
    with pytest.raises(MetaKDError, match=r"integers of shape \(B, T\), got NoneType"):
        Tokens(CrossEntropy(), shift=False)(z, batch._replace(targets=None))
    with pytest.raises(MetaKDError, match=r"shape \(3, 4\), but the outputs \(3, 5, 7\)"):
        Tokens(CrossEntropy(), shift=False)(z, batch._replace(targets=batch.targets[:, 1:]))
    with pytest.raises(MetaKDError, match=r"has size=None; give the balancer batch_fn=.*tokens_as_samples"):
        Tokens(CrossEntropy(), shift=True, reduction="token")(z, batch)
    with pytest.raises(MetaKDError, match="no token of the batch counts"):
        tokens_as_samples(batch._replace(targets=torch.full((3, 5), -100)), shift=False)
    with pytest.raises(MetaKDError, match="both must score the same tokens"):
        Tokens(SoftTarget(), shift=False)(z, batch._replace(teacher=batch.teacher[:, 1:]))
    with pytest.raises(MetaKDError, match=r"term 'tokens': label 9 is out of range \[0, 7\)"):
        wrong = batch._replace(targets=torch.full((3, 5), 9))
        terms.evaluate({"tokens": Tokens(CrossEntropy(), shift=False)}, z, wrong)
