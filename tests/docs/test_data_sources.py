"""The page on sources of data: its code runs, and its weights of tokens are those of its terms."""

import torch
from torch import nn

from metakd import Batch, BilevelLossBalancer
from tests.docs.pages import blocks, execute


def test_the_code_runs(capsys):
    scope = {}
    execute("docs/data_sources.md", scope)
    assert capsys.readouterr().out.strip() == blocks("docs/data_sources.md", "text")[0].code.strip()
    assert scope["loss"].requires_grad and scope["history"].over_time("weights", [2]).shape == (1, 1)


def test_the_options_for_tokens_go_together():
    scope = {}
    execute("docs/data_sources.md", scope)
    student = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tokens = torch.randint(9, (3, 6))
    balancer = BilevelLossBalancer(
        student, [scope["by_token"]], optimizer=torch.optim.SGD(student.parameters(), lr=0.1), **scope["options"]
    )
    balancer((tokens, tokens), (tokens, tokens))
    assert balancer.report.weights.shape == (15, 1)
    by_sequence = scope["terms"]["teacher"](student(tokens), Batch(tokens, tokens, torch.randn(3, 6, 9)))
    assert by_sequence.shape == (3,)
