"""The two processes that all tests here share."""

import pytest

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.close()
