"""The shape of the code: directions of imports, and limits on the sizes of files, functions and folders."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Container, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from setuptools import find_packages
from support.service import ROOT

# Layers from the bottom up. A module imports its own folder and the layers below, never a layer above.
LAYERS = (
    ("app.errors", "app.settings", "app.networks"),
    ("app.store",),
    ("app.engine", "app.tasks"),
    ("app.serving", "app.importing", "app.exporting"),
    ("app.observability",),
    ("app.api", "app.key_file"),
    ("app.server",),
    ("app.main", "app.cli", "app.models", "app.keys"),
)
FORBIDDEN_IMPORTS = {  # imports of other modules in the same layer
    "app.engine": ("app.tasks", "app.store", "app.networks", "app.settings"),
    "app.tasks": ("app.engine",),
}
TRAINING_LAYERS = (
    (
        *("training.configs", "training.options", "training.run", "training.publishing"),
        *("training.checkpoints", "training.evaluation_log", "training.refit"),
        *("training.data.datasets", "training.evaluation.speed", "training.loops.distributed"),
    ),
    ("training.data", "training.evaluation", "training.loops"),
    (
        *("training.cnn", "training.rnn", "training.lstm", "training.gan", "training.recalibrate"),
        *("training.data.__main__", "training.evaluation.compare_forecasters", "training.evaluation.evaluate"),
    ),
)
IMPORTED_BY_TRAINING = (  # modules of app/ that training/ may import
    "app.networks",
    "app.store",
    "app.tasks",
    "app.errors",
)


def layer(name: str) -> int:
    """Return the layer number of a module, which is the number of its longest known prefix."""
    rows = TRAINING_LAYERS if within(name, "training") else LAYERS
    matches = [(len(prefix), number) for number, row in enumerate(rows) for prefix in row if within(name, prefix)]
    return max(matches)[1]


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return the name and the syntax tree of each module of app/ and training/."""
    paths = [path for folder in ("app", "training") for path in sorted((ROOT / folder).rglob("*.py"))]
    files = [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]
    return [(name.removesuffix(".__init__"), ast.parse(path.read_text())) for name, path in files]


def imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = (ROOT / Path(*module.split("."))).is_dir() and (ROOT / module.split(".")[0]).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    return names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def test_imports_go_from_higher_to_lower_layers_only() -> None:
    violations = []
    for name, tree in modules():
        if name == "app":  # app sets environment variables before other imports
            continue
        for imported in imports(tree):
            if within(imported, "training"):
                allowed = within(name, "training") and layer(imported) <= layer(name)
            elif not within(imported, "app") or imported == "app":
                continue
            elif within(name, "training"):
                allowed = any(within(imported, prefix) for prefix in IMPORTED_BY_TRAINING)
            else:
                own = max((prefix for row in LAYERS for prefix in row if within(name, prefix)), key=len)
                forbidden = any(within(imported, prefix) for prefix in FORBIDDEN_IMPORTS.get(own, ()))
                allowed = layer(imported) <= layer(name) and not forbidden
            if not allowed:
                violations.append(f"{name} -> {imported}")
    assert not violations


def test_imports_have_no_cycle() -> None:
    """The imports of app/ and training/ have no cycle. Imports under TYPE_CHECKING and inside functions count, too."""
    trees = dict(modules())
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        imported = {full for module, alias in imported_names(tree) for full in (module, f"{module}.{alias}")}
        graph[name] = {longest for full in imported if (longest := known_module(full, trees))} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import cycle: {' -> '.join(error.args[1])}") from None


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import. The name is empty for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def known_module(name: str, known: Container[str]) -> str:
    """Return the longest prefix of a dotted name that is a known module, or an empty string."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def test_the_engine_imports_neither_torch_nor_http_packages() -> None:
    for name, tree in modules():
        if within(name, "app.engine"):
            packages = {module.split(".")[0] for module in imports(tree)}
            assert not packages & {"torch", "numpy", "fastapi", "starlette", "uvicorn", "httpx"}, name


def test_networks_import_only_torch_app_and_the_standard_library() -> None:
    for name, tree in modules():
        if within(name, "app.networks"):
            packages = {module.split(".")[0] for module in imports(tree)}
            assert packages <= {
                "__future__",
                "collections",
                "dataclasses",
                "functools",
                "itertools",
                "abc",
                *(
                    "ast",
                    "json",
                    "math",
                    "numpy",
                    "onnxruntime",
                    "operator",
                    "re",
                ),  # packages that imported networks need
                "typing",
                "torch",
                "app",
            }, name


def test_no_folder_has_more_than_twelve_files() -> None:
    files = [
        file for top in ("app", "benchmarks", "deploy", "docs", "tests", "training") for file in (ROOT / top).rglob("*")
    ]
    counts = Counter(file.parent for file in files if file.is_file() and file.parent.name != "__pycache__")
    assert not [str(folder.relative_to(ROOT)) for folder, count in counts.items() if count > 12]


def test_the_wheel_holds_all_packages_of_app_and_training() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = set(find_packages(str(ROOT), include=settings["include"]))
    folders = [path.parent for folder in ("app", "training") for path in (ROOT / folder).rglob("*.py")]
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= packages


def test_files_have_at_most_400_lines_and_functions_60() -> None:
    too_long = []
    for folder in ("app", "benchmarks", "training"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text, name = path.read_text(), path.relative_to(ROOT)
            if text.count("\n") > 400:
                too_long.append(str(name))
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno
                    if node.end_lineno - node.lineno >= 60:
                        too_long.append(f"{name}: {node.name}")
    assert not too_long
