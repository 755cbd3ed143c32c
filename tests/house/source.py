"""The files of the checkout and the functions in them, as the gates see them."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("diffulex", "lowering")
_HIDDEN_SOURCES = frozenset({".ci", ".github", ".gitignore", ".gitattributes"})
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One file: its path from the root of the checkout, with forward slashes, and its text."""

    path: str
    text: str


class Function(NamedTuple):
    """A function or method and where it stands. `public` is False in private modules, private classes and functions;
    constructors are as public as their class.
    """

    path: str
    name: str
    node: FunctionNode
    public: bool
    owner: ast.ClassDef | None

    @property
    def where(self) -> str:
        """`path:line: name`, the start of every problem report."""
        return f"{self.path}:{self.node.lineno}: {self.name}"

    @property
    def is_constructor(self) -> bool:
        """Whether it is the `__init__` of a class."""
        return self.owner is not None and self.node.name == "__init__"

    @property
    def is_jit(self) -> bool:
        """Whether it is a Triton function, whose signature and annotations are Triton's."""
        return any("jit" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    @property
    def positional(self) -> list[ast.arg]:
        """Parameters that may be passed by position, without self or cls."""
        args = self.node.args.posonlyargs + self.node.args.args
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in self.node.decorator_list)
        return args[1:] if self.owner is not None and not static else args

    @property
    def parameters(self) -> list[ast.arg]:
        """All parameters without self or cls; *args and **kwargs count once each."""
        args = self.node.args
        return self.positional + args.kwonlyargs + [arg for arg in (args.vararg, args.kwarg) if arg is not None]


@functools.cache
def parse(source: Source) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(source.text, source.path)


def read_checkout(root: Path = ROOT) -> list[Source]:
    """Every text file that git tracks or would track; without git, every file outside hidden and built folders."""
    paths = _listed_by_git(root)
    if paths is None:
        paths = [path for path in root.rglob("*") if not any(map(_is_built, path.relative_to(root).parts))]
    paths.sort()
    return [Source(path.relative_to(root).as_posix(), text) for path in paths if (text := _read_text(path)) is not None]


def _listed_by_git(root: Path) -> list[Path] | None:
    """What git tracks or would track; None where there is no git, or where it knows nothing of the folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    names = {name for name in listing.stdout.decode().split("\0") if name}
    return [root / name for name in names] if listing.returncode == 0 and names else None


def _is_built(part: str) -> bool:
    """Whether a file or folder of this name is made and not written: environments, caches, builds."""
    hidden = part.startswith(".") and part not in _HIDDEN_SOURCES
    return hidden or part in {"build", "dist", "results", "__pycache__"} or part.endswith(".egg-info")


def _read_text(path: Path) -> str | None:
    """The text of a file; None for what is gone from the work tree, is a folder or is not text."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return None


def in_folders(sources: Iterable[Source], folders: Sequence[str], *, suffix: str = ".py") -> list[Source]:
    """The files under the given top-level folders whose names end in `suffix`."""
    return [s for s in sources if s.path.split("/")[0] in folders and s.path.endswith(suffix)]


def python_of_packages(sources: Iterable[Source]) -> list[Source]:
    """The Python files of diffulex and lowering."""
    return in_folders(sources, PACKAGES)


def functions(source: Source) -> Iterator[Function]:
    """Every function of a file, methods and nested ones included."""
    private = any(part.startswith("_") and not part.startswith("__") for part in source.path.split("/"))
    yield from _functions(source.path, parse(source), prefix="", owner=None, public=not private)


def _functions(
    path: str, parent: ast.AST, *, prefix: str, owner: ast.ClassDef | None, public: bool
) -> Iterator[Function]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, FunctionNode):
            visible = public and (not node.name.startswith("_") or (owner is not None and node.name == "__init__"))
            yield Function(path, prefix + node.name, node, visible, owner)
            yield from _functions(path, node, prefix=f"{prefix}{node.name}.", owner=None, public=False)
        elif isinstance(node, ast.ClassDef):
            visible = public and not node.name.startswith("_")
            yield from _functions(path, node, prefix=f"{prefix}{node.name}.", owner=node, public=visible)
        else:
            yield from _functions(path, node, prefix=prefix, owner=owner, public=public)


def is_dunder(name: str) -> bool:
    """Whether the last part of a dotted name is a special method."""
    last = name.rsplit(".", 1)[-1]
    return last.startswith("__") and last.endswith("__")
