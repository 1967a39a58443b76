"""Minutes with a GPU: the jobs' order, their limits, what is not done again, and a rehearsal on the CPU."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.common import clocks, measure
from benchmarks.common.measure import ROOT
from benchmarks.gpu import estimate, tests
from benchmarks.gpu.jobs import UNFINISHED, Job
from benchmarks.gpu.log import Log
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.work import Work
from benchmarks.longtail import methods
from benchmarks.longtail.candidates import CHOICE
from benchmarks.longtail.learned import Learned
from metakd import MetaKDError


def job(name, code="pass", limit=20.0, **more):
    return Job(name, ("-c", code), limit, **{"least": 0.0, **more})


def worked(folder, *jobs, seconds=60.0, **more):
    """Work through the jobs; the log, and what was said."""
    said = []
    log = Log(folder / "jobs.json")
    Work(jobs, log, seconds, scratch=folder / "output", say=said.append, **more).all()
    return json.loads((folder / "jobs.json").read_text())["jobs"], [line.split()[:2] for line in said]


def test_what_is_done_is_not_done_again(tmp_path):
    once = job("once", f"open({str(tmp_path / 'times')!r}, 'a').write('x')")
    for _ in range(2):
        found, _ = worked(tmp_path, once)
        assert found["once"]["status"] == "done"
    assert (tmp_path / "times").read_text() == "x"


@pytest.mark.slow
def test_a_job_that_overruns_is_killed_with_its_children_and_the_next_one_runs(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    found, _ = worked(tmp_path, job("long", code, limit=1.0), job("next"))
    assert found["long"]["status"] == "killed" and found["long"]["reason"] == "it ran longer than 1 s"
    assert found["next"]["status"] == "done"
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_failure_says_what_was_printed_and_is_tried_again_after_the_others(tmp_path):
    jobs = [job("bad", "raise ValueError('no such kernel')"), job("part", f"raise SystemExit({UNFINISHED})")]
    found, said = worked(tmp_path, *jobs)
    assert found["bad"]["status"] == "failed" and "no such kernel" in found["bad"]["output"][-1]
    assert [name for _, name in said if name.startswith("bad")] == ["bad:", "bad:"]
    _, said = worked(tmp_path, *jobs, job("new"))
    assert [name for what, name in said if what == "start"] == ["part:", "new:", "bad:"]


def test_jobs_without_what_they_need_are_skipped(tmp_path):
    found, _ = worked(
        tmp_path,
        job("package", packages=("torch", "no_such_package")),
        job("file", file="benchmarks/no_such_file.py"),
        job("after", after="package"),
        job("long", least=1e6),
    )
    assert {name: entry["status"] for name, entry in found.items()} == {
        "package": "skipped", "file": "skipped", "after": "waiting", "long": "waiting",
    }  # fmt: skip
    assert found["package"]["reason"] == "not installed: no_such_package"
    assert found["file"]["reason"] == "there is no benchmarks/no_such_file.py"
    assert found["after"]["reason"] == "needs package, which is skipped"


@pytest.mark.slow
def test_only_jobs_that_may_are_beside_others_and_none_before_what_it_needs(tmp_path):
    code = "import time; print(time.time()); time.sleep(1.0); print(time.time())"
    both = {"after": "first", "beside": True}
    jobs = [job("first", code), job("a", code, **both), job("b", code, **both), job("alone", code)]
    worked(tmp_path, *jobs, together=2)

    def span(name):
        start, end = (float(line) for line in (tmp_path / "output" / f"{name}.txt").read_text().split())
        return start, end

    first, a, b, alone = (span(name) for name in ("first", "a", "b", "alone"))
    assert first[1] < min(a[0], b[0]) and max(a[1], b[1]) < alone[0]
    assert max(a[0], b[0]) < min(a[1], b[1])


def test_a_job_that_stops_is_told_when_and_goes_on(tmp_path):
    code = f"import sys; print(sys.argv); print('3 of 12 epochs are done'); raise SystemExit({UNFINISHED})"
    found, _ = worked(tmp_path, job("cell", code, limit=40.0, stops=True))
    entry = found["cell"]
    assert entry["status"] == "part" and entry["share"] == 0.25
    assert "['-c', '--until', '30']" in (tmp_path / "output" / "cell.txt").read_text()


@pytest.mark.parametrize(("kept", "share", "status"), [(5, None, "done"), (59, None, "waiting"), (59, 0.9, "done")])
def test_a_checkpoint_that_does_not_travel_is_not_begun_without_the_time(tmp_path, kept, share, status):
    log = {"runs": [], "jobs": {"teacher": {"status": "part", "seconds": 9.0, "share": share}} if share else {}}
    (tmp_path / "jobs.json").write_text(json.dumps(log))
    found, _ = worked(tmp_path, job("teacher", need=100.0, kept=kept), seconds=30.0, travels=10.0)
    assert found["teacher"]["status"] == status


@pytest.mark.slow
def test_the_estimates_of_what_runs_side_by_side_add_up(tmp_path):
    code = "import time; time.sleep(2)"
    jobs = [job(name, code, need=20.0, kept=59.0, beside=True) for name in "abc"]
    found, _ = worked(tmp_path, *jobs, seconds=50.0, together=3, travels=10.0)
    assert [found[name]["status"] for name in "abc"] == ["done", "done", "waiting"]
    assert "about 20 s are needed at once, and 40 s by what runs beside it" in found["c"]["reason"]


def test_a_run_that_ends_kills_what_runs(tmp_path):
    def say(text):
        if text.startswith("start"):
            raise KeyboardInterrupt

    log = Log(tmp_path / "jobs.json")
    work = Work([job("long", "import time; time.sleep(60)")], log, 60.0, scratch=tmp_path, say=say)
    with pytest.raises(KeyboardInterrupt):
        work.all()
    assert work.running[0].process.poll() is not None
    assert log.of("long")["status"] == "killed" and log.of("long")["reason"] == "the run ended"


def full():
    return Plan("cuda", Path("benchmarks/results/gpu"), Path("runs/gpu"), Path("data")).jobs()


def test_the_jobs_come_in_the_order_of_worth():
    names = [job.name for job in full()]
    assert len({*names}) == len(names)
    first = [f"tests-gpu-{part}" for part in range(1, 9)]
    first += ["overhead", "graphs-100", "graphs-1024", "iteration-100", "iteration-1024", "adjoint"]
    first += [f"tests-device-{part}" for part in range(1, 9)]
    table = [f"{name}-cifar10-50-0" for name in ("teacher", "kd", "mixture", "bikd-mix", "best")]
    assert names[:27] == [*first, *table]
    assert names.index("best-cifar10-50-2") < names.index("teacher-cifar100-100-0")
    assert all(job.need > 30 for job in full() if "cifar" in job.name)
    assert (
        sum(job.limit for job in full()[7:14]) < 9 * 60 < sum(job.need for job in full() if job.name.endswith("50-0"))
    )


def small(*options):
    """The jobs of a plan of many small students, as the command has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["on_gpu.py", *options])
        args = on_gpu.parse_arguments()
    return args, on_gpu.plan_of(args).jobs()


