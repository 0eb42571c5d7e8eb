"""The structure holds: arrows point one way, and the README says what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from app.main import create_app
from app.settings import PREFIX, Settings

# Who may import whom, by the longest prefix that fits. Above: what is not listed here is not allowed.
ALLOWED = {
    "app.errors": set(),
    "app.settings": set(),
    "app.networks": {"app.networks"},
    "app.disk": set(),
    "app.store": {"app.networks", "app.disk"},
    "app.rollout": {"app.store", "app.disk"},
    "app.archive": {"app.rollout", "app.store", "app.disk"},
    "app.catalogue": {"app.rollout", "app.store"},
    "app.models": {"app.archive", "app.catalogue", "app.rollout", "app.store", "app.settings"},
    "app.predictors": {"app.predictors", "app.networks", "app.store", "app.errors"},
    "app.machine": set(),
    "app.keys": {"app.disk"},
    "app.counts": set(),
    "app.workers": set(),
    "app.engine": {
        *("app.engine.answer", "app.engine.door", "app.engine.failing", "app.engine.lane", "app.engine.line"),
        "app.engine.watch",
        "app.errors",
    },
    "app.engine.loading": {"app.engine", "app.predictors", "app.store", "app.settings"},
    "app.engine.memory": {"app.engine.loading", "app.engine.watch"},
    "app.engine.shelf": {"app.rollout"},
    "app.engine.survey": {"app.engine.loading", "app.engine.watch", "app.rollout", "app.store"},
    "app.engine.stock": {"app.engine", "app.store", "app.settings"},
    "app.engine.registry": {"app.engine", "app.store", "app.errors"},
    "app.api.admin": {
        *("app.api", "app.archive", "app.catalogue", "app.engine.registry", "app.rollout", "app.store"),
        *("app.settings", "app.errors"),
    },
    "app.api.repository": {"app.api", "app.engine.registry", "app.rollout", "app.settings", "app.errors"},
    "app.access": {"app.engine.watch"},
    "app.tracing": {"app.engine.watch", "app.settings"},
    "app.metrics": {"app.disk", "app.engine.watch", "app.tracing"},
    "app.telemetry": {"app.access", "app.engine.watch", "app.errors", "app.metrics"},
    "app.api": {
        *("app.api", "app.engine.lane", "app.engine.loading", "app.engine.registry"),
        *(
            "app.engine.watch",
            "app.predictors",
            "app.metrics",
            "app.telemetry",
            "app.settings",
            "app.errors",
            "app.store",
        ),
    },
    "app.api.callers": {"app.counts", "app.engine.door", "app.errors", "app.keys", "app.settings"},
    "app.server": {"app.api", "app.engine.registry", "app.settings", "app.workers"},
    "app.main": {
        *("app.api", "app.engine.loading", "app.engine.registry", "app.machine", "app.rollout", "app.server"),
        *("app.access", "app.metrics", "app.settings", "app.telemetry", "app.tracing", "app.workers"),
    },
    "training": {
        *("training", "app.disk", "app.networks", "app.rollout", "app.store", "app.predictors", "app.errors"),
    },
}


def modules() -> list[tuple[str, ast.Module]]:
    paths = [path for folder in ("app", "training") for path in sorted((ROOT / folder).rglob("*.py"))]
    named = [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]
    return [(name.removesuffix(".__init__"), ast.parse(path.read_text())) for name, path in named]


def imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = (ROOT / Path(*module.split("."))).is_dir() and (ROOT / module.split(".")[0]).is_dir()
            found |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def test_arrows_point_one_way() -> None:
    wrong = []
    for name, tree in modules():
        if name == "app":  # sets the environment, before anything else is imported
            continue
        rule = max((prefix for prefix in ALLOWED if within(name, prefix)), key=len)
        ours = {found for found in imports(tree) if found.split(".")[0] in ("app", "training")}
        wrong += [f"{name} -> {found}" for found in ours if not any(within(found, to) for to in ALLOWED[rule])]
    assert not wrong


@pytest.mark.parametrize("name", ["answer", "batcher", "text", "door", "failing", "lane", "line", "watch"])
def test_the_engine_knows_neither_torch_nor_http(name: str) -> None:
    found = {module.split(".")[0] for module in imports(dict(modules())[f"app.engine.{name}"])}
    assert not found & {"torch", "numpy", "fastapi", "starlette", "uvicorn", "httpx"}


def test_networks_import_torch_and_nothing_of_ours() -> None:
    for name, tree in modules():
        if within(name, "app.networks"):
            found = {module.split(".")[0] for module in imports(tree)}
            assert found <= {
                "__future__",
                "collections",
                "dataclasses",
                "functools",
                "itertools",
                "abc",
                "typing",
                "torch",
                "app",
            }, name


def test_no_pickle_is_loaded_by_the_service() -> None:
    for name, tree in modules():
        if within(name, "app"):
            assert not {"pickle", "dill", "joblib", "shelve"} & imports(tree), name
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert "torch.load" not in calls, name


def readme_table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the README."""
    text = (ROOT / "README.md").read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_readme_lists_every_setting() -> None:
    stated = {row[0].strip("`"): row[1].strip("`") for row in readme_table("Settings")}
    fields = Settings.model_fields
    assert stated == {PREFIX + name.upper(): str(field.default) for name, field in fields.items()}


def test_the_readme_lists_every_endpoint() -> None:
    stated = {row[0].strip("`") for row in readme_table("Endpoints")}
    paths = create_app(Settings(store=ROOT / "models_store")).openapi()["paths"]
    documented = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert stated == documented | {"GET /", "GET /docs"}


def test_the_readme_lists_every_make_target() -> None:
    stated = {row[0].strip("`").removeprefix("make ").split(" ")[0] for row in readme_table("Make targets")}
    assert stated == set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
