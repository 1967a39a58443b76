"""What a balancer learns: history, learned weights, their export, diagnosis, plots, loggers."""

from metakd.monitor import plots, tensorboard
from metakd.monitor.doctor import Diagnosis, diagnose
from metakd.monitor.export import export_weights
from metakd.monitor.history import History
from metakd.monitor.learned_weights import LearnedWeights, learned_weights

__all__ = [
    "Diagnosis",
    "History",
    "LearnedWeights",
    "diagnose",
    "export_weights",
    "learned_weights",
    "plots",
    "tensorboard",
]
