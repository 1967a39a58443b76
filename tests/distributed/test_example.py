"""The example as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples/ddp.py"
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WATCHED = """
import runpy, sys, weakref
import torch.distributed as dist
init, groups = dist.init_process_group, []
def watched(*args, **options):
    init(*args, **options)
    groups.append(weakref.ref(dist.group.WORLD))
dist.init_process_group = watched
runpy.run_path(sys.argv.pop(1), run_name="__main__")
print("groups left:", [group() for group in groups])
"""


def test_the_example(tmp_path):
    """Two ranks by torchrun agree, and their group is gone before they exit: gloo's threads may abort an exit."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    done = subprocess.run([*START, script, EXAMPLE, "--epochs", "1"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 ranks agree: student True, weight model True" in done.stdout
    assert done.stdout.count("groups left: [None]") == 2, done.stdout


def test_it_says_how_to_start_it():
    alone = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=200)
    assert alone.returncode == 1 and "torchrun --nproc-per-node 2 examples/ddp.py" in alone.stderr
