"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what tests start as processes of their own shares the cores

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("metakd", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("metakd")


torch.set_num_threads(1)  # small tensors: threads cost more than they bring


@pytest.fixture(autouse=True)
def _same_seed():
    """Each test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