def option(job, name):
    rest = job.command[job.command.index(name) + 1 :]
    return [*itertools.takewhile(lambda word: not word.startswith("--"), rest)]


def test_many_small_students_come_after_their_teachers_seed_by_seed():
    args, jobs = small("--plan", "small", "--seeds", "0", "2", "--methods", "best+val", "mixture", "kd")
    assert args.together == 14 and str(args.output) == "benchmarks/results/gpu/small"
    names = [job.name for job in jobs]
    cells = [f"cifar10-{imbalance}-{seed}" for seed in (0, 2) for imbalance in (50, 100)]
    students = [f"{methods}-{cell}" for cell in cells for methods in ("best+val,mixture", "kd")]
    assert names == [*(f"teacher-{cell}" for cell in cells), *students]
    assert all(job.beside and job.stops for job in jobs)
    assert {job.after for job in jobs} == {None, *names[:4]}
    first = jobs[4]
    assert option(first, "--methods") == ["best+val", "mixture"] and option(first, "--seeds") == ["0"]
    assert option(first, "--imbalances") == ["50"] and option(first, "--preset") == ["small"]
    assert option(jobs[0], "--methods") == []


def test_the_choice_compares_all_candidates_on_seeds_of_its_own():
    _, jobs = small("--plan", "choice", "--cells", "3", "--imbalances", "50")
    trained = [name for job in jobs if job.after for name in option(job, "--methods")]
    assert trained == 2 * [*CHOICE] and len({*CHOICE}) == len(CHOICE)
    assert {option(job, "--seeds")[0] for job in jobs} == {"10", "11"}
    assert {option(job, "--preset")[0] for job in jobs} == {"choice"}
    learned = {name for name in CHOICE if isinstance(methods.find(name), Learned)}
    assert len({*CHOICE} - learned) >= 10 and {"best+val", "mixture+val", "mixture", "best"} < {*CHOICE}


