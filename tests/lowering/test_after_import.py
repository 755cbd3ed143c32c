"""The callback runs once, after the module's own code, whatever else looks for the module."""

import importlib.util
import sys

import pytest

from lowering.after_import import after_import


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package with a module that can be told to fail, importable until the test ends."""
    package = tmp_path / "some_library"
    package.mkdir()
    (package / "__init__.py").write_text("fails = False\n")
    (package / "part.py").write_text(
        "import some_library\nif some_library.fails:\n    raise ImportError('broken')\nready = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "some_library.part"
    sys.meta_path[:] = before
    for name in ("some_library", "some_library.part"):
        sys.modules.pop(name, None)


@pytest.fixture
def seen(library):
    """What the callback saw: the module's own code has run."""
    seen = []
    after_import(library, lambda module: seen.append((module.__name__, module.ready)))
    return seen


CALL = ("some_library.part", True)


def test_the_callback_waits_for_the_import(library, seen):
    assert seen == []
    importlib.import_module("some_library")
    assert seen == []
    importlib.import_module(library)
    importlib.import_module(library)
    assert seen == [CALL]


def test_a_module_that_is_there_is_called_for_at_once(library):
    importlib.import_module(library)
    seen = []
    after_import(library, lambda module: seen.append(module.ready))
    assert seen == [True]


def test_no_finder_is_left(library):
    before = list(sys.meta_path)
    for _ in range(3):
        after_import(library, lambda module: None)
    assert len(sys.meta_path) == len(before) + 1
    importlib.import_module(library)
    assert sys.meta_path == before


def test_every_callback_is_called_once_in_order(library):
    calls = []
    first, second = (lambda module: calls.append(1)), (lambda module: calls.append(2))
    for callback in (first, second, first):
        after_import(library, callback)
    importlib.import_module(library)
    assert calls == [1, 2]


def test_looking_for_the_module_is_no_import(library, seen):
    """As is done to see whether an optional dependency is there."""
    assert importlib.util.find_spec(library) is not None
    assert importlib.util.find_spec(library) is not None
    assert seen == []
    importlib.import_module(library)
    assert seen == [CALL]


def test_an_import_that_fails_may_be_tried_again(library, seen):
    package = importlib.import_module("some_library")
    package.fails = True
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module(library)
    assert seen == []
    package.fails = False
    importlib.import_module(library)
    assert seen == [CALL]


def test_a_module_that_cannot_be_found(seen):
    after_import("some_library.nothing", lambda module: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("some_library.nothing")


def test_an_error_of_a_finder_behind_ours_is_passed_on(library, seen):
    class Broken:
        def find_spec(self, name, path, target=None):
            if name == library:
                raise ImportError("from the finder")

    broken = Broken()
    sys.meta_path.insert(1, broken)
    with pytest.raises(ImportError, match="from the finder"):
        importlib.import_module(library)
    sys.meta_path.remove(broken)
    importlib.import_module(library)
    assert seen == [CALL]
