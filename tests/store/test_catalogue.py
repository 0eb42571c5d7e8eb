"""The catalogue shows the content of the store as rows: models, versions and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.networks import make_invalid, publish_tiny, rewrite_card

from app.store import Store, VersionNotFound, catalogue, rollout

NAME = "tiny-gan"
BAD_WEIGHTS = "tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 non-finite values, expected none"


def model_row(folder: Path) -> dict[str, Any]:
    (row,) = (row for row in catalogue.list_models(Store(folder)) if row["name"] == NAME)
    assert catalogue.list_models(Store(folder), [NAME]) == [row]
    return row


def defaults_problem(folder: Path) -> str:
    return str(next(iter(catalogue.verify(Store(folder))))["problem"])


def test_a_row_describes_the_rollout_of_a_model(three: Path) -> None:
    row = {
        "name": NAME, "state": "tiny-gan@3 is active (latest)", "task": "sample", "default": True, "active": 3,
        "update_policy": "latest", "canary": None, "shadow": None,
        "previous": 2, "retired": [], "unloaded": False, "versions": [1, 2, 3], "changed": "", "by": "",
        "problem": "",
    }  # fmt: skip
    assert catalogue.list_models(Store(three)) == [row]
    Store(three).retire(NAME, 1)
    changed = Store(three).activate(NAME, 2, share=10).changed
    canary = {"version": 2, "share": 10.0}
    row |= {"canary": canary, "retired": [1], "changed": changed, "by": "activate 2 --share 10"}
    row["state"] += ", tiny-gan@2 is the canary (10 %); retired: 1"
    assert catalogue.list_models(Store(three)) == [row]
    changed = Store(three).activate(NAME, 2).changed
    row |= {"active": 2, "update_policy": "pinned", "canary": None, "previous": 3, "changed": changed}
    row["state"] = "tiny-gan@2 is active; retired: 1"
    assert catalogue.list_models(Store(three)) == [{**row, "by": "activate 2"}]


def test_only_the_default_model_of_a_task_is_marked(three: Path) -> None:
    for name in ("tiny-cgan", "tiny-cnn"):
        publish_tiny(three, name)
    rows = {row["name"]: row["default"] for row in catalogue.list_models(Store(three))}
    assert rows == {"tiny-cgan": False, "tiny-cnn": True, NAME: True}


def test_a_model_without_a_readable_card_has_no_task_and_is_no_default(three: Path) -> None:
    for number in "123":
        (three / NAME / number / "card.json").write_text("{")
    row = model_row(three)
    assert (row["task"], row["default"], row["active"], row["previous"]) == (None, False, None, None)


def test_unreadable_files_are_problems_of_the_rows(three: Path) -> None:
    (three / NAME / rollout.FILE).write_text('{"active": "two"}')
    row = model_row(three)
    problem = "tiny-gan/active.json: active: Input should be a valid integer, found 'two'"
    assert (row["problem"], row["active"]) == (problem, 3)
    (three / "defaults.json").write_text("[]")
    row = model_row(three)
    assert row["problem"].startswith(f"{problem}; defaults.json: the file: Input should be an object")
    assert (row["default"], row["active"]) == (False, 3)
    defaults, active, *versions = catalogue.verify(Store(three))
    assert defaults["problem"].startswith("defaults.json: the file: Input should be an object")
    assert active == {"what": "tiny-gan/active.json", "problem": problem}
    assert {row["problem"] for row in versions} == {""}


def test_the_versions_of_a_model_have_roles_and_figures(three: Path) -> None:
    publish_tiny(three, NAME)
    rewrite_card(three / NAME / "4", metrics={"fid": {"value": 1.5, "split": "test"}}, notes="a note")
    Store(three).retire(NAME, 1)
    Store(three).activate(NAME, 2, share=10)
    (three / NAME / "3" / "card.json").write_text("{")
    described = catalogue.describe_model(Store(three), NAME)
    assert {**described, "versions": [1, 2, 3, 4]} == model_row(three)
    roles = [(row["version"], row["role"], bool(row["problem"])) for row in described["versions"]]
    assert roles == [(1, "retired", False), (2, "canary", False), (3, "", True), (4, "active", False)]
    files = (three / NAME / "4").iterdir()
    assert described["versions"][3] == {
        "version": 4, "role": "active", "problem": "", "bytes": sum(path.stat().st_size for path in files),
        "title": "untrained, for tests", "created": "2026-01-01T00:00:00+00:00", "metrics": {"fid": 1.5},
        "notes": "a note",
    }  # fmt: skip
    with pytest.raises(VersionNotFound, match=r"^there is no model 'other' in the store; models in the store: "):
        catalogue.describe_model(Store(three), "other")


def test_every_file_and_version_is_verified(three: Path) -> None:
    make_invalid(three / NAME / "2")
    names = ["defaults.json", "tiny-gan/active.json", *(f"tiny-gan@{number}" for number in (1, 2, 3))]
    problems = dict.fromkeys(names, "") | {"tiny-gan@2": BAD_WEIGHTS}
    assert list(catalogue.verify(Store(three))) == [{"what": what, "problem": text} for what, text in problems.items()]


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        (
            '{"sample": "tiny-gan", "classify": "gone", "forecast": "lost"}',
            "defaults.json names 'gone', which is not in the store; "
            "defaults.json names 'lost', which is not in the store",
        ),
        (
            '{"classify": "tiny-gan"}',
            "defaults.json: 'tiny-gan' is for 'sample', expected one for 'classify'; "
            "defaults.json names no model for the task 'sample'; `default` chooses one of: tiny-cgan, tiny-gan",
        ),
    ],
)
def test_wrong_and_missing_default_models_are_found(three: Path, defaults: str, problem: str) -> None:
    publish_tiny(three, "tiny-cgan")
    (three / "defaults.json").write_text(defaults)
    assert defaults_problem(three) == problem


def test_an_unloaded_model_is_not_proposed_as_default(three: Path) -> None:
    publish_tiny(three, "tiny-cgan")
    (three / "defaults.json").write_text("{}")
    Store(three).unload(NAME)
    problem = "defaults.json names no model for the task 'sample'; `default` chooses one of: tiny-cgan"
    assert defaults_problem(three) == problem
    Store(three).unload("tiny-cgan")
    assert defaults_problem(three) == ""
    (three / "defaults.json").write_text('{"sample": "tiny-cgan"}')
    assert defaults_problem(three) == "defaults.json names 'tiny-cgan', which is unloaded"
