import pytest

import flashprune as fp


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine's CPU; the same test holds for all."""
    status = fp.backends()[request.param]
    if status != "ready":
        pytest.skip(f"{request.param}: {status}")
    return request.param


@pytest.fixture
def native() -> None:
    """For tests of the native operators themselves."""
    if fp.backends()["cpu"] != "ready":
        pytest.skip(f"cpu: {fp.backends()['cpu']}")
