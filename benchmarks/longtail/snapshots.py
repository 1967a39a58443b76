"""BiKD's weight model as it was after some epochs, with the losses it saw then: as numbers, and drawn."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from metakd import BilevelLossBalancer, learned_weights, plots
from metakd.weighting import LossMLP
from metakd.weighting.features import student_and_teacher

Snapshot = Mapping[str, Any]


def weighs_by_loss(balancer: BilevelLossBalancer) -> bool:
    """Whether the weights are a function of the two losses alone."""
    return balancer.features is student_and_teacher and isinstance(balancer.weighting, LossMLP)


def taken(balancer: BilevelLossBalancer, batches: Iterable[Any]) -> Snapshot:
    """The weight model's parameters, and the losses of three batches' samples."""
    losses = learned_weights(balancer, islice(batches, 3)).features
    state = {name: rounded(value.tolist()) for name, value in balancer.weighting.state_dict().items()}
    return {"parameters": state, "losses": rounded(losses.tolist())}


def rounded(values: Any) -> Any:
    """The same nest of lists, its numbers to four digits."""
    return [rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.4g}")


def model_of(snapshot: Snapshot) -> LossMLP:
    """The weight model of a snapshot."""
    state = {name: torch.tensor(value) for name, value in snapshot["parameters"].items()}
    *hidden, terms = (len(value) for value in state.values() if value.ndim == 1)  # the layers' biases
    model = LossMLP(2, terms, hidden)
    model.load_state_dict(state)
    return model


def draw(snapshots: Mapping[int, Snapshot], terms: Sequence[str], path: Path, *, title: str) -> None:
    """A row of maps for each epoch, the weight of each term over the losses of student and teacher."""
    from matplotlib.figure import Figure  # a machine that only trains may lack it

    losses = {epoch: torch.tensor(snapshot["losses"]) for epoch, snapshot in snapshots.items()}
    limits = torch.cat(list(losses.values())).quantile(0.98, dim=0).tolist()
    figure = Figure(figsize=(1.0 + 4.3 * len(terms), 0.6 + 3.6 * len(snapshots)), layout="constrained")
    figure.suptitle(f"{title} (dots: training samples)")
    panels = figure.subplots(len(snapshots), len(terms), squeeze=False)
    for row, (epoch, snapshot) in zip(panels, snapshots.items(), strict=True):
        names = ["student's cross-entropy (nats)", "teacher's cross-entropy (nats)"]
        model, seen = model_of(snapshot), losses[epoch]
        plots.weights_by_loss(model, seen, terms=terms, features=names, limits=limits, axes=list(row))
        row[0].set_title(f"epoch {epoch}: {row[0].get_title()}")
        row[0].get_legend().remove()  # the same in each row, on top of a map
    figure.savefig(path, dpi=100)
