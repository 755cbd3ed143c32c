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
TENSOR_NAME = re.compile(r"_[A-Z][A-Z0-9]{0,3}$")
# model code calls these as the Diffulex engine's own functions of these names
ENGINE_CALLS = frozenset({"build_mlp_or_moe", "build_moe_block", "build_topk_router"})
ENVIRONMENT_VARIABLES = 5
SETTINGS_MODULE = "lowering/settings.py"
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})

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

    Private functions, special methods other than constructors and Triton functions are free: a schema or a framework
    dictates their signatures.
    """
    problems = []
    for source in python_of_packages(sources):
        for function in functions(source):
            if not function.public or function.is_jit or (is_dunder(function.name) and not function.is_constructor):
                continue
            if len(function.parameters) > PARAMETERS:
                problems.append(f"{function.where} has {len(function.parameters)} parameters, at most {PARAMETERS}")
            late = [arg.arg for arg in function.positional[POSITIONAL:] if not _is_tensor(arg)]
            if late and function.name not in ENGINE_CALLS:
                extra = ", ".join(late)
                problems.append(f"{function.where}: make {extra} keyword-only, as everything after the second")
    return problems


def _is_tensor(arg: ast.arg) -> bool:
    typed = arg.annotation is not None and re.search(r"\bTensor\b", ast.unparse(arg.annotation))
    return bool(typed and TENSOR_NAME.search(arg.arg))


def environment(sources: Sequence[Source]) -> list[str]:
    """More than five DIFFULEX_* names, other names in lowering/settings.py, or the environment read anywhere else."""
    packages = python_of_packages(sources)
    names = sorted({name for s in packages for name in re.findall(r"\bDIFFULEX_[A-Z0-9_]+\b", s.text)})
    problems = []
    if len(names) > ENVIRONMENT_VARIABLES:
        problems.append(f"{len(names)} environment variables, at most {ENVIRONMENT_VARIABLES}: {', '.join(names)}")
    for source in packages:
        if source.path == SETTINGS_MODULE:
            problems += _foreign_names(source)
            continue
        problems += [
            f"{source.path}:{node.lineno}: reads the environment; {SETTINGS_MODULE} is the one place for that"
            for node in _environment_reads(parse(source))
        ]
    return problems


def _foreign_names(source: Source) -> list[str]:
    """Names of variables in the settings that are not ours."""
    strings = [(n.lineno, n.value) for n in ast.walk(parse(source)) if isinstance(n, ast.Constant)]
    return [
        f"{source.path}:{line}: {name} is not a variable of diffulex"
        for line, name in strings
        if isinstance(name, str) and re.fullmatch(r"(?!DIFFULEX_)[A-Z][A-Z0-9_]{2,}", name)
    ]


def _environment_reads(tree: ast.Module) -> list[ast.expr]:
    """Every mention of the environment but `os.environ[name] = value` and `env={**os.environ, ...}` for a child."""
    modules, names = {"os"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.name == "os" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names |= {alias.asname or alias.name for alias in node.names if alias.name in _ENVIRONMENT}
    free: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            free.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg == "env" and isinstance(node.value, ast.Dict):
            free |= {value for key, value in zip(node.value.keys, node.value.values, strict=True) if key is None}
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in _ENVIRONMENT and ast.unparse(node.value) in modules
        if (attribute or (isinstance(node, ast.Name) and node.id in names)) and node not in free:
            found.append(node)  # type: ignore[arg-type]
    return found
