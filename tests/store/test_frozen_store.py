"""The store in the folder ``frozen`` was written on 30 November 2026. Each later version of the service must read it.

Its models are named after their rollouts: the newest version is active, a number was activated, the latest version was
activated, there is a canary, a version is retired, and the model is unloaded. Never change its files: they test that
stores of users need no migration. Add a second folder if the format changes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.service import Serve

from app.store import Canary, Roles, Store, catalogue
from app.tasks import check_loading

FROZEN = Path(__file__).with_name("frozen")
ROLES = {
    "canary": Roles(1, Canary(version=3, share=12.5), 3),
    "latest": Roles(2, None, 1),
    "newest": Roles(2, None, 1),
    "pinned": Roles(2, None, 1),
    "retired": Roles(2, None, None),
    "text": Roles(1, None, None),
    "unloaded": Roles(1, None, 2),
}


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """Return a copy of the frozen store."""
    return Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


def test_all_files_of_the_frozen_store_are_valid() -> None:
    rows = list(catalogue.verify(Store(FROZEN, check_loading)))
    assert len(rows) == 1 + len(ROLES) + 15
    assert not [row for row in rows if row["problem"]]


def test_the_rollouts_of_the_frozen_store_keep_their_meaning() -> None:
    store = Store(FROZEN)
    assert {name: store.roles(name) for name in store.names()} == ROLES
    assert {name for name in ROLES if store.rollout(name).unloaded} == {"unloaded"}
    assert store.rollout("retired").retired == [1]
    assert store.defaults() == {"forecast": "newest", "continue": "text"}


def test_models_of_the_frozen_store_can_be_rolled_back(frozen: Path) -> None:
    active = {"canary": 1, "latest": 1, "newest": 1, "pinned": 1, "unloaded": 2}
    assert {name: Store(frozen).rollback(name).active for name in active} == active


def test_the_frozen_store_is_served(frozen: Path, serve: Serve) -> None:
    with serve(store=frozen) as client:
        active = {name: client.get(f"/v1/models/{name}").json()["version"] for name in ROLES if name != "unloaded"}
        assert active == {name: ROLES[name].active for name in active}
        assert client.get("/health/ready").json()["failed"] == []
