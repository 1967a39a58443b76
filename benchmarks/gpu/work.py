"""Works through jobs until the time is over."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.measure import ROOT
from benchmarks.gpu.jobs import UNFINISHED, Job
from benchmarks.gpu.log import OVER, TRIED, Log

GRACE = 10.0
"""Seconds that a job which stops by itself has before it is killed."""
TAIL = 12
"""Lines of a failed job's output that the log keeps."""


@dataclass
class Running:
    """A job's process."""

    job: Job
    process: subprocess.Popen[bytes]
    output: Path
    start: float
    limit: float

    @property
    def seconds(self) -> float:
        """Since it started."""
        return time.monotonic() - self.start

    def kill(self) -> None:
        """End it, and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Work:
    """The queue of one run.

    Args:
        jobs: in order of worth.
        log: of all runs; what is done there is not done again.
        seconds: of the run.
        together: most jobs at the same time, of those that may be beside others.
        scratch: folder for the jobs' output.
        travels: megabytes; a job whose checkpoint is larger is only started if its estimate fits, for the rest of the
            work would be lost.
        say: told what happens.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        log: Log,
        seconds: float,
        *,
        together: int = 1,
        scratch: Path,
        travels: float = float("inf"),
        say: Callable[[str], None] = print,
    ) -> None:
        self.log, self.together, self.scratch, self.travels, self.say = log, together, scratch, travels, say
        self.end = time.monotonic() + seconds
        open_jobs = [job for job in jobs if log.status(job.name) not in OVER]
        self.queue = sorted(
            open_jobs, key=lambda job: {log.status(job.name), log.status(job.after)} & {*TRIED} != set()
        )
        self.running: list[Running] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def all(self) -> None:
        """Work until nothing can be done any more."""
        try:
            while self.queue or self.running:
                for one in list(self.running):
                    self._look_after(one)
                if not (self.queue and self._take(self.queue[0])):
                    time.sleep(0.05)
        finally:
            for one in self.running:
                one.kill()
                self._put(one, "killed", "the run ended")

    def _take(self, job: Job) -> bool:
        """Start the next job or set it aside; False: later."""
        if job.after in {one.job.name for one in self.running}:
            return False
        if self.running and not (job.beside and all(one.job.beside for one in self.running)):
            return False
        if len(self.running) >= self.together:
            return False
        self.queue.pop(0)
        aside = self._aside(job)
        if aside is None:
            self._start(job)
        else:
            # A job that was begun before keeps saying so.
            begun = self.log.status(job.name) in (*TRIED, "part")
            if not begun:
                self.log.put(job.name, *aside)
            self.say(f"{aside[0]:8}{job.name}: {aside[1]}")
        return True

    def _aside(self, job: Job) -> tuple[str, str] | None:
        if reason := job.lacks():
            return "skipped", reason
        if job.after is not None and self.log.status(job.after) != "done":
            return "waiting", f"needs {job.after}, which is {self.log.status(job.after) or 'not done'}"
        if self.left < job.least:
            return "waiting", f"{max(self.left, 0):.0f} s were left, {job.least:.0f} are the least"
        if job.kept > self.travels:
            rest, others = self._rest(job), sum(self._rest(one.job) - one.seconds for one in self.running)
            if rest + others > self.left:  # they share the GPU
                beside = f", and {others:.0f} s by what runs beside it" * bool(self.running)
                return "waiting", f"about {rest:.0f} s are needed at once{beside}; {self.left:.0f} s were left"
        return None

    def _rest(self, job: Job) -> float:
        """Seconds that a job still needs: as measured, if it was begun, else as estimated."""
        known = self.log.of(job.name)
        share = known.get("share", 0.0)
        return known["seconds"] * (1 / share - 1) if share else job.need

    def _start(self, job: Job) -> None:
        limit = min(job.limit, self.left)
        command = [sys.executable, *job.command]
        if job.stops:
            command += ["--until", f"{max(limit - GRACE, 1):.0f}"]
        output = self.scratch / f"{job.name}.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.running.append(Running(job, process, output, time.monotonic(), limit))
        self.say(f"start   {job.name}: {limit:.0f} s at most, {self.left:.0f} s left")

    def _look_after(self, one: Running) -> None:
        status = one.process.poll()
        if status is None and one.seconds < one.limit:
            return
        self.running.remove(one)
        if status is None:
            one.kill()
            self._put(one, "killed", f"it ran longer than {one.limit:.0f} s")
        elif status == 0:
            self._put(one, "done")
        elif status == UNFINISHED:
            self._put(one, "part", one.output.read_text(errors="replace").strip().rpartition("\n")[2])
        else:
            self._put(one, "failed", f"exit status {status}")

    def _put(self, one: Running, status: str, reason: str = "") -> None:
        seconds = one.seconds
        more: dict[str, object] = {}
        if found := re.search(r"(\d+) of (\d+) epochs", reason):
            more["share"] = int(found[1]) / int(found[2])
        if status in TRIED:
            more["output"] = one.output.read_text(errors="replace").splitlines()[-TAIL:]
        self.log.put(one.job.name, status, reason, seconds, **more)
        self.say(f"{status:8}{one.job.name}: {seconds:.0f} s {reason}")
