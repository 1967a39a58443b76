"""The jobs in order of worth: tests, cost, then the table of the paper, seed by seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common.loops import MODES
from benchmarks.gpu.estimate import known
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.table import Table

METHODS = ("kd", "mixture", "bikd-mix", "best")
GRAPHS = tuple(name for name in MODES if "graph" in name)
COMPILED = tuple(name for name in MODES if "compiled" in name)
LOOPS = ("accumulate=1", "accumulate=5", "every=5", "simultaneous", "published way")


@dataclass(frozen=True)
class Plan:
    """What is run, and how much of it.

    Attributes:
        device: cuda, or the cpu for a rehearsal.
        output: records and teachers.
        work: checkpoints and the jobs' output, not kept.
        data: the images, as mosaics in `<data set>`, or where torchvision has them.
        tests: run with tensors on the device by default.
        gpu_tests: the files from which those that skip without a GPU are run.
        parts: in which the tests run side by side.
        cases: of the measurements.
        overhead: likewise, of `overhead.py` and of CUDA graphs.
        loops: measured as written.
        graphs: measured as CUDA graphs.
        compiled: measured with a compiled student.
        batches: their batch sizes.
        steps: numbers of inner steps of `Adjoint`.
        tables: data set, imbalance and seeds of the table's parts, in order.
        preset: of the table.
        methods: likewise.
        seconds: of a measured cell.
        scale: of the limits.
    """

    device: str
    output: Path
    work: Path
    data: Path | None
    tests: Sequence[str] = ("tests/estimators", "tests/test_no_trace.py")
    gpu_tests: Sequence[str] = ()
    parts: int = 8
    cases: Sequence[str] = ("resnet8x4", "resnet20", "transformer")
    overhead: Sequence[str] = ("resnet8x4", "resnet20", "mlp32", "transformer")
    loops: Sequence[str] = LOOPS
    graphs: Sequence[str] = GRAPHS
    compiled: Sequence[str] = COMPILED
    batches: Sequence[int] = (100, 1024)
    adjoint: str = "resnet20"
    steps: Sequence[int] = (2, 20)
    tables: Sequence[tuple[str, float, Sequence[int]]] = (
        ("cifar10", 50.0, (0,)),
        ("cifar10", 50.0, (1, 2)),
        ("cifar100", 100.0, (0, 1, 2)),
    )
    preset: str = "paper"
    methods: Sequence[str] = METHODS
    seconds: float = 4.0
    scale: float = 1.0

    def jobs(self) -> list[Job]:
        """All of them, in order."""
        first, *more = self.tables
        found = [
            *self._tests("tests-gpu", 60, "--only-gpu", *self.gpu_tests),
            *self._cost(),
            *self._tests("tests-device", 80, "--device", self.device, *self.tests),
            *self._table(*first),
            *self._compiled(),
        ]
        for table in more:
            found += self._table(*table)
        return found

    def _tests(self, name: str, limit: float, *options: str) -> Iterator[Job]:
        """In parts that run side by side."""
        for part in range(self.parts):
            job, needs = f"{name}-{part + 1}", ("pytest", "hypothesis")
            which = ("--part", str(part), "--parts", str(self.parts), *options)
            command = ("-m", "benchmarks.gpu.tests", "--output", str(self.output / job), *which)
            yield Job(job, command, limit * self.scale, packages=needs, stops=True, beside=True)

    def _cost(self) -> Iterator[Job]:
        yield self._measured("overhead", "benchmarks/overhead.py", 75, "--cases", *self.overhead)
        for size in self.batches:
            yield self._iteration(f"graphs-{size}", size, self.graphs, 70, self.overhead)
        for size in self.batches:
            yield self._iteration(f"iteration-{size}", size, self.loops, 100)
        yield self._measured(
            "adjoint", "benchmarks/hypergradient.py", 45, "--cases", self.adjoint, "--methods", "Adjoint", "Unroll",
            "--steps", *map(str, self.steps),
        )  # fmt: skip

    def _compiled(self) -> Iterator[Job]:
        for size in self.batches:
            yield self._iteration(f"compiled-{size}", size, self.compiled, 120)

    def _iteration(self, name: str, size: int, methods: Sequence[str], limit: float, cases: Sequence[str] = ()) -> Job:
        cases = ("--cases", *(cases or self.cases), "--batch-size", str(size), "--methods", *methods)
        return self._measured(name, "benchmarks/iteration.py", limit, *cases)

    def _measured(self, name: str, file: str, limit: float, *options: str) -> Job:
        clock = ("--clock", "device") if self.device == "cuda" else ()
        command = (file, "--device", self.device, *clock, "--seconds", f"{self.seconds:g}", "--repeats", "10")
        command = (*command, "--threads", "1", *options, "--output", str(self.output / name))
        return Job(name, command, limit * self.scale, packages=("tqdm", "matplotlib"), file=file)

    def _table(self, dataset: str, imbalance: float, seeds: Sequence[int]) -> Iterator[Job]:
        for seed in seeds:
            name = f"{dataset}-{imbalance:g}-{seed}"
            yield self._cells(f"teacher-{name}", dataset, imbalance, seed, [])
            for method in self.methods:
                yield self._cells(f"{method}-{name}", dataset, imbalance, seed, [method], after=f"teacher-{name}")

    def _cells(
        self, name: str, dataset: str, imbalance: float, seed: int, methods: Sequence[str], after: str | None = None
    ) -> Job:
        table = Table(self.preset, self.device, self.output, self.work / "table", self.data, 30 * self.scale)
        need = known().get((dataset, imbalance, methods[0] if methods else "teacher"), 0.0)
        job = table.job(name, dataset, imbalance, seed, methods, after)
        return replace(job, beside=after is not None, need=need, kept=9.8 if after else 59.4)