def test_a_rehearsal_of_many_small_students_names_its_own_cells():
    _, jobs = small("--plan", "choice", "--preset", "smoke-choice", "--device", "cpu", "--methods", "kd")
    assert [job.name for job in jobs] == ["teacher-digits-20-10", "kd-digits-20-10"]


@pytest.mark.parametrize(
    ("options", "error"), [(["--methods", "kd"], SystemExit), (["--plan", "small", "--methods", "no"], MetaKDError)]
)
def test_options_that_do_not_fit_the_plan(options, error):
    with pytest.raises(error):
        small(*options)


@pytest.mark.slow
def test_many_small_students_in_small(tmp_path):
    command = [
        sys.executable,
        "benchmarks/on_gpu.py",
        "--plan",
        "choice",
        "--preset",
        "smoke-choice",
        "--device",
        "cpu",
    ]
    command += ["--minutes", "10", "--methods", "best+val", "mixture+val", "best", "--cells", "2", "--together", "2"]
    command += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads((tmp_path / "out" / "jobs.json").read_text())["jobs"]
    assert len(jobs) == 3 and {job["status"] for job in jobs.values()} == {"done"}, jobs
    cells = {path.stem for path in (tmp_path / "out" / "table").rglob("*.json")}
    assert cells == {"best+val-10", "mixture+val-10", "best-10"}


def test_the_estimate_is_that_of_the_operations():
    row = next(row for row in json.loads(estimate.PATH.read_text())["rows"] if row["name"] == "kd")
    found = estimate.counted("kd", 10)
    assert found.tf32 == pytest.approx(row["tf32"], rel=0.02) and found.bf16 == pytest.approx(row["bf16"], rel=0.02)
    assert found.kernels == pytest.approx(row["kernels"], rel=0.15)
    assert row["iterations"] == 120 * 137
    ms = 1e3 * (100 * (found.tf32 / 60e12 + found.bf16 / 100e12) + found.kernels * 2.5e-6)
    assert row["ms"] == pytest.approx(ms, rel=0.05) and row["seconds"] == pytest.approx(16.44 * row["ms"], rel=0.01)


def test_the_page_has_the_estimate_and_the_limits():
    page = (ROOT / "docs" / "gpu.md").read_text()
    content = json.loads(estimate.PATH.read_text())
    assert estimate.text_of(content["rows"]) in page
    assert content["rates"] == {"tf32": 60e12, "bf16": 100e12, "launch": 12e-6, "replay": 2.5e-6}
    limits = {job.name: job.limit for job in full()}
    rows = {names: seconds for names, seconds in re.findall(r"\| `([^|]*)` \| (?:2 . )?(\d+) s \|", page)}
    assert len(rows) == 7
    for names, seconds in rows.items():
        assert limits[names.split("`")[0]] == float(seconds)


def test_a_cell_on_a_gpu_is_measured_in_this_process_and_may_fail_alone(monkeypatch):
    cell = {"case": "convnet4", "steps": 1, "module": "benchmarks.common.loops", "threads": 1, "batch_size": 2}
    monkeypatch.setattr(measure.subprocess, "run", None)
    monkeypatch.setattr(measure, "measured", lambda cell: {"peak": cell["steps"]})
    assert measure.in_process("memory", device="cuda", **cell) == {"peak": 1}

    def fails(cell):
        raise RuntimeError("CUDA error: out of luck")

    monkeypatch.setattr(measure, "measured", fails)
    assert measure.in_process("memory", device="cuda", **cell) == {"died": "RuntimeError: CUDA error: out of luck"}


