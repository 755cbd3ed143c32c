"""Gates on structure: what may import what, and what is called how. A gate returns the list of its problems."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from .source import PACKAGES, Source, functions, in_folders, parse, python_of_packages

# Leaf first. A step may import what stands before it; the members of one step may not import one another.
_ORDER = (
    ("errors",),
    ("spec", "settings", "after_import", "_checks"),
    ("state",),
    ("activation",),
    ("reference",),
    ("ops",),
    ("region",),
    ("graph", "schedule"),
    ("templates",),
    ("inductor",),
)
# `report` itself depends on the leaves alone, and the stages that decide something write to it.
_REPORT_IMPORTS = frozenset({"errors", "spec", "settings"})
_REPORT_WRITERS = frozenset({"graph", "schedule", "templates", "inductor"})
# Allowed in function bodies on top of that: eager CUDA calls render the templates.
_LATE = {"ops": frozenset({"templates"})}
_OPTIONAL = frozenset({"vllm", "deep_ep"})  # imported where a user asks for it by name
_TRITON_AT_IMPORT = ("lowering/templates/", "lowering/inductor/")


def _allowed_imports() -> dict[str, frozenset[str]]:
    allowed = {"report": _REPORT_IMPORTS}
    before: frozenset[str] = frozenset()
    for step in _ORDER:
        for part in step:
            allowed[part] = before | {"report"} if part in _REPORT_WRITERS else before
        before |= frozenset(step)
    return allowed


ALLOWED = _allowed_imports()


def _part(module: str) -> str:
    """The stage that a module of lowering belongs to; empty for the package itself."""
    return [*module.split("."), ""][1]


def _module(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(node: ast.AST, path: str) -> Iterator[str]:
    """The dotted names an import asks for, relative ones made absolute, each imported name appended.

    Calls of `import_module` and `__import__` with a literal count as imports.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = path.split("/")[:-1]
        prefix = base[: len(base) - node.level + 1] if node.level else []
        stem = ".".join(prefix + ([node.module] if node.module else []))
        yield from (f"{stem}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}:
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _module_level(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported, and the TYPE_CHECKING blocks: all but function bodies."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _module_level(list(ast.iter_child_nodes(node)))


def import_order(sources: Sequence[Source]) -> list[str]:
    """Imports against the order of the stages, inside functions too; diffulex in lowering; triton at module import."""
    problems = []
    for source in python_of_packages(sources):
        at_import = set(_module_level(parse(source).body))
        for node in ast.walk(parse(source)):
            for target in _targets(node, source.path):
                problem = _forbidden(source.path, target, at_import=node in at_import)
                if problem:
                    problems.append(f"{source.path}:{getattr(node, 'lineno', 0)}: {problem}")
    return problems


def _forbidden(path: str, target: str, *, at_import: bool) -> str | None:
    """Why the file may not import the target, or None."""
    top, inside_lowering = target.partition(".")[0], path.startswith("lowering/")
    if inside_lowering and top == "diffulex":
        return f"lowering never imports diffulex ({target})"
    if at_import and top == "triton" and not path.startswith(_TRITON_AT_IMPORT):
        return "triton is imported inside functions, when a kernel runs or a template is rendered"
    part = _part(_module(path))
    if not inside_lowering or top != "lowering" or not part or _part(target) == part:
        return None
    if part not in ALLOWED:
        return f"{part} has no place in the order of imports; give it one in tests/house/structure.py"
    allowed = ALLOWED[part] if at_import else ALLOWED[part] | _LATE.get(part, frozenset())
    if _part(target) not in allowed:
        return f"{part} must not import {target}; it may import {', '.join(sorted(allowed)) or 'nothing'}"
    return None


def packaging(sources: Sequence[Source]) -> list[str]:
    """Imports of other projects that pyproject.toml does not declare, and folders of code without an __init__.py."""
    paths = {source.path for source in sources}
    project: dict[str, Any] = next(
        (tomllib.loads(s.text)["project"] for s in sources if s.path == "pyproject.toml"), {}
    )
    declared = {re.split(r"[^\w-]", line)[0] for line in project.get("dependencies", ())}
    known = sys.stdlib_module_names | declared | _OPTIONAL | set(PACKAGES)
    problems = []
    for source in python_of_packages(sources):
        package = f"{PurePosixPath(source.path).parent}/__init__.py"
        if package not in paths:
            problems.append(f"{source.path}: {package} is missing")
        for node in ast.walk(parse(source)):
            foreign = {target.partition(".")[0] for target in _targets(node, source.path)} - known
            problems += [
                f"{source.path}:{getattr(node, 'lineno', 0)}: {name} is not declared" for name in sorted(foreign)
            ]
    return list(dict.fromkeys(problems))


def naming(sources: Sequence[Source]) -> list[str]:
    """Every op has its file, oracle and test; every pass its function and test; every kernel its form of name."""
    texts = {s.path: s for s in sources}
    problems = _op_names(texts) + _pass_names(texts) + _kernel_names(sources) + _mirrored_tests(texts)
    return list(dict.fromkeys(problems))


def _needs(path: str, needed: str, texts: dict[str, Source], *, function: str | None = None) -> list[str]:
    """Problems of a file `path` that must be accompanied by `needed`, which defines `function` at module level."""
    if needed not in texts:
        return [f"{path}: {needed} is missing"]
    if function and function not in {n.name for n in parse(texts[needed]).body if isinstance(n, ast.FunctionDef)}:
        return [f"{needed}: does not define {function}"]
    return []


def _op_names(texts: dict[str, Source]) -> list[str]:
    library = "lowering/ops/_library.py"
    names = set()
    if library in texts:
        strings = (n.value for n in ast.walk(parse(texts[library])) if isinstance(n, ast.Constant))
        names = {value for value in strings if isinstance(value, str) and re.fullmatch(r"moe_[a-z0-9_]+", value)}
    problems = [problem for name in sorted(names) for problem in _needs(library, f"lowering/ops/{name}.py", texts)]
    for path in sorted(texts):
        if match := re.fullmatch(r"lowering/ops/(moe_\w+)\.py", path):
            name = match[1]
            problems += _needs(path, f"lowering/reference/{name}.py", texts, function=f"{name}_reference")
            problems += _needs(path, f"tests/lowering/ops/test_{name}.py", texts)
    return problems


def _pass_names(texts: dict[str, Source]) -> list[str]:
    problems = []
    for path in sorted(texts):
        if match := re.fullmatch(r"lowering/graph/(\w+_pass)\.py", path):
            problems += _needs(path, path, texts, function=match[1])
            problems += _needs(path, f"tests/lowering/graph/test_{match[1]}.py", texts)
    return problems


def _kernel_names(sources: Sequence[Source]) -> list[str]:
    """Whatever is called a kernel is called `_moe_x_kernel`, in templates and where they are given a name."""
    found = []
    problems = []
    for source in in_folders(sources, ["lowering"], suffix=".jinja"):
        found += [(source.path, name) for name in re.findall(r"^\s*def (\w*kernel)\(", source.text, re.MULTILINE)]
        if "def_kernel(" in source.text and not PurePosixPath(source.path).name.startswith("moe_"):
            problems.append(f"{source.path}: a template that defines a kernel is called moe_x.jinja")
    for source in in_folders(sources, ["lowering"]):
        jit = [function.node.name for function in functions(source) if function.is_jit]
        strings = [n.value for n in ast.walk(parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found += [(source.path, name) for name in jit if name.endswith("kernel")]
        found += [(source.path, name) for name in strings if re.fullmatch(r"\w*moe\w*kernel", name)]
    form = re.compile(r"_moe_\w+_kernel")
    bad = [f"{path}: kernel {name} should be called _moe_x_kernel" for path, name in found if not form.fullmatch(name)]
    return problems + bad


def _mirrored_tests(texts: dict[str, Source]) -> list[str]:
    """One test_x.py per public x.py of the ops, the oracles and the graph passes."""
    problems = []
    for path in sorted(texts):
        file = PurePosixPath(path)
        mirrored = file.parent.as_posix() in {"lowering/ops", "lowering/reference", "lowering/graph"}
        if mirrored and file.suffix == ".py" and not file.name.startswith("_"):
            problems += _needs(path, f"tests/{file.parent}/test_{file.name}", texts)
    return problems
