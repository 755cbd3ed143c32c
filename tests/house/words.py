"""Gates on what is written: annotations, docstrings, lost reasons, words. A gate returns the list of its problems."""

import ast
import re
from collections.abc import Sequence

from .source import Function, Source, functions, is_dunder, parse, python_of_packages

# [T, H], [E+1], [..., H], [] or a name with a shape suffix such as hidden_TH.
_SHAPE = re.compile(r"(?<!\w)\[(?:[A-Z*.0-9][\w+*/. -]*(?:,\s*[\w+*/. -]+)*)?\]|\b[a-z0-9]\w*_[A-Z][A-Z0-9]{0,5}\b")
_DTYPE = re.compile(
    r"\b(?:dtypes?|(?:fp|f|i|u|int|uint|float)(?:8|16|32|64)|bf16|bfloat16|ints?|integers?|bool(?:ean)?s?|floats?|floating)\b"
)
# Paths of one machine and words about how the project is made: the project speaks of itself alone.
_LEAK = re.compile(
    r"/(?:work|farm|root|home|users)/|\b(?:this|next|last|previous|earlier) ses[s]ions?\b|\bC[E]O\b"
    r"|\bsub-?[a]gents?\b|\bwork[p]lace\b|\b(?:issue|ticket|task) ?#\d",
    re.IGNORECASE,
)
_ALL_EXCEPTIONS = frozenset({"Exception", "BaseException"})
_TELLERS = re.compile(r"traceback\.\w+|sys\.exc_info|(?:\w+\.)*(?:logger|log|logging)\.exception")


def annotations(sources: Sequence[Source]) -> list[str]:
    """Functions of the packages, nested and private ones too, with an unannotated parameter or result."""
    problems = []
    for source in python_of_packages(sources):
        for function in functions(source):
            if function.is_jit:
                continue
            missing = [arg.arg for arg in function.parameters if arg.annotation is None]
            missing += ["the result"] if function.node.returns is None else []
            if missing:
                problems.append(f"{function.where}: no annotation for {', '.join(missing)}")
    return problems


def docstrings(sources: Sequence[Source]) -> list[str]:
    """Modules, public classes and public functions of the packages without a docstring."""
    problems = []
    for source in python_of_packages(sources):
        tree = parse(source)
        if tree.body and ast.get_docstring(tree) is None:
            problems.append(f"{source.path}: no module docstring")
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        bare = [f"{source.path}:{node.lineno}: {node.name}" for node in classes if ast.get_docstring(node) is None]
        for function in functions(source):
            if function.public and not is_dunder(function.name) and ast.get_docstring(function.node) is None:
                bare.append(function.where)
        problems += [f"{where} has no docstring" for where in bare]
    return problems


def docstring_shapes(sources: Sequence[Source]) -> list[str]:
    """Public functions that take or return tensors and whose docstrings name no shape or no dtype."""
    problems = []
    for source in python_of_packages(sources):
        for function in functions(source):
            if not function.public or is_dunder(function.name) or not _handles_tensors(function):
                continue
            text = ast.get_docstring(function.node) or ""
            missing = [what for what, form in (("shape", _SHAPE), ("dtype", _DTYPE)) if not form.search(text)]
            if missing:
                problems.append(f"{function.where}: the docstring names no {' and no '.join(missing)}")
    return problems


def _handles_tensors(function: Function) -> bool:
    notes = [arg.annotation for arg in function.parameters] + [function.node.returns]
    return any(note is not None and re.search(r"\bTensor\b", ast.unparse(note)) for note in notes)


def swallowed(sources: Sequence[Source]) -> list[str]:
    """Handlers that catch everything and neither raise nor look at what they caught, so that the reason is lost."""
    problems = []
    for source in python_of_packages(sources):
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.ExceptHandler) and _catches_all(node) and _loses_reason(node):
                problems.append(f"{source.path}:{node.lineno}: catches everything and loses the reason")
            elif isinstance(node, ast.Call) and _suppresses_all(node):
                problems.append(f"{source.path}:{node.lineno}: suppresses everything and loses the reason")
    return problems


def _loses_reason(handler: ast.ExceptHandler) -> bool:
    for node in (inner for statement in handler.body for inner in ast.walk(statement)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Name) and node.id == handler.name):
            return False
        if isinstance(node, ast.Call) and _TELLERS.fullmatch(ast.unparse(node.func)):
            return False
    return True


def _suppresses_all(call: ast.Call) -> bool:
    named = ast.unparse(call.func) in {"suppress", "contextlib.suppress"}
    return named and any(ast.unparse(arg) in _ALL_EXCEPTIONS for arg in call.args)


def _catches_all(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(one) in _ALL_EXCEPTIONS for one in caught)


def leaks(sources: Sequence[Source]) -> list[str]:
    """Lines of any file with a path of one machine or a word about how the project is made."""
    return [
        f"{source.path}:{number}: {match[0]!r}"
        for source in sources
        if not source.path.endswith(".lock")
        for number, line in enumerate(source.text.splitlines(), 1)
        if (match := _LEAK.search(line))
    ]
