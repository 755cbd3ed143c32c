"""Callbacks on a module's first import: once, after its code, never by importing it."""

import subprocess
import sys

PROBE = """
import sys
from lowering.after_import import after_import

seen = []
after_import("colorsys", lambda module: seen.append(module.rgb_to_hsv))
after_import("colorsys", lambda module: seen.append("a second finder"))
assert "colorsys" not in sys.modules
assert not seen
import colorsys
assert seen == [colorsys.rgb_to_hsv], seen
after_import("colorsys", lambda module: seen.append("at once"))
assert seen[1:] == ["at once"], seen
before = list(sys.meta_path)
import this_module_is_nowhere
"""


def test_runs_once_after_the_import():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: No module named 'this_module_is_nowhere'" in done.stderr, done.stderr
