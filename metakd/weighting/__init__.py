"""Weight models: any `nn.Module` `(features (B, F), batch) -> (B, M)`; these are the usual ones."""

from metakd.weighting.loss_mlp import LossMLP
from metakd.weighting.rectified import Rectified
from metakd.weighting.tables import ClassTable, SampleTable
from metakd.weighting.term_scalars import TermScalars

__all__ = ["ClassTable", "LossMLP", "Rectified", "SampleTable", "TermScalars"]
