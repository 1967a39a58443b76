"""Distil gradient-boosted trees into a small network on imbalanced medical records: no images, no torch teacher.

    python examples/tabular_imbalance.py --seeds 5 --output runs/tabular_imbalance

scikit-learn's breast-cancer records, 30 measurements of a tumour, cut to 12 malignant among 237 benign training rows;
all other rows are half malignant. Each batch brings the teacher's log-probabilities, which are logits, as
`Batch(teacher=...)`; out-of-fold predictions, for trees know their own training rows by heart.

    ce, kd, bskd    cross-entropy; plus the teacher's probabilities; the same with balanced softmax for cross-entropy
    bikd            both weighted for each row, so that a step with these weights suits 10 + 10 held-out meta rows
    ... + meta      the meta rows are training rows, the teacher's too: the other use of them, which BiKD has to beat

Each method takes, seed by seed, the best of three learning rates, times two values of what is its own, by the
cross-entropy of validation rows that nothing is trained on. The test rows, the same for all seeds, decide nothing.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler
from torch import nn

from metakd import Batch, learned_weights, plots, recipes
from metakd.longtail import Groups, evaluate, provenance
from metakd.longtail.checkpoint import write_atomically
from metakd.terms import BalancedSoftmax, CrossEntropy, SoftTarget

METHODS = ("ce", "kd", "bskd", "bikd", "ce + meta", "kd + meta", "bskd + meta")
METRICS = {"accuracy": "balanced accuracy (%)", "ece": "calibration error (%)", "loss": "cross-entropy (nats)"}


def scores(model, batch):
    """Balanced accuracy (both classes are as many), calibration error of 15 bins, cross-entropy; by torchmetrics."""
    found = evaluate(model, [(batch.inputs, batch.targets, None)], Groups("", many=(1,), medium=(), few=(0,)))
    return {"accuracy": found.overall, "ece": found.ece, "loss": found.loss}


def cut(seed, with_meta=False):
    """Cut the rows; returns a batch of each kind, the training rows' with the trees' outputs, and the trees' scores."""
    x, y = load_breast_cancer(return_X_y=True)  # 0 is malignant
    test, meta, validation, train = [], [], [], []
    for label, training in ((0, 12), (1, 237)):
        rows = np.random.default_rng(0).permutation(np.flatnonzero(y == label))
        test.extend(rows[:80])
        rows = np.random.default_rng(seed).permutation(rows[80:])
        meta.extend(rows[:10])
        validation.extend(rows[10:40])
        train.extend(rows[40 : 40 + training])
    train += meta * with_meta
    trees = GradientBoostingClassifier(subsample=0.5, random_state=seed)
    outputs = torch.tensor(cross_val_predict(trees, x[train], y[train], method="predict_log_proba")).float()
    answers = torch.tensor(trees.fit(x[train], y[train]).predict_log_proba(x[test])).float()
    x, y = torch.tensor(StandardScaler().fit(x[train]).transform(x)).float(), torch.tensor(y)
    rows = {"meta": meta, "validation": validation, "test": test}
    batches = {name: Batch(x[chosen], y[chosen]) for name, chosen in rows.items()}
    batches["train"] = Batch(x[train], y[train], outputs)
    return batches, scores(nn.Identity(), Batch(answers, y[test]))


def train(method, batches, seed, epochs, lr, alpha=0.0, weight_lr=0.0):
    """Train a student; returns it and, for BiKD, the balancer."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    hard, soft, balancer = CrossEntropy(), SoftTarget(temperature=1.0), None
    if "bskd" in method:
        hard = BalancedSoftmax(batches["train"].targets.bincount())
    elif method == "bikd":
        balancer = recipes.bikd(student, None, optimizer=optimizer, temperature=1.0, accumulate=1, lr=weight_lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(batches["train"].targets)).split(32):
            batch = Batch(*(part[rows] for part in batches["train"][:3]))
            if balancer is None:
                outputs = student(batch.inputs)
                loss = ((1 - alpha) * hard(outputs, batch) + alpha * soft(outputs, batch)).mean()
            else:
                loss = balancer(batch, batches["meta"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student, balancer


def best(method, batches, seed, epochs):
    """The record of the setting with the lowest cross-entropy of the validation rows, and its balancer."""
    own = [{"weight_lr": 0.01}, {"weight_lr": 0.05}] if method == "bikd" else [{"alpha": 0.2}, {"alpha": 0.5}]
    found = []
    for lr, more in product((0.003, 0.01, 0.03), [{}] if method.startswith("ce") else own):
        student, balancer = train(method, batches, seed, epochs, lr, **more)
        record = {"setting": {"lr": lr} | more, "validation": scores(student, batches["validation"])}
        found.append((record | {"test": scores(student, batches["test"])}, balancer))
    return min(found, key=lambda one: one[0]["validation"]["loss"])


def draw(runs, learned, path):
    """The scores of all seeds, above the weights that BiKD learned with the first one."""
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    for panel, key in zip(grid[0], ("accuracy", "loss"), strict=True):
        for place, (name, records) in enumerate(runs.items()):
            values = [record["test"][key] for record in records]
            colour = "#D55E00" if name == "bikd" else "#009E73" if "meta" in name else "#0072B2"
            panel.plot(values, [place] * len(values), "o", color=colour, alpha=0.4)
            panel.plot(np.mean(values), place, "|", color=colour, markersize=22, markeredgewidth=3)
        panel.set_yticks(range(len(runs)), list(runs))
        panel.set(xlabel=f"test {METRICS[key]}: seeds, and their mean", ylim=(len(runs) - 0.4, -0.6))
    ends = (1.05 * learned.features.amax(0)).tolist()
    plots.weights_by_loss(learned.balancer, learned.features, limits=ends, title=None, axes=grid[1])
    for panel in grid[1]:
        panel.plot(*learned.features[learned.targets == 0].T, "X", color="#D55E00", label="malignant ones")
        panel.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=120)


def main():
    """Run all methods with all seeds; print the table, write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/tabular_imbalance"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, learned = {}, []
    for seed in range(args.seeds):
        for with_meta in (False, True):
            batches, teacher = cut(seed, with_meta)
            runs.setdefault("trees" + " + meta" * with_meta, []).append({"test": teacher})
            for method in (name for name in METHODS if ("meta" in name) == with_meta):
                record, balancer = best(method, batches, seed, args.epochs)
                runs.setdefault(method, []).append(record)
                if balancer is not None:
                    learned.append(learned_weights(balancer, [batches["train"]]))
    print(f"test rows, mean ± std of {args.seeds} seeds (in how many of them bikd is better)")
    print(" " * 12, *(f"{label:>24}" for label in METRICS.values()))
    found = {name: np.array([[one["test"][key] for key in METRICS] for one in runs[name]]) for name in runs}
    for name, values in found.items():
        better = ((found["bikd"] - values) * (1, -1, -1) > 0).sum(0)
        cells = zip(values.mean(0), values.std(0), better, strict=True)
        print(f"{name:12}", *(f"{f'{mean:.2f} ± {std:.2f} ({wins})':>24}" for mean, std, wins in cells))
    record = provenance() | {"seeds": args.seeds, "epochs": args.epochs, "methods": runs}
    record |= {"weights by class (malignant, benign) and term": [one.by_class(2).tolist() for one in learned]}
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "results.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    draw(runs, learned[0], args.output / "tabular_imbalance.png")


if __name__ == "__main__":
    main()
