"""Tuned times for tests: a folder of their own, made-up tables, and a stand-in for what measures."""

import contextlib
import hashlib

import pytest

from diffulex.tuning.measure import Timing
from lowering.schedule import plan, storage
from lowering.schedule.cost_model import score
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
    ranked = sorted(candidates(shape, device), key=lambda s: score(rows, shape, schedule=s, device=device))
    return {s: score(rows, shape, schedule=s, device=device) * factor(s) for s in ranked[:count]}


def some_factor(schedule):
    """Between 0.7 and 1.4, the same for the same schedule."""
    return 0.7 + 0.7 * hashlib.sha256(repr(schedule).encode()).digest()[0] / 255


class FakeMeasure:
    """Times are the model's but for a factor; a clock that a cell moves on by a second."""

    def __init__(self, device, *, factor=some_factor, problems=()):
        self.device, self.factor, self.problems = device, factor, dict(problems)
        self.now, self.prepared, self.timed = 0.0, [], []

    def clock(self):
        return self.now

    def prepare(self, jobs, *, deadline):
        self.prepared.append((list(jobs), deadline))
        return {job: why for job in jobs for schedule, why in self.problems.items() if job[1] == schedule}

    def time(self, cell, schedules):
        self.timed.append(cell)
        self.now += 1.0
        seconds = {s: score(cell.rows, cell.gemm, schedule=s, device=self.device) * self.factor(s) for s in schedules}
        return Timing(seconds, dict.fromkeys(schedules, 1e-3), {})
