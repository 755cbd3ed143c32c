"""The gate on what could run what a file or a stranger's text holds. It returns the list of its problems."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from .source import Source, parse, python_of_packages

_UNPICKLERS = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
# by the end of what is called: torch.load and its like unpickle
_CALLS = ("torch.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load")
_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
_TRUE = frozenset({"shell", "allow_pickle", "trust_remote_code", "weights_only"})
# Texts of our own templates become a module there, by a name of their hash in a folder that is the user's alone.
_LOADERS = frozenset({"lowering/templates/standalone.py"})


def unsafe(sources: Sequence[Source]) -> list[str]:
    """Code of the packages that unpickles, evaluates text, asks a shell, or makes a module of a file."""
    return [
        f"{source.path}:{getattr(node, 'lineno', 0)}: {problem}"
        for source in python_of_packages(sources)
        for node in ast.walk(parse(source))
        for problem in _problems(node, source.path)
    ]


def _problems(node: ast.AST, path: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        names = []
    for name in names:
        if name.partition(".")[0] in _UNPICKLERS or name in _CALLS:
            yield f"imports {name}"
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    if isinstance(node.func, ast.Name) and called in _BUILTINS:
        yield f"calls {called}"
    if any(called == name or called.endswith(f".{name}") for name in _CALLS):
        yield f"calls {called}"
    if called.endswith("spec_from_file_location") and path not in _LOADERS:
        yield "makes a module of a file"
    for keyword in node.keywords:
        if keyword.arg in _TRUE and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            yield f"passes {keyword.arg}"
