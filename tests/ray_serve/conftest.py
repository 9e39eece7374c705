"""Ray Serve on this machine, in an environment of its own (`make test-ray`)."""

import importlib.util
import os

import pytest

# before Ray is imported, and for the processes it starts
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",  # replicas on a busy machine are slow, and not passed over
}


@pytest.fixture(autouse=True, scope="session")
def _ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: make test-ray")
