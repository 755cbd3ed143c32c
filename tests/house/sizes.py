"""Gates on size: files, functions, parameters, environment variables. A gate returns the list of its problems."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Sequence

from .source import Source, functions, in_folders, is_dunder, parse, python_of_packages

SOFT_LINES, HARD_LINES, TEST_LINES, MEDIAN_LINES = 400, 600, 800, 200
FUNCTION_LINES = 70
PARAMETERS, POSITIONAL = 8, 2
# tensors named with their shape (hidden_TH, order_N, logits_TE) may stand by position, as in the ops' own signatures
TENSOR_NAME = re.compile(r"_[A-Z0-9]{1,4}$")
# model code calls these as the Diffulex engine's own functions of these names
ENGINE_CALLS = frozenset({"build_mlp_or_moe", "build_moe_block", "build_topk_router"})
ENVIRONMENT_VARIABLES = 5
SETTINGS_MODULE = "lowering/settings.py"

_CODE_FOLDERS = ("diffulex", "lowering", "benchmarks")


def _code_files(sources: Sequence[Source]) -> list[Source]:
    return in_folders(sources, _CODE_FOLDERS) + in_folders(sources, _CODE_FOLDERS, suffix=".jinja")


def _lines(source: Source) -> int:
    return len(source.text.splitlines())


def file_length(sources: Sequence[Source]) -> list[str]:
    """Files over the hard limit: 600 lines for code and templates, 800 for tests."""
    limits = [(s, HARD_LINES) for s in _code_files(sources)] + [(s, TEST_LINES) for s in in_folders(sources, ["tests"])]
    return [f"{s.path}: {_lines(s)} lines, at most {limit}" for s, limit in limits if _lines(s) > limit]


def file_length_soft(sources: Sequence[Source]) -> list[str]:
    """Files over the soft limit of 400 lines: reported as warnings, to be split before they reach the hard one."""
    long = [s for s in _code_files(sources) if _lines(s) > SOFT_LINES]
    return [f"{s.path}: {_lines(s)} lines, better at most {SOFT_LINES}" for s in long]


def median_file_length(sources: Sequence[Source]) -> list[str]:
    """The median of the packages' non-empty files is at most 200 lines."""
    lines = [_lines(s) for s in python_of_packages(sources) if s.text.strip()]
    median = statistics.median(lines) if lines else 0
    return [f"the median file has {median:.0f} lines, at most {MEDIAN_LINES}"] if median > MEDIAN_LINES else []


def function_length(sources: Sequence[Source]) -> list[str]:
    """Functions of more than 70 lines."""
    problems = []
    for source in in_folders(sources, _CODE_FOLDERS):
        for function in functions(source):
            lines = (function.node.end_lineno or function.node.lineno) - function.node.lineno + 1
            if lines > FUNCTION_LINES:
                problems.append(f"{function.where} has {lines} lines, at most {FUNCTION_LINES}")
    return problems


def parameters(sources: Sequence[Source]) -> list[str]:
    """Public functions with more than 8 parameters, or with more than two that may be passed by position.

    Private functions, special methods and Triton functions are free: a schema or a framework dictates their signatures.
    """
    problems = []
    for source in python_of_packages(sources):
        for function in functions(source):
            if not function.public or is_dunder(function.name) or function.is_jit:
                continue
            if len(function.parameters) > PARAMETERS:
                problems.append(f"{function.where} has {len(function.parameters)} parameters, at most {PARAMETERS}")
            late = [arg.arg for arg in function.positional[POSITIONAL:] if not TENSOR_NAME.search(arg.arg)]
            if late and function.name not in ENGINE_CALLS:
                extra = ", ".join(late)
                problems.append(f"{function.where}: make {extra} keyword-only, as everything after the second")
    return problems


def environment(sources: Sequence[Source]) -> list[str]:
    """More than five DIFFULEX_* names, or any environment variable read outside lowering/settings.py."""
    packages = python_of_packages(sources)
    names = sorted({name for s in packages for name in re.findall(r"\bDIFFULEX_[A-Z0-9_]+\b", s.text)})
    problems = []
    if len(names) > ENVIRONMENT_VARIABLES:
        problems.append(f"{len(names)} environment variables, at most {ENVIRONMENT_VARIABLES}: {', '.join(names)}")
    for source in packages:
        if source.path == SETTINGS_MODULE:
            continue
        problems += [
            f"{source.path}:{node.lineno}: reads the environment; {SETTINGS_MODULE} is the one place for that"
            for node in ast.walk(parse(source))
            if isinstance(node, ast.expr) and _reads_environment(node)
        ]
    return problems


def _reads_environment(node: ast.expr) -> bool:
    """Whether the expression reads a named variable; writing one, or handing all of them to a child, is no reading."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in {"os.getenv", "getenv", "os.environ.get", "environ.get"}
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Load) and _is_environ(node.value)
    return isinstance(node, ast.Compare) and any(_is_environ(other) for other in node.comparators)


def _is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) in {"os.environ", "environ"}
