"""Generated code against texts kept under tests/expected/: changes are seen in a diff and accepted on purpose.

    def test_up_kernel(expected):
        expected("expert_up", code.kernel("moe_expert_up").function)

`pytest --accept` writes the texts. Inductor's own parts differ between releases, so each minor version of torch has a
folder; on a version without one the test is skipped with that reason.
"""

import difflib
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "expected"


class Expected:
    """Compares texts with the files of one version's folder, or writes them when `accept` is true."""

    def __init__(self, accept, folder=FOLDER, version=torch.__version__):
        self.accept = accept
        self.folder = Path(folder) / ("torch-" + ".".join(version.split(".")[:2]))

    def __call__(self, name, text):
        """Fail with a diff unless the normalised `text` is that of the file `name`."""
        path, text = self.folder / f"{name}.txt", normalise(text)
        if self.accept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if not self.folder.is_dir():
            pytest.skip(f"no expected texts for this release: {self.folder.name} (pytest --accept writes them)")
        if not path.is_file():
            pytest.fail(f"{path.name} is missing in {self.folder} (pytest --accept writes it)", pytrace=False)
        before = path.read_text()
        if before != text:
            diff = difflib.unified_diff(before.splitlines(), text.splitlines(), "expected", "generated", lineterm="")
            pytest.fail("\n".join([f"{path.name} changed; pytest --accept takes it", *diff]), pytrace=False)


def normalise(text):
    """Without what changes from run to run: paths, hashes, and the numbers Dynamo gives to symbolic sizes."""
    text = re.sub(r"^# kernel path: .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]+", "PATH", text)
    text = re.sub(r"\b[0-9a-fA-F]{32,}\b", "HASH", text)
    numbers = {}
    text = re.sub(r"\bs\d+\b", lambda found: f"s{numbers.setdefault(found[0], len(numbers))}", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
