"""Distil a teacher into a small student on long-tailed images: CE, KD, fixed mixtures and BiKD side by side.

    python examples/cifar_lt_bikd.py                                         # digits, from sources that may mislabel
    python examples/cifar_lt_bikd.py --sources 0                             # digits with right labels
    python examples/cifar_lt_bikd.py --dataset cifar10 --imbalance 50        # downloads CIFAR-10
    python examples/cifar_lt_bikd.py --dataset folder --data-root pictures   # pictures/{train,test}/<class>/*

The loop in `train` is the one you would write yourself; the bilevel loss balancing of BiKD (Nguyen, Phan, Ta,
PAKDD 2026) is the lines that say `balancer` or `weight`. With sources it learns a weight for each source and term, and
the few images with right labels that judge the weights are trained on as well. The teacher sees the training images
only and stays in eval mode; accuracies are those of the last epoch on the test images, which decide nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import MultiStepLR
from tqdm import tqdm

from metakd import (
    BilevelLossBalancer,
    History,
    MetaKDError,
    learned_weights,
    meta_in_training,
    terms,
    weighting,
)
from metakd.batch import as_batch
from metakd.estimators import Adjoint, OneStep
from metakd.longtail import (
    Checkpoint,
    LongTailed,
    Mixture,
    Run,
    build_model,
    evaluate,
    fresh_folder,
    from_sources,
    group_classes,
    load_images,
    load_weights,
    summary,
    write_report,
)

METHODS = ("ce", "kd", "bskd", "bikd")  # without sources
WITH_SOURCES = {
    "ce": "the labels alone",
    "kd": "labels and teacher, half each",
    "kd-meta": "the same, the meta images (right labels) among the training images",
    "fixed": "the best of ten fixed mixtures with the meta images, chosen by other images",
    "bikd": "a learned weight for each source and term, with the meta images",
    "mean": "control: BiKD's weights replaced by their mean",
    "meta": "control: the meta images alone",
    "oracle": "control: the right sources alone, which nobody knows, with the meta images",
}
CIFAR = {  # the paper's, with 1000 / C validation images a class
    "imbalance": 50.0, "sources": 0, "methods": METHODS, "teacher": "resnet32x4", "student": "resnet8x4",
    "teacher_epochs": 240, "epochs": 120, "batch_size": 100, "lr": 0.1, "alpha": 0.5, "accumulate": 5,
    "evaluate_every": 1,
}  # fmt: skip
DIGITS = {  # chosen on validation images; one thread, for so small a network gains nothing from a second one
    "imbalance": 20.0, "sources": 10, "methods": ["ce", "kd", "bikd"], "teacher": "convnet16", "student": "mlp32",
    "teacher_epochs": 60, "epochs": 150, "batch_size": 32, "lr": 0.05, "alpha": 0.5, "accumulate": 1,
    "validation_per_class": 10, "threads": 1, "evaluate_every": 1,
}  # fmt: skip
DIGITS_WITH_SOURCES = {
    "imbalance": 2.0, "teacher_epochs": 30, "epochs": 30, "validation_per_class": 10, "evaluate_every": 5,
}  # fmt: skip


def train(name, method, model, teacher, data, args, epochs, mixture=None):
    """Train `model`, with a fixed mixture or by BiKD; returns its run, BiKD's balancer, the history of its weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    milestones = [epochs * 2 // 3, epochs * 5 // 6]
    scheduler = MultiStepLR(optimizer, milestones)
    hard = terms.BalancedSoftmax(data.counts) if method == "bskd" else terms.CrossEntropy()
    soft = terms.SoftTarget(temperature=4.0)

    balancer = weight_scheduler = seen = None
    if method == "bikd":
        weight_model, weight_optimizer = weight_model_of(args)
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
        seen = History(balancer.terms, classes=args.sources, by="source") if args.sources else None

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts |= {"balancer": balancer, "weight_scheduler": weight_scheduler, "history": seen}
    checkpoint = Checkpoint(args.output / f"{name}.pt", settings(name, method, data, args, epochs, mixture), parts)
    history = checkpoint.load() if args.resume else []  # one entry for each epoch that is behind us
    groups = group_classes(data.counts)
    steps = len(data.train)
    with_meta = bool(args.sources) if balancer is not None else mixture is not None and mixture.meta is not None
    bar = tqdm(desc=title(name, args), total=epochs * steps, initial=len(history) * steps, mininterval=args.refresh)
    for epoch in range(len(history), epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        pairs = zip(data.train.epoch(epoch), data.validation.endless(epoch), strict=False)
        if with_meta:  # other meta images than those that judge the step
            pairs = meta_in_training(data.train.epoch(epoch), data.validation.endless(epoch))
        if balancer is not None and args.inner_steps > 1:
            batches = (batch for batch, _ in pairs)
            windows = balancer.windows(batches, data.validation.endless(epoch), args.inner_steps)
            pairs = ((batch, None) for batch in windows)
        for batch, meta_batch in pairs:
            if balancer is not None and args.inner_steps > 1:
                loss = balancer.loss(batch)
            elif balancer is not None:
                loss = balancer(batch, meta_batch)
            elif teacher is None:
                batch = as_batch(batch)
                loss = hard(model(batch.inputs), batch).mean()
            else:
                batch = as_batch(batch)
                with torch.no_grad():
                    batch = batch._replace(teacher=teacher(batch.inputs))
                outputs = model(batch.inputs)
                losses = torch.stack([hard(outputs, batch), soft(outputs, batch)], dim=1)
                loss = (mixture(batch).to(losses) * losses).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            bar.update()
            if seen is not None:
                seen.add(balancer.report, batch.columns["source"])
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
    return Run(history, evaluate(model, data.test.plain(), groups)), balancer, seen


def weight_model_of(args):
    """The weight model and its optimizer: a weight for each source and term, or BiKD's network."""
    if args.sources:  # the meta images have no source; they count in full
        weight_model = weighting.Pinned(weighting.GroupTable("source", args.sources, terms=2), weight=1.0)
        return weight_model.to(args.device), torch.optim.Adam(weight_model.parameters(), args.weighting_lr or 0.1)
    weight_model = weighting.LossMLP(2, 2, hidden=(64, 64) if args.dataset == "cifar100" else (64,)).to(args.device)
    return weight_model, torch.optim.Adam(weight_model.parameters(), args.weighting_lr or 1e-3, weight_decay=1e-4)


def title(name, args):
    """The network's name and number; behind it the bar shows how long the network still takes."""
    return f"{name}, network {args.networks.index(name) + 1} of {len(args.networks)}"


def settings(name, method, data, args, epochs, mixture):
    """All that decides the numbers of one network's training: a checkpoint with others is not taken up."""
    keys = ["dataset", "imbalance", "sources", "seed", "batch_size", "lr", "evaluate_every", "teacher"]
    if name != "teacher":
        keys += ["student", "teacher_checkpoint" if args.teacher_checkpoint else "teacher_epochs"]
        keys += ["accumulate", "weighting_lr", "inner_steps"] * (method == "bikd")
    found = {key: getattr(args, key) for key in keys} | {"epochs": epochs, "counts": list(data.counts)}
    if mixture is not None:
        found["mixture"] = [None if part is None else part.tolist() for part in mixture]
    return found


def mixture_of(method, args, sourced, seen):
    """The fixed weights of label and teacher for each source, and for the meta images if they are trained on."""
    rows = max(args.sources, 1)
    label, kd = torch.tensor([1.0, 0.0]), torch.tensor([1 - args.alpha, args.alpha])
    if method == "kd-meta":
        return Mixture(kd.expand(rows, 2), kd)
    if method == "mean":
        return Mixture(seen.over_time("weights", range(rows)).mean(0).float().expand(rows, 2), torch.ones(2))
    if method == "meta":  # twice, for the mean is over the training images as well
        return Mixture(torch.zeros(rows, 2), 2 * label)
    if method == "oracle":
        right = torch.zeros(rows, 1)
        right[sourced.of_kind("right")] = 1.0
        return Mixture(right * label, label)
    return Mixture(kd.expand(rows, 2))


def fixed_mixtures(args):
    """Ten mixtures to choose from: two shares of the label, three weights of the training images, then random ones."""
    for share in (0.5, 1.0):
        for weight in (1.0, 0.3, 0.1):  # the meta images have 1
            mixture = torch.tensor([share, 1 - share])
            yield Mixture(weight * mixture.expand(args.sources, 2), mixture)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(4):
        yield Mixture(torch.rand(args.sources, 2, generator=generator), torch.ones(2))


def main():
    """Load the data, train the teacher and the students, write the results."""
    args = parse_arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if not args.resume:
        fresh_folder(args.output, args.networks)
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
    sourced = from_sources(data, args.sources, seed=args.seed) if args.sources else None
    if sourced is not None:
        data = sourced.data
        print(f"Labels: {sourced.describe()}")
    print(f"Teacher {args.teacher}, student {args.student}, seed {args.seed}, on {args.device}")

    def network(name):
        torch.manual_seed(args.seed)  # every student starts from the same parameters
        size = {"channels": images.train.shape[1], "size": images.train.shape[2]}
        model = build_model(name, classes=len(data.classes), **size)
        return model.to(args.device, memory_format=torch.channels_last)

    network(args.student)  # a misspelt name shall not wait until the teacher is trained
    runs, learned, seen, groups = {}, None, None, group_classes(data.counts)
    teacher = network(args.teacher)
    if args.teacher_checkpoint:
        load_weights(teacher, Path(args.teacher_checkpoint))
        runs["teacher"] = Run([], evaluate(teacher, data.test.plain(), groups))
    else:
        runs["teacher"], *_ = train("teacher", "ce", teacher, None, data, args, args.teacher_epochs)
    teacher.eval().requires_grad_(False)

    def student(name, method, mixture=None):
        model, helper = network(args.student), None if method == "ce" else teacher
        run, *found = train(name, method, model, helper, data, args, args.epochs, mixture)
        if sourced is not None:
            run.history[-1]["choice_accuracy"] = evaluate(model, sourced.choice.plain(), groups).overall
        return run, *found

    for method in args.methods:
        if method == "bikd":
            runs[method], balancer, seen = student(method, method)
            learned = learned_weights(balancer, data.train.plain()) if seen is None else None
        elif method == "fixed":
            tried = [student(f"fixed-{k}", method, mixture)[0] for k, mixture in enumerate(fixed_mixtures(args))]
            runs[method] = max(tried, key=lambda run: run.history[-1]["choice_accuracy"])
        else:
            runs[method], *_ = student(method, method, mixture_of(method, args, sourced, seen))

    figures = {"learned": learned, "seen": seen, "sourced": sourced}
    written = write_report(args.output, runs, data, arguments=vars(args), **figures)
    rows = "".join(f"\n{method:<8} {text}" for method, text in WITH_SOURCES.items() if sourced and method in runs)
    print(f"\n{summary(runs, data)}\n{rows}\n\nWritten:", *written, sep="\n  ")


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
    add("--sources", type=int, help="of the training images, seven in ten mislabel; 0: right labels; 10 for digits")
    add("--imbalance", type=float, help="largest over smallest class; 0 keeps the data's own class sizes")
    add(
        "--methods",
        nargs="+",
        choices=[*dict.fromkeys([*METHODS, *WITH_SOURCES])],
        help="bskd: KD with balanced softmax",
    )
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
    add("--weighting-lr", type=float, help="of the weight model's Adam; default: 1e-3, and 0.1 with sources")
    add(
        "--validation-per-class",
        type=positive,
        help="default: 1000 / number of classes; with sources half to choose by",
    )
    add("--evaluate-every", type=positive, metavar="EPOCHS")
    add("--seed", type=int, default=0)
    add("--threads", type=positive, help="default: torch's choice")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="default: runs/<dataset>")
    add("--resume", action="store_true", help="continue an interrupted run in --output, to the same numbers")
    args = parser.parse_args()
    preset = DIGITS if args.dataset == "digits" else CIFAR
    if args.sources is None:
        args.sources = preset["sources"]
    if args.sources:
        preset = preset | {"methods": list(WITH_SOURCES)} | (DIGITS_WITH_SOURCES if args.dataset == "digits" else {})
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if wrong := [m for m in args.methods if m not in (WITH_SOURCES if args.sources else METHODS)]:
        parser.error(f"--methods {' '.join(wrong)} needs {'--sources 0' if args.sources else '--sources'}")
    if "mean" in args.methods and "bikd" not in args.methods[: args.methods.index("mean")]:
        parser.error("--methods mean needs bikd before it, whose weights it takes the mean of")
    args.networks = ["teacher"] * (args.teacher_checkpoint is None)
    for method in args.methods:
        args.networks += [f"fixed-{k}" for k in range(10)] if method == "fixed" else [method]
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
