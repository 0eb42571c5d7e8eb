"""The versions of one model, and the choice of the version for a request that names no version."""

from __future__ import annotations

from collections import Counter

import pytest

from app.errors import NotFound, RetiredModel, UnknownModel, UnloadedModel
from app.serving.version_set import VersionSet, resolve_name
from app.store.rollout import Canary, Rollout

STORED = [1, 2, 3, 4]
CANARY = VersionSet("a", (1, 2, 3), (), active=3, previous=1, canary=2, share=25.0, keeps_previous=True)


def test_a_set_follows_from_versions_rollout_and_failures() -> None:
    assert VersionSet.build("a", STORED, Rollout(), ()) == VersionSet("a", (1, 2, 3, 4), (), active=4, previous=3)
    assert VersionSet.build("a", STORED, Rollout(retired=[4, 1]), {3}) == VersionSet("a", (2,), (4, 1), 2, None)
    chosen = Rollout(active=2, previous=4, canary=Canary(version=1, share=5))
    assert VersionSet.build("a", STORED, chosen, ()) == VersionSet(
        "a", (1, 2, 3, 4), (), 2, 4, 1, 5.0, keeps_previous=True
    )
    assert VersionSet.build("a", STORED, chosen, {4, 1}) == VersionSet("a", (2, 3), (), 2, None)
    assert VersionSet.build("a", [], Rollout(), ()) == VersionSet("a", (), (), None, None)


def test_a_canary_that_is_the_active_version_is_none() -> None:
    rollout = Rollout(active=4, canary=Canary(version=3, share=5))
    assert VersionSet.build("a", STORED, rollout, {4}) == VersionSet("a", (1, 2, 3), (), 3, None)


def test_an_unloaded_model_keeps_its_versions_for_later() -> None:
    rollout = Rollout(unloaded=True, retired=[1], canary=Canary(version=2, share=5))
    unloaded = VersionSet.build("a", STORED, rollout, {4})
    assert unloaded == VersionSet("a", (), (1,), None, None, unloaded=(2, 3))
    assert (unloaded.resident, unloaded.labels(), unloaded.version_for("x")) == ([], [], None)


def test_resident_versions_are_the_active_one_the_canary_and_the_one_that_was_active_before() -> None:
    assert CANARY.resident == [3, 2, 1]
    assert VersionSet.build("a", STORED, Rollout(), ()).resident == [4]  # version 3 was never active
    assert VersionSet.build("a", STORED, Rollout(active=4, previous=2), ()).resident == [4, 2]
    assert VersionSet("a", (1, 2), (), None, None).resident == []
    assert CANARY.labels() == ["a@1", "a@2", "a@3"]


def test_a_version_can_be_left_out() -> None:
    assert CANARY.without(2) == VersionSet("a", (1, 3), (), 3, 1, None, 25.0, keeps_previous=True)
    assert CANARY.without(1) == VersionSet("a", (2, 3), (), 3, None, 2, 25.0, keeps_previous=True)
    assert CANARY.without(4) == CANARY


def test_the_log_says_which_versions_serve() -> None:
    assert CANARY.describe() == "version 3 is active, version 2 is the canary (25 %)"
    assert VersionSet("a", (1,), (), 1, None).describe() == "version 1 is active"
    assert VersionSet("a", (), (), None, None).describe() == "no version is active"
    assert VersionSet("a", (), (), None, None, unloaded=(1,)).describe() == "it is unloaded"


def test_a_canary_gets_its_share_of_request_ids_and_the_same_id_the_same_version() -> None:
    ids = [f"request-{i}" for i in range(4000)]
    versions = [CANARY.version_for(name) for name in ids]
    assert [CANARY.version_for(name) for name in ids] == versions
    assert set(versions) == {2, 3}
    assert 900 <= Counter(versions)[2] <= 1100
    other = VersionSet("b", (1, 2, 3), (), active=3, previous=1, canary=2, share=25.0)
    assert [other.version_for(name) for name in ids] != versions  # the choices of different models are independent
    assert VersionSet("a", (3,), (), 3, None).version_for("x") == 3


def test_the_choice_for_a_request_id_never_changes() -> None:
    """Other processes and later releases choose the same version for the same request."""
    assert "".join(str(CANARY.version_for(f"r{i}")) for i in range(24)) == "323333323333332233333232"
    assert (CANARY.version_for("r18344"), CANARY.version_for("r9441")) == (2, 3)  # parts 2499 and 2500 of SHARE_PARTS
    tiny = VersionSet("a", (1, 2), (), active=1, previous=None, canary=2, share=0.01)
    assert Counter(tiny.version_for(f"r{i}") for i in range(50_000))[2] == 2


SETS = {
    "a": VersionSet("a", (1, 2, 3), (4,), active=3, previous=1, canary=2, share=25.0),
    "empty": VersionSet("empty", (), (), None, None),
    "away": VersionSet("away", (), (), None, None, unloaded=(1,)),
}


def test_a_name_without_a_version_is_resolved_by_the_request_id_and_a_version_by_its_number() -> None:
    assert [resolve_name(SETS, "a", request_id, "model") for request_id in ("r0", "r1")] == [("a", 3), ("a", 2)]
    assert [resolve_name(SETS, f"a@{number}", "r1", "model") for number in (1, 2, 3)] == [("a", 1), ("a", 2), ("a", 3)]


VERSIONS = "served models: a@1, a@2, a@3"


@pytest.mark.parametrize(
    ("model", "error_type", "message"),
    [
        ("b", UnknownModel, "model 'b' is not served here; served models: a"),
        ("b@1", UnknownModel, "model 'b@1' is not served here; served models: a"),
        ("a@9", UnknownModel, f"model 'a@9' is not served here; {VERSIONS}"),
        ("a@", UnknownModel, f"model 'a@' is not served here; {VERSIONS}"),
        ("a@01", UnknownModel, f"model 'a@01' is not served here; {VERSIONS}"),
        ("a@1@2", UnknownModel, f"model 'a@1@2' is not served here; {VERSIONS}"),
        ("a@4", RetiredModel, f"model 'a@4' is retired; {VERSIONS}"),
        ("empty", UnknownModel, "model 'empty' is not served here; served models: a"),
        ("away", UnloadedModel, "model 'away' is unloaded and must be loaded first"),
        ("away@1", UnloadedModel, "model 'away' is unloaded and must be loaded first"),
    ],
)
def test_a_version_that_is_not_served_is_an_error_of_the_field(
    model: str, error_type: type[NotFound], message: str
) -> None:
    with pytest.raises(error_type) as raised:
        resolve_name(SETS, model, "r0", "the field")
    assert (raised.value.message, raised.value.param) == (message, "the field")


def test_without_served_versions_an_error_lists_no_models() -> None:
    sets = {"empty": SETS["empty"], "gone": VersionSet("gone", (), (1,), None, None)}
    for model in ("b", "empty"):
        with pytest.raises(UnknownModel, match=rf"^model '{model}' is not served here; served models: none$"):
            resolve_name(sets, model, "r0", "model")
    with pytest.raises(RetiredModel, match=r"^model 'gone@1' is retired; served models: none$"):
        resolve_name(sets, "gone@1", "r0", "model")
