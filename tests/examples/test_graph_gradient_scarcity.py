"""The example on learned graphs: its exact zeros, its estimators, its record."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "graph_gradient_scarcity.py"


@pytest.fixture
def example():
    before = torch.get_default_dtype()
    yield runpy.run_path(str(EXAMPLE))
    torch.set_default_dtype(before)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_gradient_is_zero_beyond_the_layers_and_nowhere_else(example, depth):
    far, size = example["gcn_scarcity"](depth, nodes=60)
    assert bool((size[far > depth] == 0).all()) and bool((far > depth).any())
    assert bool((size[far <= depth] > 0).all())


def test_the_distance_of_an_edge_is_that_of_its_nearer_end(example):
    nodes, edges = example["distances"](example["ring"](8), 8, torch.tensor([0, 1]))
    assert nodes.tolist() == [0, 0, 1, 2, 3, 3, 2, 1]
    assert edges.tolist() == [0, 0, 1, 2, 3, 2, 1, 0]


def test_the_closed_form_is_the_optimum(example):
    _, (inner, _, params, free) = example["laplacian"](0.2, nodes=40)
    y = params["y"].requires_grad_()
    (gradient,) = torch.autograd.grad(inner({"y": y}, free, None), y)
    assert gradient.abs().max() < 1e-14


def test_with_a_ridge_the_decay_is_exponential_and_without_there_is_none(example):
    far, size, r2 = example["laplacian_scarcity"](0.2)
    assert r2 > 0.99 and size[far == 40].max() < 1e-10 * size[far == 1].min()
    far, size, r2 = example["laplacian_scarcity"](0.0)
    assert r2 < 0.5
    torch.testing.assert_close(size[far > 0], size[far > 0].mean().expand(int((far > 0).sum())))


@pytest.mark.slow
def test_the_estimators_agree(example):
    found = example["agreement"](ridge=1.0, steps=150)
    assert len(found) == 4
    assert max(found.values()) < 1e-8


def test_edges_of_far_nodes_keep_their_weight_unless_they_are_computed(example):
    """The accuracies are a matter of luck with so few steps; that all methods start alike is not."""
    found = example["accuracy"](0, steps=2, inner_steps=3)
    assert list(found) == ["no graph", "equal weights", "a number an edge", "G2G, frozen", "G2G"]
    assert all(0 <= value <= 1 for value in found.values())
    again = example["accuracy"](0, steps=0, inner_steps=3)
    assert again["equal weights"] == again["a number an edge"] == found["equal weights"]
    assert again["G2G"] == again["G2G, frozen"] == found["G2G, frozen"]


def test_the_record_and_the_plot(example, tmp_path, monkeypatch, capsys):
    main = example["main"]
    tiny = {
        "accuracy": lambda seed: example["accuracy"](seed, steps=1, inner_steps=2),
        "agreement": lambda: {"Unroll": 0.0},
    }
    for name, function in tiny.items():
        monkeypatch.setitem(main.__globals__, name, function)
    monkeypatch.setattr(sys, "argv", ["examples/graph_gradient_scarcity.py", "--seeds", "1", "--output", str(tmp_path)])
    main()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["seeds"] == len(record["accuracies"]) == 1
    assert record["command"].startswith("python examples/graph_gradient_scarcity.py --seeds 1")
    assert set(record["figures"]["largest |hypergradient| beyond, claim: 0"].values()) == {0.0}
    assert (tmp_path / "graph_gradient_scarcity.png").stat().st_size > 10_000
    assert "claim" in capsys.readouterr().out
