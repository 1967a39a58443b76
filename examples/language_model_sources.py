"""Train a small language model on sources of unknown quality, with one learned weight for each source or sequence.

    python examples/language_model_sources.py --seeds 5 --output runs/language_model_sources

A causal transformer reads bytes of Python's standard library. Its domain is docstrings. A sixth of the training
sequences are docstrings; the others are comments, code, and what is made of docstrings: letters exchanged, words out of
order, base64. Nothing tells the learner which source is good except 48 clean sequences, the meta set.

    uniform                 all sources count the same
    uniform, longer         the same with as many more steps as the learned weights cost
    random search           the best of random mixtures by the meta set's loss, as many runs as the weights cost
    meta added, meta alone  the meta set is trained on: beside the sources as a seventh one, or without them
    by source, by sequence  weights learned by hypergradients: one for each source; for each sequence from its loss

The score is the loss of held-out docstrings, in bits per byte; no choice is made by it.
"""

import argparse
import ast
import base64
import functools
import io
import json
import math
import random
import sysconfig
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from metakd import Batch, BilevelLossBalancer, History, plots
from metakd.longtail import provenance
from metakd.longtail.checkpoint import write_atomically
from metakd.terms import CrossEntropy, Tokens
from metakd.weighting import GroupTable, LossMLP, Normalised

SOURCES = ("docstrings", "comments", "code", "exchanged letters", "words out of order", "base64")
METHODS = ("uniform", "uniform, longer", "random search", "meta added", "meta alone", "by source", "by sequence")
LENGTH, BATCH, META = 48, 24, 48
EVERY = 2  # steps from one hypergradient to the next
COST = 3  # the mean balanced step in plain ones, rounded up in favour of the others; the table shows the seconds


@functools.cache
def texts():
    """Docstrings, comments and code of the standard library, by file, in an order that no seed changes."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(errors="ignore")
        tree, docs = ast.parse(source), []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                docs.append(ast.get_docstring(node))
                node.body = node.body[1:] or [ast.Pass()]
        words = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [word.string.lstrip("# ") for word in words if word.type == tokenize.COMMENT]
        found.append(("\n".join(docs), "\n".join(comments), ast.unparse(tree)))
    random.Random(0).shuffle(found)
    return tuple(found)


def corrupted(text, kind, chance):
    """A text with a third of its letters exchanged, its words out of order, or in base64."""
    if kind == "exchanged letters":
        letters = "abcdefghijklmnopqrstuvwxyz "
        return "".join(chance.choice(letters) if chance.random() < 0.33 else letter for letter in text)
    if kind == "words out of order":
        words = text.split(" ")
        return " ".join(chance.sample(words, len(words)))
    return base64.b64encode(text.encode()).decode()


def pieces(text, number=None):
    """Sequences of one length, (n, LENGTH + 1) bytes."""
    raw = torch.tensor(list(text.encode("ascii", "ignore")))
    cut = raw[: len(raw) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return cut if number is None else cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:number]]


@functools.cache
def data(seed, each=1200):
    """Training sequences with their sources, the meta set, and held-out docstrings, all of different files."""
    files = list(texts())
    third = len(files) // 3
    held, rest = files[:third], files[third:]
    validation = pieces("\n".join(docs for docs, _, _ in held), 512)
    random.Random(seed).shuffle(rest)
    meta = pieces("\n".join(docs for docs, _, _ in rest[: third // 2]), META)
    rest = rest[third // 2 :]
    chance = random.Random(seed)
    made = ["\n".join(file[kind] for file in rest) for kind in range(3)]
    made += [corrupted(made[0], kind, chance) for kind in SOURCES[3:]]
    parts = [pieces(text, each) for text in made]
    ids = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    return torch.cat(parts), ids, meta, validation


class Transformer(nn.Module):
    """A small causal transformer on bytes."""

    def __init__(self, width=64, depth=2, heads=4):
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def student_of(model, seed):
    """The student: a transformer of this file, or one of Hugging Face that is built from a config."""
    torch.manual_seed(seed)
    if model == "own":
        return Transformer()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes))


def as_batch(rows, ids):
    """Bytes predict the next byte; Hugging Face's labels are the inputs themselves."""
    return Batch(rows[:, :-1], rows[:, 1:], columns={"source": ids})


def bits(student, rows):
    """The loss of sequences in bits per byte."""
    student.eval()
    with torch.no_grad():
        outputs = student(rows[:, :-1])
        z = getattr(outputs, "logits", outputs)
        found = F.cross_entropy(z.flatten(0, 1), rows[:, 1:].flatten()).item() / math.log(2)
    student.train()
    return found


