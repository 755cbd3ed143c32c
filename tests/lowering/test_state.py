"""The switch of the process, and that code which asks it while it is captured is captured again after a change."""

import subprocess
import sys
import threading

import pytest
import torch

from lowering.state import disabled, is_enabled


def test_disabled_is_undone():
    assert is_enabled()
    with disabled():
        assert not is_enabled()
        with disabled():
            assert not is_enabled()
        assert not is_enabled()
    assert is_enabled()


def test_disabled_is_undone_after_an_error():
    with pytest.raises(ZeroDivisionError), disabled():
        raise ZeroDivisionError
    assert is_enabled()


def test_blocks_of_two_threads_that_overlap():
    """The first to leave does not switch on what the second asked for, and the second leaves it on."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with disabled():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        with disabled():
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(is_enabled())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [False]
    assert is_enabled()


@pytest.mark.parametrize(("value", "enabled"), [("1", "False"), ("0", "True"), ("", "True")])
def test_the_environment_decides_how_the_process_starts(value, enabled):
    code = "from lowering.state import *\nprint(is_enabled())\nwith disabled(): pass\nprint(is_enabled())"
    environment = {"DIFFULEX_DISABLE": value, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [enabled, enabled]


def test_captured_code_is_guarded_on_the_switch():
    seen = []

    def backend(module, example_inputs):
        seen.append(is_enabled())
        return module.forward

    @torch.compile(backend=backend)
    def function(x):
        return x + 1 if is_enabled() else x - 1

    x = torch.zeros(1)
    with disabled():
        assert function(x) == -1
    assert function(x) == 1
    with disabled():
        assert function(x) == -1
    assert function(x) == 1
    assert seen == [False, True]