def test_calls_are_timed_together_by_the_gpu_s_own_time(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    def call():
        Event.now += 2.0  # ms
        return Event.now

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clocks.timed(call, clocks.CLOCKS["device"], 10) == (0.002, 20.0)


def test_tests_for_a_gpu_say_so_in_the_same_words():
    skips = re.compile(r"skipif\(\s*not torch\.cuda\.is_available\(\)[^\n]*")
    found = {str(path.relative_to(ROOT)): skips.findall(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    found = {name: lines for name, lines in found.items() if lines and name != "tests/benchmarks/test_on_gpu.py"}
    assert len(found) >= 6 and found.keys() <= {*tests.files_of()}
    assert all(tests.NEEDS_GPU.search(line) for lines in found.values() for line in lines)


def test_a_default_device_takes_what_a_cpu_generator_draws():
    code = (
        "import torch; from benchmarks.gpu import tests; tests.use('meta')\n"
        "g = torch.Generator().manual_seed(0)\n"
        "print(torch.randn(3, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(2).device)\n"
        "print(torch.randint(0, 9, (2,), generator=g).device, torch.rand(2, generator=g, device='cpu').device)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "device='meta', size=(3,), dtype=torch.float64, requires_grad=True) meta" in done.stdout
    assert done.stdout.splitlines()[-1] == "meta cpu"


@pytest.mark.slow
def test_tests_are_kept_line_by_line_and_not_run_again(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False, 'as it must'\n"
        "@pytest.mark.skipif(False, reason='needs a GPU')\n"
        "def test_gpu(): pass\n"
    )

    def run(*options):
        command = [sys.executable, "-m", "benchmarks.gpu.tests", *options, "--output", str(tmp_path / "out")]
        done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
        return done, json.loads((tmp_path / "out.json").read_text())

    done, found = run("--only-gpu")
    assert done.returncode == 0 and found["outcomes"] == {"passed": 1}, done.stdout + done.stderr
    done, found = run("--until", "0")  # one more
    assert done.returncode == UNFINISHED and sum(found["outcomes"].values()) == 2
    done, found = run()
    assert done.returncode == 0 and found["outcomes"] == {"passed": 2, "failed": 1}
    assert "as it must" in next(iter(found["not passed"].values()))
    (tmp_path / "test_one.py").write_text("def test_good(): assert False\n")
    assert run()[1]["outcomes"] == {"passed": 2, "failed": 1}


def test_the_command_needs_nothing_but_torch_and_numpy(tmp_path):
    absent = ["tqdm", "matplotlib", "torchvision", "torchmetrics", "sklearn", "PIL", "higher", "torchopt", "pytest",
              "hypothesis", "safetensors"]  # fmt: skip
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        f"sys.argv = ['benchmarks/on_gpu.py', '--list', '--output', {str(tmp_path)!r}]\n"
        "import runpy; runpy.run_path('benchmarks/on_gpu.py', run_name='__main__')"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(full())


@pytest.mark.slow
@pytest.mark.skipif("METAKD_REHEARSE" not in os.environ, reason="takes ten minutes: set METAKD_REHEARSE=1")
def test_a_rehearsal_does_all_jobs_and_a_second_one_does_none(tmp_path):
    command = [sys.executable, "benchmarks/on_gpu.py", "--plan", "smoke", "--device", "cpu", "--minutes", "25"]
    command += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--together", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((tmp_path / "out" / "jobs.json").read_text())["jobs"]

    said, found = run()
    missing = {"overhead"} - {name for name in ("overhead",) if (ROOT / "benchmarks" / "overhead.py").exists()}
    assert {name for name, entry in found.items() if entry["status"] == "skipped"} == missing, said
    assert {name for name, entry in found.items() if entry["status"] == "done"} == found.keys() - missing, said
    cells = {path.stem for path in (tmp_path / "out" / "table").rglob("*.json")}
    assert cells == {"kd-0", "bikd-mix-0", "kd-1", "bikd-mix-1"}
    assert len([*(tmp_path / "out" / "teachers").glob("*.safetensors")]) == 2
    failed = json.loads((tmp_path / "out" / "graphs-4" / "results.json").read_text())["cells"][0]["failed"]
    assert failed == {"plain, CUDA graph": "MetaKDError: CUDA graphs need a GPU"} or torch.cuda.is_available()
    again, found = run()
    assert "start" not in again and ("overhead" in again or not missing)
