"""The table of tasks matches the networks, the API and the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from support.networks import publish_tiny

from app.api.open_inference.tensors import MODELS
from app.main import create_app
from app.networks import KINDS
from app.settings import Settings
from app.store import TaskName
from app.tasks import TASKS


def test_each_table_has_one_line_per_task() -> None:
    names = set(get_args(TaskName))
    assert names == set(TASKS) == set(MODELS) == {kind.task or "infer" for kind in KINDS.values()}
    assert all(name == task.name for name, task in TASKS.items())


def test_the_paths_and_options_of_each_task_exist(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    paths = create_app(Settings(store=tmp_path)).openapi()["paths"]
    own = [path for task in TASKS.values() for path in task.paths]
    assert len(set(own)) == len(own)
    assert set(own) == {path for path, methods in paths.items() if "post" in methods and path.count("/") == 3} - {
        path for path in paths if path.startswith(("/v1/admin", "/v2/"))
    } | {"/v1/completions"}
    assert all(option in Settings.model_fields for task in TASKS.values() for option in task.options)
