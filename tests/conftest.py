"""Shared set-up of the suite: no network, hypothesis profiles, and GPU tests skipped where there is no GPU.

`pytest --hypothesis-profile=nightly` (or `release`) asks for more examples; the default, `ci`, is the same each time.
`faults` is that without making a failing example small, for `tests.mutants`.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

pytest_plugins = ("tests.support.examples_plugin", "tests.support.expected_plugin", "tests.support.sanitizer_plugin")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Compiling takes longer than any deadline that would still catch something.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **_COMMON)
settings.register_profile("faults", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.register_profile("nightly", max_examples=1_000, print_blob=True, **_COMMON)
settings.register_profile("release", max_examples=10_000, print_blob=True, **_COMMON)
settings.load_profile("ci")  # the command line option is applied after this file


@pytest.fixture(autouse=True, scope="session")
def untuned(tmp_path_factory):
    """Plans by the cost model, whatever times whoever runs the tests has tuned on this machine."""
    from lowering.schedule import storage

    folder = tmp_path_factory.mktemp("untuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_root", lambda: folder)
        yield


@pytest.fixture
def fresh_dynamo():
    """A test that finds nothing compiled and nothing counted, and leaves nothing compiled."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in marked:
        item.add_marker(skip)
