"""The switches of the process, and that code which asks them while it is captured is captured again after a change."""

import subprocess
import sys
import threading

import pytest
import torch

from lowering import state
from lowering.state import batch_invariant, disabled, is_batch_invariant, is_enabled, switches

# how it is moved, and how it stands then and else
SWITCHES = {"disabled": (disabled, is_enabled, False), "batch_invariant": (batch_invariant, is_batch_invariant, True)}


@pytest.fixture(params=SWITCHES)
def switch(request):
    return SWITCHES[request.param]


def test_a_block_is_undone(switch):
    moved, asked, inside = switch
    assert asked() != inside
    with moved():
        assert asked() == inside
        with moved():
            assert asked() == inside
        assert asked() == inside
    assert asked() != inside


def test_a_block_is_undone_after_an_error(switch):
    moved, asked, inside = switch
    with pytest.raises(ZeroDivisionError), moved():
        raise ZeroDivisionError
    assert asked() != inside


def test_switches_do_not_move_one_another():
    assert (is_enabled(), is_batch_invariant()) == switches() == (True, False)
    with disabled():
        assert (is_enabled(), is_batch_invariant()) == switches() == (False, False)
        with batch_invariant():
            assert (is_enabled(), is_batch_invariant()) == switches() == (False, True)
    with batch_invariant():
        assert (is_enabled(), is_batch_invariant()) == switches() == (True, True)


def test_watchers_see_every_change(switch, monkeypatch):
    moved, asked, inside = switch
    seen = []
    monkeypatch.setattr(state, "WATCHERS", [lambda: seen.append(asked())])
    with moved():
        pass
    assert seen == [inside, not inside]


def test_blocks_of_two_threads_that_overlap(switch):
    """The first to leave does not undo what the second asked for, and the second leaves it as it was."""
    moved, asked, inside = switch
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with moved():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        with moved():
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(asked())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [inside]
    assert asked() != inside


@pytest.mark.parametrize(
    ("variable", "value", "standing"),
    [
        ("DIFFULEX_DISABLE", "1", "(False, False)"),
        ("DIFFULEX_DISABLE", "0", "(True, False)"),
        ("DIFFULEX_DISABLE", "", "(True, False)"),
        ("DIFFULEX_BATCH_INVARIANT", "1", "(True, True)"),
        ("DIFFULEX_BATCH_INVARIANT", "0", "(True, False)"),
    ],
)
def test_the_environment_decides_how_the_process_starts(variable, value, standing):
    code = (
        "from lowering.state import *\nprint(switches())\nwith disabled(), batch_invariant(): pass\nprint(switches())"
    )
    environment = {variable: value, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [standing, standing]


def test_captured_code_is_guarded_on_the_switch(switch):
    moved, asked, inside = switch
    seen = []

    def backend(module, example_inputs):
        seen.append(asked())
        return module.forward

    @torch.compile(backend=backend)
    def function(x):
        return x + 1 if asked() == inside else x - 1

    x = torch.zeros(1)
    with moved():
        assert function(x) == 1
    assert function(x) == -1
    with moved():
        assert function(x) == 1
    assert function(x) == -1
    assert seen == [inside, not inside]
