"""The figures and diagnoses of monitoring.md: BiKD on long-tailed digits, as in examples/cifar_lt_bikd.py --sources 0.

python docs/figures.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from metakd import BilevelLossBalancer, History, diagnose, learned_weights, plots, terms
from metakd.longtail import LongTailed, build_model, group_classes, load_images

FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Train a teacher and a student, look on, and draw."""
    torch.set_num_threads(1)
    data = LongTailed.cut(load_images("digits"), 20.0, batch_size=32, validation_per_class=10)
    teacher = network("convnet16")
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(30):
        for inputs, targets, _ in data.train.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), targets).backward()
            optimizer.step()
    teacher.eval()

    student = network("mlp32")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    pair = {"hard": terms.CrossEntropy(), "soft": terms.SoftTarget(temperature=4.0)}
    balancer = BilevelLossBalancer(student, pair, optimizer=optimizer, teacher=teacher)
    history, diagnosis = History(balancer.terms, classes=len(data.classes)), None
    for epoch in range(80):
        if epoch in (2, 40, 79):
            diagnosis = diagnose(balancer, data.train.epoch(epoch), data.validation.endless(epoch), previous=diagnosis)
            print(f"Epoch {epoch}\n\n{diagnosis}\n")
        meta_batches = data.validation.endless(epoch)
        for batch in data.train.epoch(epoch):
            loss = balancer(batch, next(meta_batches))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.add(balancer.report, batch[1])

    FOLDER.mkdir(exist_ok=True)
    groups = group_classes(data.counts)
    shown = {"many": groups.many, "medium": groups.medium, "few": groups.few}
    plots.weights_over_time(history, groups=shown, path=FOLDER / "weights_over_time.png")
    plots.influence_over_time(history, groups=shown, path=FOLDER / "influence_over_time.png")
    learned = learned_weights(balancer, data.train.plain())
    plots.weights_by_loss(balancer, learned.features, path=FOLDER / "weights_by_loss.png")


def network(name: str) -> torch.nn.Module:
    """A network for 8x8 digits."""
    torch.manual_seed(0)
    return build_model(name, classes=10, channels=1, size=8)


if __name__ == "__main__":
    main()
