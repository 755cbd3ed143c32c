"""The house rules as gates: each holds for the checkout, and each is seen to report a file that breaks it."""

import inspect
import warnings

import pytest

from tests.house import sizes, structure, trust, words
from tests.house.source import Source, functions, read_checkout

GATES = [
    sizes.file_length,
    sizes.median_file_length,
    sizes.function_length,
    sizes.parameters,
    sizes.environment,
    structure.import_order,
    structure.naming,
    structure.packaging,
    trust.unsafe,
    words.annotations,
    words.docstrings,
    words.docstring_shapes,
    words.swallowed,
    words.leaks,
]


def gate_name(value):
    return getattr(value, "__name__", None)


@pytest.fixture(scope="module")
def checkout():
    return read_checkout()


@pytest.mark.parametrize("gate", GATES, ids=gate_name)
def test_gate_holds(gate, checkout):
    problems = gate(checkout)
    if problems:
        pytest.fail("\n".join([gate.__doc__, *problems]), pytrace=False)


def test_long_files_are_warned_about(checkout):
    for problem in sizes.file_length_soft(checkout):
        warnings.warn(problem, stacklevel=1)


def test_the_checkout_is_read_whole(checkout):
    paths = {source.path for source in checkout}
    assert {"pyproject.toml", "README.md", ".ci/run", "lowering/errors.py", "tests/test_house.py"} <= paths
    assert not [path for path in paths if path.startswith((".git/", ".venv/"))]


@pytest.mark.parametrize("git", ["knows nothing", "is not installed"])
def test_a_source_archive_is_read_whole(git, tmp_path, monkeypatch):
    files = ["README.md", ".ci/run", ".gitignore", "lowering/builder.py"]
    made = [".venv/a.py", "build/a.py", "diffulex.egg-info/a.txt", "lowering/__pycache__/a.txt", ".mypy_cache/a.json"]
    for name in files + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    if git == "is not installed":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert sorted(source.path for source in read_checkout(tmp_path)) == sorted(files)


def test_every_gate_is_run():
    public = {
        f"{module.__name__}.{f.name}"
        for module in (sizes, structure, trust, words)
        for f in functions(Source("tests/house/gates.py", inspect.getsource(module)))
        if f.public
    }
    assert public == {f"{gate.__module__}.{gate.__name__}" for gate in [*GATES, sizes.file_length_soft]}


LINES_601 = "x = 1\n" * 601
LONG_FUNCTION = "def f() -> None:\n" + "    x = 1\n" * 70
TENSOR_DOC = '''
def moe(hidden_TH: "Tensor") -> int:
    """{}"""
'''


def source(path, text):
    return [Source(path, text)]