def train(kind, sequences, ids, meta, args, seed, steps, mixture=None):
    """Train a student; `mixture` draws sources in these shares. Returns it, and the history of learned weights."""
    student = student_of(args.model, seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps)
    term, balancer, history = Tokens(CrossEntropy(), shift=False), None, None
    if kind in ("by source", "by sequence"):
        model = GroupTable("source", len(SOURCES), 1) if kind == "by source" else LossMLP(1, 1)
        weighting = Normalised(model)
        balancer = BilevelLossBalancer(
            student,
            {"next byte": term},
            optimizer=optimizer,
            weighting=weighting,
            weighting_optimizer=torch.optim.Adam(weighting.parameters(), lr=0.1 if kind == "by source" else 0.01),
            meta_loss=term,
            inner="mirror",
            every=EVERY,
        )
        history = History(balancer.terms, len(SOURCES), by="source")
    shares = torch.ones(int(ids.max()) + 1) if mixture is None else mixture
    chances = (shares / ids.bincount())[ids]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.multinomial(chances, BATCH, replacement=len(ids) < BATCH, generator=generator)
        batch = as_batch(sequences[rows], ids[rows])
        if balancer is None:
            loss = term(student(batch.inputs), batch).mean()
        else:
            chosen = meta[torch.randperm(len(meta), generator=generator)[:BATCH]]
            loss = balancer(batch, Batch(chosen[:, :-1], chosen[:, 1:]))
            history.add(balancer.report, ids[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return student, history


def searched(sequences, ids, meta, args, seed):
    """The best of COST random mixtures, by the loss of the meta set."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(COST):
        mixture = -torch.rand(len(SOURCES), generator=generator).log()  # uniform over all mixtures
        student, _ = train("uniform", sequences, ids, meta, args, seed, args.steps, mixture)
        found.append((bits(student, meta), student))
    return min(found, key=lambda one: one[0])[1]


def run(method, seed, args):
    """One method with one seed: its record, and the history of its weights if it learns them."""
    torch.set_num_threads(1)
    sequences, ids, meta, validation = data(seed)
    begin, history = time.perf_counter(), None
    if method == "random search":
        student = searched(sequences, ids, meta, args, seed)
    else:
        steps = args.steps * (COST if method == "uniform, longer" else 1)
        if method == "meta added":
            sequences, ids = torch.cat([sequences, meta]), torch.cat([ids, torch.full((len(meta),), len(SOURCES))])
        elif method == "meta alone":
            sequences, ids = meta, torch.zeros(len(meta), dtype=torch.long)
        student, history = train(method, sequences, ids, meta, args, seed, steps)
    seconds = time.perf_counter() - begin
    record = {"bits": bits(student, validation), "meta bits": bits(student, meta), "seconds": round(seconds, 1)}
    if history is not None:
        record["weights"] = history.by_class("weights")[:, 0].tolist()
    return record, history


def draw(found, learned, path):
    """The scores of all seeds, and the learned weights of the first seed over time."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    scores, *panels = figure.subplots(1, 1 + len(learned), squeeze=False)[0]
    for place, records in enumerate(found.values()):
        values = [record["bits"] for record in records]
        scores.plot(values, [place] * len(values), "o", alpha=0.4, color="#0072B2")
        scores.plot(sum(values) / len(values), place, "|", color="#0072B2", markersize=22, markeredgewidth=3)
    scores.set_yticks(range(len(found)), list(found))
    scores.set(xlabel="bits per byte: seeds, and their mean", ylim=(len(found) - 0.4, -0.6))
    for panel, (method, history) in zip(panels, learned.items(), strict=True):
        groups = {name: [number] for number, name in enumerate(SOURCES)}
        plots.weights_over_time(history, groups=groups, axes=panel)
        panel.set_title(f"weights {method}")
    figure.savefig(path, dpi=120)


def summary(found):
    """The scores as lines: mean and standard deviation, what was gained over uniform weights, and the time."""
    bits = {method: torch.tensor([record["bits"] for record in records]) for method, records in found.items()}
    yield f"bits per byte of held-out docstrings, mean ± std of {len(next(iter(bits.values())))} seeds"
    for method, values in bits.items():
        seconds = sum(record["seconds"] for record in found[method]) / len(values)
        line = f"{method:16} {spread(values)}   {seconds:5.1f} s"
        if method != "uniform" and "uniform" in bits:
            gains = bits["uniform"] - values
            line += f"   {spread(gains)} less than uniform, with {int((gains > 0).sum())} of {len(gains)} seeds"
        yield line


def spread(values):
    """Mean and standard deviation."""
    return f"{values.mean():.3f} ± {values.std() if len(values) > 1 else 0.0:.3f}"


def main():
    """Run all methods with all seeds; print the table, write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--model", choices=("own", "huggingface"), default="own")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/language_model_sources"))
    args = parser.parse_args()
    work = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        answers = pool.map(run, *zip(*work, strict=True), [args] * len(work))
        found, learned = {method: [] for method in args.methods}, {}
        for (method, seed), (record, history) in zip(work, answers, strict=True):
            found[method].append(record)
            if history is not None:
                learned.setdefault(method, history)
            print(f"seed {seed}  {method:16} {record['bits']:.3f}", flush=True)
    print("\n".join(summary(found)))
    settings = {name: getattr(args, name) for name in ("seeds", "steps", "lr", "model", "jobs")}
    record = provenance() | settings | {"sources": SOURCES, "methods": found}
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "results.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    draw(found, learned, args.output / "language_model_sources.png")


if __name__ == "__main__":
    main()
