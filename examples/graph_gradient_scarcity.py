"""Learn the edges of a graph: which of them get a gradient at all?

    python examples/graph_gradient_scarcity.py --output runs/graph_gradient_scarcity

Inner problem: predict the labels of some nodes of a ring. Outer problem: the loss of other labelled nodes, over the
weights of the edges. Claims (Ghanem, Vaiter, Keriven, arXiv 2303.13964): with a graph network of k layers an edge far
from every labelled node has a hypergradient of exactly zero; with Laplacian regularisation it decays exponentially with
the distance; edges computed from the nodes' features (graph to graph, G2G) are learned far away too.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
import torchopt
from matplotlib.figure import Figure

from metakd import check_hypergradient, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, Implicit, Unroll
from metakd.longtail import provenance
from metakd.longtail.checkpoint import write_atomically

torch.set_default_dtype(torch.float64)


def adjacency(weights, edges, nodes):
    """The symmetric matrix (N, N) of edges (E, 2) with weights (E,)."""
    half = torch.zeros(nodes, nodes).index_put((edges[:, 0], edges[:, 1]), weights)
    return half + half.mT


def ring(nodes, reach=1):
    """Edges between nodes up to `reach` apart on a ring."""
    i = torch.arange(nodes)
    return torch.cat([torch.stack([i, (i + d) % nodes], 1) for d in range(1, reach + 1)])


def distances(edges, nodes, labelled):
    """Steps to the nearest labelled node, for nodes and (from their nearer end) for edges."""
    d = torch.full((nodes,), nodes)
    d[labelled] = 0
    for _ in range(nodes):
        d = d.scatter_reduce(0, edges.flatten(), d[edges].amin(1).repeat_interleave(2) + 1, "amin")
    return d, d[edges].amin(1)


def gcn(params, weights, edges, x):
    """A graph network with self-loops and symmetric normalisation, one layer a parameter."""
    a = adjacency(weights, edges, len(x)) + torch.eye(len(x))
    scale = a.sum(1).rsqrt()
    for i, weight in enumerate(params.values()):
        x = scale[:, None] * a * scale @ (x.tanh() if i else x) @ weight
    return x


def layers(sizes, generator):
    """Starting weights of a graph network."""
    drawn = [torch.randn(m, n, generator=generator) / m**0.5 for m, n in pairwise(sizes)]
    return {f"layer{i}": weight for i, weight in enumerate(drawn)}


def gcn_scarcity(depth, nodes=120):
    """Distance and |hypergradient| of the edges of a ring, 20 neighbours labelled, through 20 steps of training."""
    generator, edges, labelled = torch.Generator().manual_seed(depth), ring(nodes), torch.arange(20)
    x, y = torch.randn(nodes, 8, generator=generator), torch.randint(2, (nodes,), generator=generator)

    def loss(params, phi, rows):
        return F.cross_entropy(gcn(params, phi["edges"].sigmoid(), edges, x)[rows], y[rows])

    start, free = layers([8] + [16] * (depth - 1) + [2], generator), {"edges": torch.zeros(nodes)}
    options = {"outer_batches": [labelled[1::2]], "optimizer": torchopt.sgd(lr=0.5), "estimator": Unroll()}
    found = hypergradient(loss, loss, start, free, [labelled[::2]] * 20, **options)
    return distances(edges, nodes, labelled)[1], found.gradient["edges"].abs()


def laplacian(ridge, nodes=120):
    """The distance of a ring's edges, and the arguments of `hypergradient` at the optimum, known in closed form."""
    edges, labelled, free = ring(nodes), torch.arange(20), torch.zeros(nodes)
    target = torch.randn(nodes, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(nodes).index_fill(0, labelled[::2], 1.0)

    def inner(params, phi, batch):
        y, smooth = params["y"], (params["y"][edges[:, 0]] - params["y"][edges[:, 1]]) ** 2
        return known @ (y - target) ** 2 / 2 + phi["edges"].sigmoid() @ smooth + ridge / 2 * y @ y

    a = adjacency(free.sigmoid(), edges, nodes)
    optimum = torch.linalg.solve(torch.diag(known + ridge + 2 * a.sum(1)) - 2 * a, known * target)
    outer = lambda params, phi: (params["y"] - target)[labelled[1::2]].pow(2).mean()  # noqa: E731
    return distances(edges, nodes, labelled)[1], (inner, outer, {"y": optimum}, {"edges": free})


def laplacian_scarcity(ridge):
    """Distance and |hypergradient| of the edges, by conjugate gradients, and R^2 of a line through its log."""
    far, arguments = laplacian(ridge)
    options = {"optimizer": torchopt.sgd(lr=0.1), "estimator": Implicit(steps=400)}
    size = hypergradient(*arguments, [None], **options).gradient["edges"].abs()
    return far, size, float(torch.corrcoef(torch.stack([far.double(), size.log()]))[0, 1] ** 2)


def agreement(ridge=0.2, steps=600):
    """Relative differences of other hypergradients from the implicit one, from the optimum on."""
    arguments, options = laplacian(ridge)[1], {"batches": [None] * steps, "optimizer": torchopt.sgd(lr=0.2)}
    implicit, *others = (Implicit(steps=400), Unroll(), Adjoint(), FiniteDifference())
    size, found = hypergradient(*arguments, **options, estimator=implicit).gradient["edges"], {}
    for other in others:
        difference = hypergradient(*arguments, **options, estimator=other).gradient["edges"] - size
        found[type(other).__name__] = float(difference.norm() / size.norm())
    check = check_hypergradient(*arguments, **options, estimator=implicit, directions=1)
    return found | {"central differences (0: below rounding)": check.relative_error["edges"]}


def world(seed, nodes=240):
    """A ring's edges, features and labels: neighbours agree where they share a topic, which shows in the features."""
    generator, edges = torch.Generator().manual_seed(seed), ring(nodes, reach=8)
    y, topic = torch.randint(3, (nodes,), generator=generator), torch.randint(2, (nodes,), generator=generator)
    means, noise = 0.5 * torch.randn(3, 7, generator=generator), torch.randn(nodes, 7, generator=generator)
    x = torch.cat([means[y] + noise, 2.0 * topic[:, None] - 1], 1)
    same_topic, same_label = (value[edges[:, 0]] == value[edges[:, 1]] for value in (topic, y))
    chance = torch.where(same_topic, torch.where(same_label, 0.9, 0.02), 0.2)
    return edges[torch.rand(len(edges), generator=generator) < chance], x, y, generator


def accuracy(seed, steps=30, inner_steps=20):
    """Accuracy on nodes that depend on no edge with a hypergradient of its own, by what weighs the edges."""
    (edges, x, y, generator), labelled = world(seed), torch.arange(80)
    distance, start = distances(edges, len(x), labelled)[0], layers([8, 16, 3], generator)
    far = (distance > 4) & (distance < len(x))
    pairs = torch.cat([(x[edges[:, 0]] - x[edges[:, 1]]).abs(), x[edges[:, 0]] * x[edges[:, 1]]], 1)
    mlp = {"first": torch.randn(16, 16, generator=generator) / 4, "last": torch.randn(16, generator=generator) / 4}
    free, found = {"edges": torch.zeros(len(edges))}, {}

    def predict(params, phi):
        logits = phi["edges"] if "edges" in phi else (pairs @ phi["first"]).tanh() @ phi["last"]
        return gcn(params, logits.sigmoid(), edges, x)

    def loss(params, phi, rows):
        return F.cross_entropy(predict(params, phi)[rows], y[rows])

    options = {"optimizer": torchopt.adam(lr=0.05), "outer_batches": [labelled[1::2]], "estimator": Unroll()}
    off, rates = {"edges": free["edges"] - 100}, {"a number an edge": 0.3, "G2G": 0.03}
    starts = {"no graph": off, "equal weights": free, "a number an edge": free, "G2G, frozen": mlp, "G2G": mlp}
    for name, values in starts.items():
        phi = {key: value.clone() for key, value in values.items()}
        optimizer = torch.optim.Adam(phi.values(), lr=rates.get(name, 0.0))
        for _ in range(steps if name in rates else 0):
            result = hypergradient(loss, loss, start, phi, [labelled[::2]] * inner_steps, **options)
            for key, value in phi.items():
                value.grad = result.gradient[key]
            optimizer.step()
        # Then on all labels, with learned edges as without.
        params = hypergradient(loss, loss, start, phi, [labelled] * inner_steps, **options).params
        found[name] = float((predict(params, phi).argmax(1) == y)[far].double().mean())
    return found


def draw(gcns, laplacians, accuracies, path):
    """Hypergradients against the distance, for graph networks and Laplacian regularisation; accuracy far away."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for depth, (far, size) in gcns.items():
        left.semilogy(far + depth / 4 - 0.5, size.where(size > 0, 1e-7), "o", label=f"{depth} layers", alpha=0.6)
    for ridge, (far, size, r2) in laplacians.items():
        middle.semilogy(far, size, ".", label=f"ridge {ridge:g}: R² {r2:.3f}")
    for one in accuracies:
        right.plot(list(one.values()), list(one), "o-", color="#999999", alpha=0.6)
    right.plot([mean(one[name] for one in accuracies) for name in one], list(one), "D", color="#D55E00", label="mean")
    left.set(title="Graph network; bottom row: exactly 0", xlabel="distance", ylabel="|hypergradient|", xlim=(-1, 8))
    middle.set(title="Laplacian regularisation", xlabel="distance")
    right.set(title="Accuracy of far nodes, a line a seed")
    for panel in (left, middle, right):
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    """Print the figures beside the claims; write the record and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/graph_gradient_scarcity"))
    args = parser.parse_args()
    gcns, laplacians = {k: gcn_scarcity(k) for k in (1, 2, 3)}, {r: laplacian_scarcity(r) for r in (0.2, 0.05, 0.0)}
    accuracies = [accuracy(seed) for seed in range(5, 5 + args.seeds)]  # 0 to 4 have shaped `world`
    figures = {
        "smallest |hypergradient| up to k, claim: > 0": {k: float(g[d <= k].min()) for k, (d, g) in gcns.items()},
        "largest |hypergradient| beyond, claim: 0": {k: float(g[d > k].max()) for k, (d, g) in gcns.items()},
        "R^2 of log |hypergradient|, by ridge, claim: > 0.9": {ridge: found[2] for ridge, found in laplacians.items()},
        "differences between estimators, claim: 0": agreement(),
        "accuracy far away, claim: G2G above": {name: mean(one[name] for one in accuracies) for name in accuracies[0]},
    }
    for name, values in figures.items():
        print(name, *(f"  {key}: {value:.3g}" for key, value in values.items()), sep="\n")
    record = provenance() | {"seeds": args.seeds, "figures": figures, "accuracies": accuracies}
    write_atomically(args.output / "results.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    draw(gcns, laplacians, accuracies, args.output / "graph_gradient_scarcity.png")


if __name__ == "__main__":
    main()