# gate, a broken file, a part of the problem that must be reported
BROKEN = [
    (sizes.file_length, "lowering/a.py", LINES_601, "601 lines, at most 600"),
    (sizes.file_length, "lowering/templates/a.jinja", LINES_601, "601 lines, at most 600"),
    (sizes.file_length, "tests/test_a.py", "x = 1\n" * 801, "801 lines, at most 800"),
    (sizes.file_length_soft, "diffulex/a.py", "x = 1\n" * 401, "401 lines"),
    (sizes.median_file_length, "diffulex/a.py", "x = 1\n" * 201, "201 lines, at most 200"),
    (sizes.function_length, "diffulex/a.py", LONG_FUNCTION, "f has 71 lines"),
    (sizes.parameters, "diffulex/a.py", "def f(a, b, *, c, d, e, f, g, h, i): ...", "9 parameters"),
    (sizes.parameters, "diffulex/a.py", "class A:\n    def f(self, a, b, c): ...", "A.f: make c keyword-only"),
    (sizes.parameters, "diffulex/a.py", "class A:\n    @staticmethod\n    def f(a, b, c): ...", "make c keyword-only"),
    (
        sizes.environment,
        "lowering/a.py",
        "A = 'DIFFULEX_A DIFFULEX_B DIFFULEX_C DIFFULEX_D DIFFULEX_E DIFFULEX_F'",
        "6 env",
    ),
    (sizes.environment, "lowering/a.py", "import os\nA = os.environ.get('HOME')", "a.py:2: reads the environment"),
    (sizes.environment, "lowering/a.py", "import os\nA = os.environ['HOME']", "reads the environment"),
    (sizes.environment, "diffulex/a.py", "import os\nA = 'HOME' in os.environ", "reads the environment"),
    (sizes.environment, "diffulex/a.py", "import os\ndef f():\n    return os.getenv('HOME')", "reads the environment"),
    *[
        (sizes.environment, "lowering/a.py", f"import os\n{line}", "a.py:2: reads the environment")
        for line in (
            "A = os.environ.setdefault('HOME', 'x')",
            "A = os.environ.pop('HOME')",
            "A = dict(os.environ)['HOME']",
            "A = {**os.environ}['HOME']",
            "A = f(os.environ)",
            "del os.environ['HOME']",
        )
    ],
    (sizes.environment, "lowering/a.py", "import os as o\nA = o.environ['HOME']", "reads the environment"),
    (sizes.environment, "lowering/a.py", "from os import environ as e\nA = e['HOME']", "reads the environment"),
    (sizes.environment, "lowering/a.py", "from os import getenv\nA = getenv('HOME')", "reads the environment"),
    (
        sizes.environment,
        "lowering/settings.py",
        "import os\nA = os.environ['HOME']",
        "HOME is not a variable of diffulex",
    ),
    (sizes.parameters, "lowering/a.py", "def f(a, b, mode_1: int, c_X: int): ...", "make mode_1, c_X keyword-only"),
    (sizes.parameters, "lowering/a.py", "def f(a, b, mode_1: Tensor): ...", "make mode_1 keyword-only"),
    (
        sizes.parameters,
        "lowering/a.py",
        "class A:\n    def __init__(self, a, b, *, c, d, e, f, g, h, i): ...",
        "A.__init__ has 9 parameters",
    ),
    (structure.import_order, "lowering/ops/a.py", "def f():\n    from ..inductor import b", "ops must not import"),
    (structure.import_order, "lowering/ops/a.py", "import_module('diffulex.moe')", "lowering never imports diffulex"),
    (
        structure.import_order,
        "lowering/ops/a.py",
        "def f():\n    importlib.import_module('lowering.inductor.b')",
        "ops must not import lowering.inductor.b",
    ),
    *[
        (
            words.swallowed,
            "lowering/a.py",
            f"for i in x:\n    try:\n        f()\n    except Exception{rest}",
            "catches every",
        )
        for rest in (":\n        ...", ":\n        break", ":\n        ok = False", " as error:\n        log('failed')")
    ],
    *[
        (words.leaks, "a.md", text, "a.md:1")
        for text in (
            "{} session did it".format("Last"),
            "in {0}home{0}me".format("/"),
            "{} #12".format("Issue"),
            "this work{}".format("place"),
            "by Sub-{}".format("Agents"),
        )
    ],
    (
        structure.import_order,
        "lowering/ops/a.py",
        "from ..inductor import b",
        "ops must not import lowering.inductor.b",
    ),
    (structure.import_order, "lowering/ops/a.py", "from .. import region", "ops must not import lowering.region"),
    (structure.import_order, "lowering/graph/a.py", "import lowering.schedule.b", "graph must not import lowering.sch"),
    (structure.import_order, "lowering/errors.py", "from .spec import A", "errors must not import lowering.spec"),
    (structure.import_order, "lowering/ops/a.py", "from ..report import A", "ops must not import lowering.report"),
    (structure.import_order, "lowering/ops/a.py", "import lowering", "ops must not import lowering"),
    (structure.import_order, "lowering/new.py", "from .errors import A", "new has no place in the order"),
    (structure.import_order, "lowering/ops/a.py", "if True:\n    from ..inductor import b", "ops must not import"),
    (
        structure.import_order,
        "lowering/ops/a.py",
        "def f():\n    import diffulex.moe",
        "lowering never imports diffulex",
    ),
    (
        structure.import_order,
        "lowering/ops/a.py",
        "try:\n    import triton\nexcept ImportError:\n    pass",
        "inside func",
    ),
    (structure.import_order, "diffulex/a.py", "import triton.language as tl", "triton is imported inside functions"),
    (structure.packaging, "lowering/new/a.py", "", "lowering/new/__init__.py is missing"),
    (structure.packaging, "lowering/__init__.py", "def f():\n    import rich.table", "py:2: rich is not declared"),
    (structure.packaging, "lowering/__init__.py", "importlib.import_module('rich')", "rich is not declared"),
    (structure.naming, "lowering/ops/moe_a.py", "", "lowering/reference/moe_a.py is missing"),
    (structure.naming, "lowering/ops/moe_a.py", "", "tests/lowering/ops/test_moe_a.py is missing"),
    (structure.naming, "lowering/ops/_library.py", "S = {'moe_a': '(Tensor a) -> Tensor'}", "ops/moe_a.py is missing"),
    (structure.naming, "lowering/graph/a_pass.py", "def b_pass(): ...", "does not define a_pass"),
    (structure.naming, "lowering/graph/a_pass.py", "", "tests/lowering/graph/test_a_pass.py is missing"),
    (structure.naming, "lowering/reference/a.py", "", "tests/lowering/reference/test_a.py is missing"),
    (structure.naming, "lowering/templates/a.jinja", "@triton.jit\ndef up_kernel(X):\n", "kernel up_kernel should be"),
    (structure.naming, "lowering/templates/a.jinja", "{{def_kernel('X')}}", "is called moe_x.jinja"),
    (structure.naming, "lowering/inductor/a.py", "A = render('moe_up_kernel')", "kernel moe_up_kernel should be"),
    (structure.naming, "lowering/templates/a.py", "@triton.jit\ndef up_kernel(X): ...", "kernel up_kernel should be"),
    (words.annotations, "lowering/a.py", "def f(a, b: int) -> int: ...", "no annotation for a"),
    (words.annotations, "lowering/a.py", "def f(*a: int, **b) -> int: ...", "no annotation for b"),
    (words.annotations, "lowering/a.py", "class A:\n    def _f(self): ...", "A._f: no annotation for the result"),
    (words.annotations, "lowering/a.py", "def f() -> None:\n    def g(a): ...", "f.g: no annotation for a, the result"),
    (words.docstrings, "lowering/a.py", "x = 1", "a.py: no module docstring"),
    (words.docstrings, "lowering/a.py", "class A: ...", "A has no docstring"),
    (words.docstrings, "lowering/a.py", "class A:\n    def f(self) -> int: ...", "A.f has no docstring"),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Take hidden in float32."), "names no shape"),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Read offsets[E], a bool."), "names no shape"),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Take hidden [T, H]."), "names no dtype"),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Print hidden."), "names no shape and no dtype"),
    (words.swallowed, "lowering/a.py", "try:\n    f()\nexcept Exception:\n    pass", "a.py:3: catches everything"),
    (
        words.swallowed,
        "lowering/a.py",
        "def f():\n    try:\n        g()\n    except:\n        return 1",
        "catches everything",
    ),
    (
        words.swallowed,
        "diffulex/a.py",
        "try:\n    f()\nexcept (OSError, Exception) as e:\n    pass",
        "catches everything",
    ),
    (words.swallowed, "diffulex/a.py", "with contextlib.suppress(Exception):\n    f()", "suppresses everything"),
    *[
        (trust.unsafe, "diffulex/a.py", text, f"a.py:1: {problem}")
        for text, problem in (
            ("import pickle", "imports pickle"),
            ("from pickle import loads", "imports pickle"),
            ("import torch as t, marshal", "imports marshal"),
            ("from torch import load", "imports torch.load"),
            ("a = torch.load(file, weights_only=False)", "calls torch.load"),
            ("a = eval(text)", "calls eval"),
            ("exec(text, {})", "calls exec"),
            ("os.system(text)", "calls os.system"),
            ("subprocess.run(text, shell=True)", "passes shell"),
            ("a = AutoModel.from_config(config, trust_remote_code=flag)", "passes trust_remote_code"),
            ("a = importlib.util.spec_from_file_location(name, path)", "makes a module of a file"),
        )
    ],
    (words.leaks, "README.md", "see {0}work{0}main".format("/"), "README.md:1"),
    (words.leaks, "docs/a.md", "\nsee {0}root{0}.cache".format("/"), "docs/a.md:2"),
    (words.leaks, "a.toml", "done in {} session".format("this"), "a.toml:1"),
    (words.leaks, "a.toml", "by a sub{}".format("agent"), "a.toml:1"),
]


