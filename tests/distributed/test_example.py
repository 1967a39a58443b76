"""The example as a user runs it."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/ddp.py"


def test_the_example():
    """Two ranks by torchrun agree; without it, the example says how to start it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE]
    done = subprocess.run([*start, "--epochs", "1"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 ranks agree: student True, weight model True" in done.stdout
    alone = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=200)
    assert alone.returncode == 1 and "torchrun --nproc-per-node 2 examples/ddp.py" in alone.stderr
