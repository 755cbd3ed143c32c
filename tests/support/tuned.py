"""Tuned times for tests: a folder of their own, and made-up tables."""

import contextlib
import hashlib

import pytest

from lowering.schedule import plan, storage
from lowering.schedule.cost_model import predict
from lowering.schedule.plan import candidates


@contextlib.contextmanager
def tuned_folder(folder):
    """Tuned times are kept below `folder`, and plans go by them, until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_root", lambda: folder)
        plan.refresh()
        yield folder / "diffulex"
    plan.refresh()


def keep(device, table):
    """Save times for a device, and plan by them."""
    assert storage.save(storage.key_of(device), table) is None
    plan.refresh()


def model_times(shape, device, rows, *, count=12, factor=lambda schedule: 1.0):
    """Times of the schedules that the model ranks first, its own but for a factor."""
    ranked = sorted(candidates(shape, device), key=lambda s: predict(rows, shape, schedule=s, device=device))
    return {s: predict(rows, shape, schedule=s, device=device) * factor(s) for s in ranked[:count]}


def some_factor(schedule):
    """Between 0.7 and 1.4, the same for the same schedule."""
    return 0.7 + 0.7 * hashlib.sha256(repr(schedule).encode()).digest()[0] / 255
