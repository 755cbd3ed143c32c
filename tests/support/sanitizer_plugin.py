"""Pytest plugin: `--inside-sanitizer`, which tells a run that compute-sanitizer watches it, and its fixture."""

import pytest

INSIDE = "--inside-sanitizer"


def pytest_addoption(parser):
    parser.addoption(INSIDE, action="store_true", help="this run is watched: planted errors run, and no further watch")


@pytest.fixture
def inside_sanitizer(request):
    """A test that may only run where every access is watched: it goes wrong on purpose."""
    if not request.config.getoption(INSIDE):
        pytest.skip("goes wrong on purpose: runs only inside compute-sanitizer, started by the test after it")
