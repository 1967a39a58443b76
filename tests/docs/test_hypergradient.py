"""The page on any bilevel problem is right about its hypergradients."""

import torch

from tests.docs.pages import run_page


def test_its_hypergradients_are_exact_and_its_losses_fall(capsys):
    torch.manual_seed(0)
    scope = run_page("docs/hypergradient.md")
    assert capsys.readouterr().out.count("exact: the largest relative error is") == 2
    assert scope["result"].gradient["lr"].isfinite()
    losses = scope["after_adaptation"]
    assert sum(losses[-10:]) < sum(losses[:10]) / 3
    assert scope["final"][-1] < scope["final"][0] / 2
    assert scope["free"][1:, 3].max() < 0 <= scope["free"][1:, :3].min()
    assert int(scope["buffers"]["1.num_batches_tracked"]) == 0
