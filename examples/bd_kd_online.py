"""BD-KD: a student and its teacher learn together, and each sample decides between two divergences.

    python examples/bd_kd_online.py --seeds 10 --temperature 1 --output runs/bd_kd

Amara et al. (2022, arXiv 2212.12965) claim better accuracy and calibration than deep mutual learning (Zhang et al.,
2018). Here on scikit-learn's digits with wrong labels, over the very same splits, noise, batches and initial networks:

    dml       student: CE + T^2 KL(p || q), p the teacher's softened probabilities, q the student's
    dml x3    CE + 3 T^2 KL(p || q): as much distillation as there is in the following ones
    bd_kd     CE + T^2 (nu_i KL(p || q) + delta_i KL(q || p)), 1 or 2 each, by whose entropy is larger for the sample
    swapped   the same with nu and delta exchanged
    ungated   the same with 1.5 for both: the second divergence without the gate
    learned   the three weights of each sample learned by metakd, on held-out labels that are as noisy as the others
    dml, 600  dml without the 200 samples that `learned` holds out; the others train on them

The teacher minimises CE + T^2 KL(q || p) in all of them; it trains in the same loop, and its outputs go into the batch.
What came out, see docs/systems/bd_kd.md: calibration gains from the second divergence at T = 1, gated or not; accuracy
does not, and at T = 4 nothing does.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

from metakd import Batch, BilevelLossBalancer
from metakd.longtail import evaluate, group_classes, provenance
from metakd.longtail.checkpoint import write_atomically
from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget
from metakd.weighting import EntropyGate, LossMLP, entropies

METHODS = ("dml", "dml x3", "bd_kd", "swapped", "ungated", "learned", "dml, 600")
METRICS = {"accuracy": "accuracy (%)", "ece": "ECE, 15 bins (%)", "nll": "NLL"}


def noisy_digits(seed, noise):
    """The digits in a random order, 600 with 200 held-out ones behind them for training; their labels partly wrong."""
    random = torch.Generator().manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=random)
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    other = (y + torch.randint(1, 10, y.shape, generator=random)) % 10
    wrong = torch.rand(y.shape, generator=random) < noise
    wrong[800:] = False
    return x, torch.where(wrong, other, y)


class Constant(nn.Module):
    """The same weights for every sample."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, features, batch):
        """Return (B, M) weights."""
        return self.weights.expand(len(features), -1)


def weighting_of(method):
    """A method's weights of the three terms: what a balancer needs for them."""
    if method == "learned":
        model = LossMLP(3, 3)
        moved_by = torch.optim.Adam(model.parameters(), lr=3e-3)
        return {"weighting": model, "weighting_optimizer": moved_by, "features": lambda losses, *_: losses}
    if method == "bd_kd":
        return {"weighting": EntropyGate(low=1.0, high=2.0), "features": entropies}
    if method == "swapped":  # each sees the other's entropy as its own
        return {"weighting": EntropyGate(low=1.0, high=2.0), "features": lambda *seen: entropies(*seen).flip(1)}
    return {"weighting": Constant(1.0, *{"dml x3": (3.0, 0.0), "ungated": (1.5, 1.5)}.get(method, (1.0, 0.0)))}


def train(method, x, y, seed, args):
    """Train both networks together; returns the student."""
    torch.manual_seed(seed)  # every method from the same networks
    student = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in (student, teacher)]
    hard, soft, reverse = CrossEntropy(), SoftTarget(args.temperature), ReverseSoftTarget(args.temperature)
    terms = {"hard": hard, "soft": soft, "reverse": reverse}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizers[0], **weighting_of(method))
    size = 600 if method in ("learned", "dml, 600") else 800
    random = torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for rows in torch.randperm(size, generator=random).split(50):
            outputs = teacher(x[rows])
            batch = Batch(x[rows], y[rows], teacher=outputs)  # no term sends a gradient into it
            held_out = torch.randint(600, 800, (50,), generator=random)
            meta_batch = Batch(x[held_out], y[held_out]) if method == "learned" else None
            loss = balancer(batch, meta_batch)
            own = Batch(x[rows], y[rows], teacher=student(x[rows]))  # roles exchanged
            loss = loss + (hard(outputs, own) + soft(outputs, own)).mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return student


def paired(values, reference):
    """Mean difference over the seeds, and its 95 % confidence interval."""
    difference = np.subtract(values, reference)
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    return dict(zip(("mean", "low", "high"), (difference.mean() + half * np.array([0, -1, 1])).tolist(), strict=True))


def draw(runs, differences, args):
    """Each metric's paired differences from dml: one dot a seed, their mean and its confidence interval."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    title = f"Digits, {args.noise:.0%} wrong labels, T = {args.temperature:g}: the student minus mutual learning's"
    figure.suptitle(title)
    for axes, (metric, label) in zip(figure.subplots(1, 3, sharey=True), METRICS.items(), strict=True):
        axes.axvline(0, color="0.6", lw=1)
        for row, method in enumerate(METHODS[1:]):
            dots = np.subtract(runs[method][metric], runs["dml"][metric])
            axes.plot(dots, [row] * len(dots), "o", color=f"C{row}", alpha=0.4)
            found = differences[method][metric]
            axes.plot([found["low"], found["high"]], [row, row], color="k", lw=2)
            axes.plot(found["mean"], row, "kD", ms=6)
        axes.set(xlabel=f"difference in {label}", title=f"{'higher' if metric == 'accuracy' else 'lower'} is better")
        axes.set_yticks(range(len(METHODS) - 1), METHODS[1:])
        axes.locator_params(axis="x", nbins=6)
    axes.invert_yaxis()
    return figure


def main():
    """Train all students, print what came out beside the claim, write the numbers and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--noise", type=float, default=0.15, help="share of wrong labels")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("runs/bd_kd"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {method: {metric: [] for metric in METRICS} for method in METHODS}
    for seed in range(args.seeds):
        x, y = noisy_digits(seed, args.noise)
        for method in METHODS:
            student = train(method, x, y, seed, args)
            scores = evaluate(student, [(x[800:], y[800:], None)], group_classes([80] * 10))
            for metric, value in zip(METRICS, (scores.overall, scores.ece, scores.loss), strict=True):
                runs[method][metric].append(value)
    differences = {
        name: {metric: paired(run[metric], runs["dml"][metric]) for metric in METRICS} for name, run in runs.items()
    }
    print(
        "Claim: bd_kd has higher accuracy and lower calibration error than dml. Mean, and paired difference from dml:"
    )
    for name in METHODS:
        found = [(np.mean(runs[name][metric]), differences[name][metric]) for metric in METRICS]
        columns = (f"{mean:7.3f} ({d['mean']:+.3f}: {d['low']:+.3f} to {d['high']:+.3f})" for mean, d in found)
        print(f"  {name:9}", *columns)
    record = provenance() | {"seeds": args.seeds, "epochs": args.epochs, "noise": args.noise}
    record |= {"temperature": args.temperature, "runs": runs, "minus_dml": differences}
    write_atomically(args.output / "results.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    draw(runs, differences, args).savefig(args.output / "bd_kd.png", dpi=110)
    print("Written:", *sorted(args.output.iterdir()))


if __name__ == "__main__":
    main()
