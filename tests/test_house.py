"""House rules that a reader relies on: floors, no code inside strings, small functions, commands that run from the root."""

import ast
import re

import pytest

from tests.conftest import ROOT

FLOORS = {"errors": 0, "config": 1, "utils": 1, "losses": 2, "pixels": 1, "augment": 2, "keys": 2, "model": 2}
FLOORS |= {
    "datasets": 3,
    "optim": 3,
    "checkpoint": 3,
    "teacher": 3,
    "export": 3,
    "records": 3,
    "run_logs": 2,
    "plots": 3,
    "coreml_eval": 1,
    "label_store": 2,
    "teacher_labels": 3,
    "engine": 4,
    "verify": 4,
    "compare_logs": 5,
    "coreml": 5,
    "main": 5,
    "formats": 6,
    "timing": 7,
    "fuse_eval": 6,
    "publish": 7,
    "upload": 7,
}
FILES = sorted(path for folder in (".", "model", "tools", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py"))


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("name", [name for name in FLOORS if name != "model" and (ROOT / f"{name}.py").exists()])
def test_files_import_from_lower_floors_only(name):
    """`augment` may use `keys` beside it: what it draws is keyed; `teacher` and `records` read through `checkpoint`."""
    allowed = {
        ("augment", "keys"),
        ("teacher", "checkpoint"),
        ("teacher", "datasets"),
        ("export", "checkpoint"),
        ("teacher_labels", "datasets"),
        ("teacher_labels", "teacher"),
        ("records", "checkpoint"),
    }
    wrong = []
    for module in imports(ast.parse((ROOT / f"{name}.py").read_text())):
        top = module.partition(".")[0]
        if top in FLOORS and FLOORS[top] >= FLOORS[name] and (name, top) not in allowed:
            wrong.append(top)
    assert wrong == []


def test_architectures_import_layers_but_not_each_other():
    families = {path.stem for path in (ROOT / "model").glob("*.py")} - {"__init__", "layers", "profile", "ska"}
    for family in families:
        used = {name.removeprefix("model.") for name in imports(ast.parse((ROOT / "model" / f"{family}.py").read_text())) if name.startswith("model.")}
        assert used & families == set(), family


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_in_docstrings_and_no_long_functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            lines = (ast.get_docstring(node) or "").splitlines()
            assert [line for line in lines if re.match(r"\s*(def |class |return |import |from \w+ import |self\.)", line)] == []


def test_only_utils_knows_the_literal_cuda():
    users = {
        path.name
        for path in FILES
        if path.parent == ROOT and path.name not in ("utils.py", "config.py", "speed_gpu.py") and re.search(r"\.cuda\(", path.read_text())
    }
    assert users == set()


def test_main_is_a_table_of_contents():
    tree = ast.parse((ROOT / "main.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1 <= 40, node.name
