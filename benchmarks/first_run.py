"""The README's first run with several seeds: its table with means, standard deviations and differences.

    python benchmarks/first_run.py                                  # the seeds that are not there yet, a minute each
    python benchmarks/first_run.py --seeds 0 --output runs/first    # one alone
    python benchmarks/first_run.py --report                         # write the page from the records that are there

Runs `python examples/cifar_lt_bikd.py --seed N`, keeps its results.json as `seed-N.json` in --output, and writes
README.md there.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.markdown import spread, table, write_readme
from benchmarks.common.measure import ROOT
from metakd.longtail.sources import KINDS

TEXT = """\
# The first run

```bash
python benchmarks/first_run.py
```

It runs `python examples/cifar_lt_bikd.py --seed N` for the seeds {seeds}; torch {torch}, one thread of one x86-64 core,
{cpu:.0f} seconds of CPU time a run, importing and drawing included; other programs had most of the machine.

Scikit-learn's digits, {train} training images: {head} of the most frequent class, {tail} of the rarest, from {sources}
sources. {kinds} {right:.0f} % of the training labels are
right. {held} images of each class with right labels are the meta images, {held} others choose among fixed mixtures, and
600 test images, the same for all seeds, are reported. The teacher learns from the training images as they are. The task
was chosen with the seeds 10 and 11 (below). The networks' learning rates are those of the long-tailed digits; the
table has the default rate of the library.

{rows}

Test accuracy in percent after the last epoch, mean ± standard deviation. *Few* are the three rarest classes. The
difference is that of `bikd` and the row, seed by seed; the last column counts the seeds with `bikd` ahead.

Learned weights at the end, mean over the sources of a kind and over the seeds:

{weights}

![Each source's weights over the training, seed {first}.](weights_by_source.png)
"""


def page(records, method_texts):
    """README.md's text."""
    first = records[0]
    about, seeds = first["arguments"], [record["seed"] for record in records]
    sources = first["sources"]

    def values(name, key="overall"):
        return [record["runs"][name]["last_epoch"][key] for record in records]

    rows = []
    for name in first["runs"]:
        text = method_texts.get(name, "trained on the training images")
        ahead = [ours - its for ours, its in zip(values("bikd"), values(name), strict=True)]
        compared = ["", ""] if name == "bikd" else [spread(ahead), f"{sum(d > 0 for d in ahead)} of {len(ahead)}"]
        rows.append([f"`{name}`", text, spread(values(name)), spread(values(name, "few")), *compared])
    learned = []
    for kind in KINDS:
        of_kind = [k for k, its in enumerate(sources["kinds"]) if its == kind]
        found = [record["learned_weights"]["by_source"][k] for record in records for k in of_kind]
        learned.append([kind, *(f"{statistics.mean(column):.2f}" for column in zip(*found, strict=True))])
    count = {kind: sources["kinds"].count(kind) for kind in KINDS}
    return TEXT.format(
        seeds=", ".join(map(str, seeds)),
        torch=first["versions"]["torch"],
        cpu=statistics.mean(record["cpu_seconds"] for record in records),
        train=sum(first["data"]["counts"]),
        head=max(first["data"]["counts"]),
        tail=min(first["data"]["counts"]),
        sources=about["sources"],
        kinds=f"{count[KINDS[0]]} label right, {count[KINDS[1]]} are wrong half of the time, and {count[KINDS[2]]} "
        "always name the next class.",
        right=100 * statistics.mean(record["sources"]["right"] for record in records),
        held=about["validation_per_class"] // 2,
        rows=table(["", "trained with", "accuracy", "few", "difference", "ahead"], rows, left=2),
        weights=table(["sources", *(f"{term} term" for term in first["learned_weights"]["terms"])], learned),
        first=seeds[0],
    )


def run_seed(seed, folder):
    """Run the example; its record, with the CPU time, goes to the folder."""
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(ROOT / "examples/cifar_lt_bikd.py"), "--seed", str(seed), "--output", work]
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((Path(work) / "results.json").read_text())
        record["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record["command"] = f"python examples/cifar_lt_bikd.py --seed {seed}"
        record["arguments"]["output"] = "runs/digits"
        (folder / f"seed-{seed}.json").write_text(json.dumps(record, indent=1) + "\n")
        if seed == 0:
            shutil.copy(Path(work) / "weights_by_source.png", folder)


def main():
    """Run the seeds that are not there yet; then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "first_run")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if not args.report and not (args.output / f"seed-{seed}.json").exists():
            run_seed(seed, args.output)
    sys.path.insert(0, str(ROOT / "examples"))
    from cifar_lt_bikd import WITH_SOURCES

    paths = sorted(args.output.glob("seed-*.json"), key=lambda path: int(path.stem[5:]))
    write_readme(args.output, page([json.loads(path.read_text()) for path in paths], WITH_SOURCES))


if __name__ == "__main__":
    main()
