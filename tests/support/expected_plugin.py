"""Pytest plugin: the `expected` fixture of `tests/support/expected.py`, and `--accept`."""

import pytest

from tests.support.expected import Expected


def pytest_addoption(parser):
    parser.addoption("--accept", action="store_true", help="write the texts under tests/expected/ instead of comparing")


@pytest.fixture
def expected(request):
    """expected(name, text): `text` is what tests/expected holds under `name`."""
    return Expected(accept=request.config.getoption("--accept"))
