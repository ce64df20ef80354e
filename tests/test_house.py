"""House rules that a reader relies on: floors, no code inside strings, small functions, commands that run from the root."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

# Which of our modules each may import, besides its own package. Commands and tools may import all of these; `run.errors` is open to all.
MAY_IMPORT = {
    "utils": "",
    "model": "",
    "run": "utils model",
    "losses": "run",
    "loading": "utils run",
    "sources": "utils run loading",
    "datasets": "utils run loading sources",
    "engine": "utils run loading losses",
    "distillation": "utils run loading model datasets engine",
    "deployment": "utils run loading sources datasets engine",
    "robustness": "utils run loading sources datasets engine reporting",
    "reporting": "run loading model distillation deployment",
    "measuring": "utils run model loading losses engine distillation deployment reporting",
    "preflight": "utils run loading model losses datasets engine distillation measuring",
    "refining": "utils run loading sources datasets engine",
    "publishing": "run model deployment measuring",
    "features": "utils run model loading engine deployment reporting",
    "detection": "utils run loading sources engine features deployment",
    "segmentation": "utils run loading sources engine features deployment reporting",
}
PACKAGES = sorted(path.parent.name for path in ROOT.glob("[!.]*/__init__.py") if path.parent.name not in ("tests", "benchmarks"))
COMMANDS = {path.stem for path in ROOT.glob("*.py")} - set(MAY_IMPORT)
FILES = sorted(path for folder in (".", *PACKAGES, "tools", "benchmarks", "tests", "tests/*") for path in ROOT.glob(f"{folder}/*.py"))
OURS = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]


def imports(tree: ast.AST):
    """Names of modules, and `module.name` of what is imported from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in OURS}


def imported_modules(path) -> set[str]:
    """Our own modules that a file imports."""
    names = set(imports(ast.parse(path.read_text())))
    return (names | {name.rpartition(".")[0] for name in names}) & set(MODULES) - {module_of(path)}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_packages_import_what_the_table_allows(name):
    allowed = {name, *MAY_IMPORT[name].split()}
    for path in [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py")):
        tops = {module.partition(".")[0] for module in imported_modules(path) - {"run.errors", "run"}}
        assert tops <= allowed, path


def test_every_package_is_in_the_table_and_nothing_imports_in_a_circle():
    assert set(PACKAGES) <= set(MAY_IMPORT)
    list(TopologicalSorter({name: allowed.split() for name, allowed in MAY_IMPORT.items()}).static_order())
    list(TopologicalSorter({module: imported_modules(path) for module, path in MODULES.items()}).static_order())


def test_nothing_is_imported_from_commands():
    """But main.py's own entry, by the published name for evaluating."""
    users = {(module, name) for module, path in MODULES.items() for name in imported_modules(path) if name in COMMANDS}
    assert users == {("moganet_valid", "main")}


def test_commands_in_folders_find_the_project():
    """Python puts the folder of a file that is run by its path on sys.path, not the root."""
    for path in (*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("model/*.py")):
        text = path.read_text()
        if 'if __name__ == "__main__":' in text and imported_modules(path):
            assert "sys.path[0] = str(" in text, path


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_what_their_files_hold(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    listed = re.findall(r"^(\w+\.py) ", ast.get_docstring(tree), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")
    assert len(tree.body) == 1 or package == "model"  # which registers its architectures


def test_architectures_import_what_they_share_but_not_each_other():
    shared = {"layers", "depthwise", "mixers", "recconv", "nets", "recompute", "registration", "ska", "ska_triton", "profile"}
    families = {f"model.{path.stem}" for path in (ROOT / "model").glob("*.py") if path.stem not in {"__init__", *shared}}
    for family in sorted(families):
        assert imported_modules(MODULES[family]) & families == set(), family


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_in_docstrings_and_no_long_functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            lines = (ast.get_docstring(node) or "").splitlines()
            assert [line for line in lines if re.match(r"\s*(def |class |return |import |from \w+ import |self\.)", line)] == []


def test_tensors_are_moved_to_the_device_that_was_chosen():
    assert [module for module, path in MODULES.items() if re.search(r"\.cuda\(", path.read_text())] == []


def test_main_is_a_table_of_contents():
    tree = ast.parse((ROOT / "main.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1 <= 40, node.name
