"""What several tests of the CUDA kernels share."""

import pytest
from cuda_machine import Machine


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """The kernels compiled for the host machine."""
    return Machine.build(tmp_path_factory.mktemp("host"))
