"""The two processes that all tests here share."""

import pytest
import torch

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.close()


@pytest.fixture(autouse=True)
def sharding_works(request):
    """`fully_shard` before torch 2.7 or so needs a GPU."""
    if "sharded" in request.module.__name__ and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of this torch does not run on a CPU")
