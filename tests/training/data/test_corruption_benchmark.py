"""The benchmark of image corruptions, with a stand-in for the package of the corruptions."""

from __future__ import annotations

import pytest

from benchmarks.corruptions import GROUPS, table


def test_the_table_has_the_mean_of_each_group_and_of_all_corruptions() -> None:
    kinds = [kind for kinds in GROUPS.values() for kind in kinds]
    results = {"none": [0.9], **{kind: [i / 15] for i, kind in enumerate(kinds, start=1)}}
    made = table(["a@1"], results)
    assert made["columns"] == {"images": None, "a@1": 3}
    values = [value for _, value in made["rows"]]
    assert values == pytest.approx([0.9, 2 / 15, 5.5 / 15, 9.5 / 15, 13.5 / 15, 8 / 15], abs=0.001)
    assert made["rows"][1][0] == "noise: gaussian noise, shot noise, impulse noise"
