"""Weight models. A weight model is any `nn.Module` `(features (B, F), batch) -> (B, M)`; these are common ones."""

from metakd.weighting.class_aware import ClassAware
from metakd.weighting.entropy_gate import EntropyGate, entropies
from metakd.weighting.loss_mlp import LossMLP
from metakd.weighting.normalised import Normalised
from metakd.weighting.pinned import Pinned
from metakd.weighting.rectified import Rectified
from metakd.weighting.tables import ClassTable, GroupTable, SampleTable
from metakd.weighting.term_scalars import TermScalars

__all__ = [
    "ClassAware",
    "ClassTable",
    "EntropyGate",
    "GroupTable",
    "LossMLP",
    "Normalised",
    "Pinned",
    "Rectified",
    "SampleTable",
    "TermScalars",
    "entropies",
]
