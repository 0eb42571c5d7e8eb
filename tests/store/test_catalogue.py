"""The catalogue shows the content of the store as rows: models, versions and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny

from app.store import Store, catalogue, rollout

NAME = "tiny-gan"


def model_row(folder: Path) -> dict[str, Any]:
    (row,) = (row for row in catalogue.list_models(Store(folder)) if row["name"] == NAME)
    assert catalogue.list_models(Store(folder), [NAME]) == [row]
    return row


def defaults_problem(folder: Path) -> str:
    return str(next(iter(catalogue.verify(Store(folder))))["problem"])


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


def test_a_version_with_an_unreadable_card_has_a_problem_and_no_figures(three: Path) -> None:
    (three / NAME / "3" / "card.json").write_text("{")
    *_, second, third = catalogue.describe_model(Store(three), NAME)["versions"]
    assert (second["role"], second["problem"]) == ("active", "")
    assert second["bytes"] == sum(path.stat().st_size for path in (three / NAME / "2").iterdir())
    assert third == {"version": 3, "role": "", "problem": third["problem"]}
    assert third["problem"].startswith("tiny-gan/3/card.json: the file: Invalid JSON")


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
