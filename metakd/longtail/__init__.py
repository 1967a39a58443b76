"""Long-tailed images: splits, data sets, small networks, accuracy by group, plots and exact resumption.

Needs the extra ``examples``: torchvision, torchmetrics, scikit-learn and matplotlib, each imported when it is used.
"""

from metakd.longtail import plots
from metakd.longtail.augment import Augment, random_crop_flip
from metakd.longtail.batches import Batches, LongTailed
from metakd.longtail.checkpoint import Checkpoint, fresh_folder
from metakd.longtail.data import DATASETS, Images, load_images
from metakd.longtail.metrics import Groups, Scores, evaluate, group_classes
from metakd.longtail.models import CifarResNet, build_model, load_weights
from metakd.longtail.results import Run, provenance, summary, table, write_report
from metakd.longtail.sources import Mixture, Sourced, from_sources
from metakd.longtail.splits import Split, largest_n_max, long_tail_counts, long_tailed_split

__all__ = [
    "DATASETS",
    "Augment",
    "Batches",
    "Checkpoint",
    "CifarResNet",
    "Groups",
    "Images",
    "LongTailed",
    "Mixture",
    "Run",
    "Scores",
    "Sourced",
    "Split",
    "build_model",
    "evaluate",
    "fresh_folder",
    "from_sources",
    "group_classes",
    "largest_n_max",
    "load_images",
    "load_weights",
    "long_tail_counts",
    "long_tailed_split",
    "plots",
    "provenance",
    "random_crop_flip",
    "summary",
    "table",
    "write_report",
]
