"""What terms that learn find: a transition matrix from mislabelled digits and a few clean ones."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from metakd import BilevelLossBalancer, weighting
from metakd.terms import CrossEntropy, ForwardCorrected

CLASSES = 10


def trained(term, *, learns):
    """Test accuracy after training on digits, of which 40 % are labelled as the next class; 100 clean ones are meta."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=generator)
    x, y = torch.tensor(digits.data).float()[order] / 16, torch.tensor(digits.target)[order]
    noisy = (y + (torch.rand(len(y), generator=generator) < 0.4)) % CLASSES
    meta, train, test = slice(100), torch.arange(100, 1100), slice(1100, None)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    fixed = weighting.TermScalars(1, init=1.0, output="identity").requires_grad_(False)
    balancer = BilevelLossBalancer(student, {"label": term}, optimizer=optimizer, weighting=fixed)
    for _ in range(35):
        for rows in train[torch.randperm(len(train), generator=generator)].split(50):
            loss = balancer((x[rows], noisy[rows]), (x[meta], y[meta]) if learns else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (student(x[test]).argmax(1) == y[test]).float().mean().item()


@pytest.mark.slow
def test_a_learned_transition_matrix_finds_the_wrong_labels():
    term = ForwardCorrected(0.9 * torch.eye(CLASSES) + 0.01, learned=True)
    plain, learned = trained(CrossEntropy(), learns=False), trained(term, learns=True)
    found = term.transition
    assert learned > plain + 0.1, (plain, learned)
    confused = found.roll(-1, 1).diagonal()  # with the next class
    assert confused.mean() > 0.25 and (found.diagonal() + confused).mean() > 0.7, found
