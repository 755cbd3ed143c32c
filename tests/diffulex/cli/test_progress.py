"""Progress on standard error."""

import io
import sys

import pytest

from diffulex.cli.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_is_one_line_at_each_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("training", 3) as bar:
        assert sys.stderr.getvalue() == "training ...\n"
        bar.advance(2, note="loss 1")
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith("training: 0.")


def test_on_a_terminal_there_is_a_bar_with_a_note(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("training", 2) as bar:
        bar.advance(note="loss 1.25")
        bar._bar.refresh()
    shown = sys.stderr.getvalue()
    assert "50%" in shown and "loss 1.25" in shown
    assert shown.rpartition("\r")[2].startswith("training: 0.")


def test_an_error_passes_and_nothing_claims_success(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(RuntimeError, match="boom"), progress("training", 2):
        raise RuntimeError("boom")
    assert sys.stderr.getvalue() == "training ...\n"
