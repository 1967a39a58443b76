"""Distil a teacher into a small student on long-tailed images: CE, KD and BiKD side by side.

    python examples/cifar_lt_bikd.py                                         # handwritten digits, no network
    python examples/cifar_lt_bikd.py --dataset cifar10 --imbalance 50        # downloads CIFAR-10
    python examples/cifar_lt_bikd.py --dataset folder --data-root pictures   # pictures/{train,test}/<class>/*

The loop in `train` is the one you would write yourself; the bilevel loss balancing of BiKD (Nguyen, Phan, Ta,
PAKDD 2026) is the lines that say `balancer` or `weight`. The teacher sees the long-tailed training images
only and stays in eval mode; accuracies are those of the last epoch on the test images, which decide nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import MultiStepLR
from tqdm import tqdm

from metakd import Batch, BilevelLossBalancer, MetaKDError, learned_weights, terms, weighting
from metakd.estimators import Adjoint, OneStep
from metakd.longtail import (
    Checkpoint,
    LongTailed,
    Run,
    build_model,
    evaluate,
    fresh_folder,
    group_classes,
    load_images,
    load_weights,
    summary,
    write_report,
)

METHODS = ("ce", "kd", "bskd", "bikd")
CIFAR = {  # the paper's, with 1000 / C validation images a class
    "imbalance": 50.0, "methods": METHODS, "teacher": "resnet32x4", "student": "resnet8x4",
    "teacher_epochs": 240, "epochs": 120, "batch_size": 100, "lr": 0.1,
    "alpha": 0.5, "accumulate": 5, "weighting_lr": 1e-3,
}  # fmt: skip
DIGITS = {  # chosen on validation images; one thread, for so small a network gains nothing from a second one
    "imbalance": 20.0, "methods": ["ce", "kd", "bikd"], "teacher": "convnet16", "student": "mlp32",
    "teacher_epochs": 60, "epochs": 150, "batch_size": 32, "lr": 0.05,
    "alpha": 0.5, "accumulate": 1, "weighting_lr": 1e-3, "validation_per_class": 10, "threads": 1,
}  # fmt: skip


def train(name, method, model, teacher, data, args, epochs):
    """Train `model` by one of the methods; returns its run and, for BiKD, the balancer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    milestones = [epochs * 2 // 3, epochs * 5 // 6]
    scheduler = MultiStepLR(optimizer, milestones)
    hard = terms.BalancedSoftmax(data.counts) if method == "bskd" else terms.CrossEntropy()
    soft = terms.SoftTarget(temperature=4.0)

    balancer = weight_optimizer = weight_scheduler = None
    if method == "bikd":
        hidden = (64, 64) if args.dataset == "cifar100" else (64,)
        weight_model = weighting.LossMLP(2, 2, hidden=hidden).to(args.device)
        weight_optimizer = torch.optim.Adam(weight_model.parameters(), args.weighting_lr, weight_decay=1e-4)
        weight_scheduler = MultiStepLR(weight_optimizer, milestones, gamma=0.8)
        balancer = BilevelLossBalancer(
            model,
            {"hard": hard, "soft": soft},
            optimizer=optimizer,
            teacher=teacher,
            weighting=weight_model,
            weighting_optimizer=weight_optimizer,
            accumulate=args.accumulate,
            inner="sgd" if args.inner_steps == 1 else "mirror",  # several steps ahead: those the student will take
            estimator=OneStep() if args.inner_steps == 1 else Adjoint(),
        )

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts |= {"balancer": balancer, "weight_scheduler": weight_scheduler}
    checkpoint = Checkpoint(args.output / f"{name}.pt", settings(name, method, data, args, epochs), parts)
    history = checkpoint.load() if args.resume else []  # one entry for each epoch that is behind us
    groups = group_classes(data.counts)
    steps = len(data.train)
    bar = tqdm(desc=title(name, args), total=epochs * steps, initial=len(history) * steps, mininterval=args.refresh)
    for epoch in range(len(history), epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        meta_batches = data.validation.endless(epoch)
        batches = data.train.epoch(epoch)
        if balancer is not None and args.inner_steps > 1:
            batches = balancer.windows(batches, meta_batches, args.inner_steps)
        for batch in batches:
            if balancer is not None and args.inner_steps > 1:
                loss = balancer.loss(batch)
            elif balancer is not None:
                loss = balancer(batch, next(meta_batches))
            else:
                inputs, targets, _ = batch
                with torch.no_grad():
                    batch = Batch(inputs, targets, teacher=teacher(inputs) if teacher else None)
                outputs = model(inputs)
                loss = hard(outputs, batch).mean()
                if teacher:
                    loss = (1 - args.alpha) * loss + args.alpha * soft(outputs, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            bar.update()
        scheduler.step()
        if weight_scheduler is not None:
            weight_scheduler.step()
        entry = {"epoch": epoch + 1, "seconds": time.perf_counter() - started, "train_loss": total / steps}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == epochs:
            test = evaluate(model, data.test.plain(), groups)
            validation = evaluate(model, data.validation.plain(), groups)
            entry |= {"test_loss": test.loss, "test_accuracy": test.overall}
            entry |= {"validation_accuracy": validation.overall}
            bar.set_postfix({"loss": f"{total / steps:.3f}", "test": f"{test.overall:.1f}%"}, refresh=False)
        history.append(entry)
        checkpoint.save(history)
    bar.close()
    return Run(history, evaluate(model, data.test.plain(), groups)), balancer


def title(name, args):
    """The network's name and number; behind it the bar shows how long the network still takes."""
    networks = ["teacher", *args.methods][bool(args.teacher_checkpoint) :]
    return f"{name}, network {networks.index(name) + 1} of {len(networks)}"


def settings(name, method, data, args, epochs):
    """All that decides the numbers of one network's training: a checkpoint with others is not taken up."""
    keys = ["dataset", "imbalance", "seed", "batch_size", "lr", "evaluate_every", "teacher"]
    if name != "teacher":
        keys += ["student", "teacher_checkpoint" if args.teacher_checkpoint else "teacher_epochs"]
        keys += ["alpha"] * (method in ("kd", "bskd"))
        keys += ["accumulate", "weighting_lr", "inner_steps"] * (method == "bikd")
    return {key: getattr(args, key) for key in keys} | {"epochs": epochs, "counts": list(data.counts)}


def main():
    """Load the data, train the teacher and the students, write the results."""
    args = parse_arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if not args.resume:
        fresh_folder(args.output, ["teacher", *METHODS])
    images = load_images(args.dataset, args.data_root)
    data = LongTailed.cut(
        images,
        args.imbalance or None,
        batch_size=args.batch_size,
        validation_per_class=args.validation_per_class,
        seed=args.seed,
        device=args.device,
    )
    print(f"Data: {data.describe()}")
    print(f"Teacher {args.teacher}, student {args.student}, seed {args.seed}, on {args.device}")

    def network(name):
        torch.manual_seed(args.seed)  # every student starts from the same parameters
        size = {"channels": images.train.shape[1], "size": images.train.shape[2]}
        model = build_model(name, classes=len(data.classes), **size)
        return model.to(args.device, memory_format=torch.channels_last)

    network(args.student)  # a misspelt name shall not wait until the teacher is trained
    runs, learned = {}, None
    teacher = network(args.teacher)
    if args.teacher_checkpoint:
        load_weights(teacher, Path(args.teacher_checkpoint))
        runs["teacher"] = Run([], evaluate(teacher, data.test.plain(), group_classes(data.counts)))
    else:
        runs["teacher"], _ = train("teacher", "ce", teacher, None, data, args, args.teacher_epochs)
    teacher.eval().requires_grad_(False)
    for method in args.methods:
        student = network(args.student)
        helper = None if method == "ce" else teacher
        runs[method], balancer = train(method, method, student, helper, data, args, args.epochs)
        if balancer is not None:
            learned = learned_weights(balancer, data.train.plain())

    written = write_report(args.output, runs, data, arguments=vars(args), learned=learned)
    print(f"\n{summary(runs, data)}\n\nWritten:", *written, sep="\n  ")


def positive(text):
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_arguments():
    """Read the command line; what is not given comes from the data set's preset."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--dataset", choices=["digits", "cifar10", "cifar100", "folder"], default="digits")
    add("--data-root", type=Path, help="where the images are (cifar10, cifar100: where to download them to)")
    add("--imbalance", type=float, help="largest over smallest class; 0 keeps the data's own class sizes")
    add("--methods", nargs="+", choices=METHODS, help="bskd: KD with balanced softmax")
    add("--teacher", help="resnet<depth>[x<widening>], convnet<width>, mlp<hidden>, torchvision:<name> or timm:<name>")
    add("--teacher-checkpoint", metavar="FILE", help="its weights, .pt or .safetensors; it is not trained")
    add("--student", help="likewise")
    add("--teacher-epochs", type=positive)
    add("--epochs", type=positive, help="of each student")
    add("--batch-size", type=positive)
    add("--lr", type=float, help="of SGD; x0.1 after 2/3 and 5/6 of the epochs")
    add("--alpha", type=float, help="share of the soft targets in KD; BiKD learns it")
    add("--accumulate", type=positive, help="BiKD's k: hypergradients averaged for a step of the weight model")
    add("--inner-steps", type=positive, default=1, metavar="K", help="steps that BiKD looks ahead; the paper's is 1")
    add("--weighting-lr", type=float, help="of the weight model's Adam")
    add("--validation-per-class", type=positive, help="default: 1000 / number of classes; 10 for digits")
    add("--evaluate-every", type=positive, default=1, metavar="EPOCHS")
    add("--seed", type=int, default=0)
    add("--threads", type=positive, help="default: torch's choice")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="default: runs/<dataset>")
    add("--resume", action="store_true", help="continue an interrupted run in --output, to the same numbers")
    args = parser.parse_args()
    for key, value in (DIGITS if args.dataset == "digits" else CIFAR).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.output = args.output or Path("runs") / args.dataset
    args.refresh = 0.1 if sys.stderr.isatty() else 60
    return args


if __name__ == "__main__":
    try:
        main()
    except MetaKDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues it", file=sys.stderr)
        sys.exit(130)