@pytest.mark.parametrize(("gate", "path", "text", "problem"), BROKEN, ids=gate_name)
def test_gate_reports_a_broken_file(gate, path, text, problem):
    problems = gate(source(path, text))
    assert any(problem in found for found in problems), problems


# gate, a file that keeps the rule by a hair
SOUND = [
    (sizes.file_length, "lowering/a.py", "x = 1\n" * 600),
    (sizes.function_length, "diffulex/a.py", "def f() -> None:\n" + "    x = 1\n" * 69),
    (sizes.parameters, "diffulex/a.py", "class A:\n    def f(self, a, b, *, c, d, e, f, g, h): ..."),
    (sizes.parameters, "lowering/ops/_a.py", "def check(a, b, c): ..."),
    (sizes.parameters, "lowering/ops/a.py", "def f(a, b, c_TH: Tensor, d_E: Tensor | None): ..."),
    (sizes.parameters, "lowering/a.py", "class _A:\n    def __init__(self, a, b, c): ..."),
    (sizes.parameters, "lowering/ops/a.py", "def _cpu(a, b, c, d, e, f, g, h, i): ..."),
    (sizes.parameters, "lowering/templates/a.py", "@triton.jit\ndef moe(a, b, c, d, e, f, g, h, i): ..."),
    (sizes.environment, "lowering/settings.py", "import os\nA = os.environ.get('DIFFULEX_A')"),
    (sizes.environment, "diffulex/a.py", "import os\nrun(env={**os.environ, 'A': '1'})\nos.environ['A'] = '1'"),
    (structure.import_order, "lowering/graph/a.py", "from ..report import A\nfrom ..ops import b\nfrom .c import d"),
    (structure.import_order, "lowering/__init__.py", "from .inductor import a"),
    (structure.import_order, "lowering/ops/a.py", "def f():\n    import triton\n    from ..templates import a"),
    (structure.import_order, "diffulex/a.py", "from lowering.inductor import a"),
    (structure.packaging, "lowering/__init__.py", "import os\nfrom . import a\nfrom diffulex import b\nimport vllm"),
    (
        structure.naming,
        "lowering/templates/a.jinja",
        "@triton.jit\ndef _moe_up_kernel(X):\n@triton.jit\ndef _tile(X):\n",
    ),
    (structure.naming, "lowering/templates/moe_a.jinja", "{{def_kernel('X')}}"),
    (structure.naming, "lowering/templates/a.py", "A = render('_moe_up_kernel', hook='def_kernel')"),
    (words.annotations, "lowering/a.py", "class A:\n    def f(self, a: int, *b: int) -> int: ..."),
    (words.docstrings, "lowering/__init__.py", ""),
    (words.docstrings, "lowering/a.py", '"""A."""\nclass _A:\n    def f(self) -> int: ...'),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Take hidden [T, H], bf16.")),
    (words.docstring_shapes, "lowering/a.py", TENSOR_DOC.format("Take hidden_TH in any floating dtype.")),
    (words.swallowed, "lowering/a.py", "try:\n    f()\nexcept OSError:\n    pass\nexcept Exception as e:\n    log(e)"),
    (words.swallowed, "lowering/a.py", "try:\n    f()\nexcept Exception:\n    raise"),
    (words.swallowed, "lowering/a.py", "try:\n    f()\nexcept Exception:\n    traceback.print_exc()"),
    (
        trust.unsafe,
        "diffulex/a.py",
        "model.eval()\nre.compile(text)\nsubprocess.run(command, shell=False)\njson.loads(text)",
    ),
    (trust.unsafe, "lowering/templates/standalone.py", "a = importlib.util.spec_from_file_location(name, path)"),
    (words.leaks, "README.md", "pytest's session fixtures, the working folder, network/interfaces"),
]


@pytest.mark.parametrize(("gate", "path", "text"), SOUND, ids=gate_name)
def test_gate_lets_a_sound_file_pass(gate, path, text):
    assert gate(source(path, text)) == []
