"""Jobs that train cells of the long-tailed table, and a plan of many small ones side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.jobs import Job

RUNS = ("numpy", "torchmetrics", "safetensors")


@dataclass(frozen=True)
class Table:
    """What all jobs of a table share.

    Attributes:
        preset: of the table.
        device: to train on.
        output: teachers and the table's cells.
        work: checkpoints.
        data: the images, as mosaics in `<data set>`, or where torchvision has them.
        least: seconds without which no job starts.
    """

    preset: str
    device: str
    output: Path
    work: Path
    data: Path | None
    least: float = 30.0

    def job(
        self, name: str, dataset: str, imbalance: float, seed: int, methods: Sequence[str], after: str | None = None
    ) -> Job:
        """Train some methods, one after another; without methods, the teacher."""
        command = [
            "benchmarks/longtail_table.py", "--preset", self.preset, "--fast", "--no-report", "--device", self.device,
            "--threads", "1", "--datasets", dataset, "--imbalances", f"{imbalance:g}", "--seeds", str(seed),
            "--teachers", str(self.output / "teachers"), "--work", str(self.work),
            "--output", str(self.output / "table"), *(("--data-root", str(self.data)) if self.data else ()),
            "--methods", *methods,
        ]  # fmt: skip
        packages = (*RUNS, "sklearn" if dataset == "digits" else "PIL")
        return Job(name, tuple(command), 3600.0, self.least, packages, after=after, stops=True, beside=True, kept=1.0)


@dataclass(frozen=True)
class Small:
    """Many small students side by side: first all teachers, then the methods, seed by seed.

    Attributes:
        table: what the jobs share.
        dataset: of the images.
        imbalances: of the long tails.
        seeds: in the order of worth.
        methods: in the order of worth.
        cells: methods that one job trains, so that it starts up and reads the images once.
    """

    table: Table
    dataset: str
    imbalances: Sequence[float]
    seeds: Sequence[int]
    methods: Sequence[str]
    cells: int = 1

    def jobs(self) -> list[Job]:
        """All of them, in order."""
        parts = [(imbalance, seed) for seed in self.seeds for imbalance in self.imbalances]
        found = [self._job(imbalance, seed, ()) for imbalance, seed in parts]
        for imbalance, seed in parts:
            for start in range(0, len(self.methods), self.cells):
                found.append(self._job(imbalance, seed, self.methods[start : start + self.cells]))
        return found

    def _job(self, imbalance: float, seed: int, methods: Sequence[str]) -> Job:
        where = f"{self.dataset}-{imbalance:g}-{seed}"
        teacher = f"teacher-{where}"
        name = f"{','.join(methods)}-{where}" if methods else teacher
        return self.table.job(name, self.dataset, imbalance, seed, methods, teacher if methods else None)
