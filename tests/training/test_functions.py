"""``fit``, ``predict`` and ``evaluate`` of the package ``training`` do what the commands do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support.service import ROOT

from app.store import Store
from training import evaluate, fit, predict, prediction


def test_a_trained_network_predicts_and_is_measured(workspace: Path) -> None:
    options = {"season": 7, "epochs": 1, "set": {"batch": 16}, "threads": 1, "from_": "base-lstm", "no_refit": True}
    assert fit("mine", csv="sales.csv", force=True, **options) == "mine@1"
    assert fit("mine", csv="sales.csv", force=True, **options) is None  # the same weights are not published again
    rows = predict("mine@1", Path("sales.csv"), horizon=3, levels=[50, 90])
    prediction.main(["mine", "sales.csv", "--horizon", "3", "--levels", "50", "90", "--out", "out.csv"])
    pd.testing.assert_frame_equal(pd.DataFrame(rows).astype({"time": int}), pd.read_csv("out.csv"))
    stated = Store(Path("models_store")).card("mine", 1).metrics
    assert evaluate("mine") == pytest.approx({name: metric.value for name, metric in stated.items()}, abs=1e-3)


def test_errors_of_commands_are_raised(workspace: Path) -> None:
    Path("bad.png").write_text("text")
    with pytest.warns(UserWarning, match=r"bad\.png: .* not an image"):
        assert predict("mnist-judge", "bad.png") == []
    for call, message in (
        (lambda: fit("mine", csv="sales.csv", text="novel.txt"), "give one of images, csv, text; you gave csv, text"),
        (lambda: fit("mine", csv="missing.csv"), "missing.csv: No such file or directory"),
        (lambda: predict("mine", "sales.csv"), "there is no model 'mine'"),
        (lambda: predict("mnist-judge", "shapes", topk=3), "the options are wrong; see the message above"),
        (lambda: evaluate("base-lstm"), "base-lstm: command"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_import_is_light() -> None:
    code = "import sys, training; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
