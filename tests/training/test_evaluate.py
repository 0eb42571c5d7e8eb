"""`training.evaluation.evaluate`: tolerances, and versions that cannot be measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.networks import tiny_card

from app import store
from app.networks import KINDS
from training import run as running
from training.evaluation import evaluate


@pytest.mark.parametrize(
    ("kind", "name", "hardware", "difference", "line"),
    [
        ("lenet", "accuracy", "Xeon", 0.0001, "0.5000  measured 0.5001 ✓"),
        ("lenet", "accuracy", "Xeon", 0.0002, "0.5000  measured 0.5002 ✗"),
        (
            *("whitened-net", "accuracy", "Xeon", -0.0019),
            "0.5000  measured 0.4981 ≈ differs by -0.0019 (some processors use bfloat16; card: Xeon, now: EPYC)",
        ),
        ("whitened-net", "accuracy", "Xeon", 0.0021, "0.5000  measured 0.5021 ✗"),
        ("conditional-generator", "samples_only_accuracy", "EPYC", 0.0030, "0.5000  measured 0.5030 ✗"),
        (
            *("conditional-generator", "samples_only_accuracy", "Xeon", 0.0030),
            "0.5000  measured 0.5030 ≈ differs by +0.0030 (card: Xeon, now: EPYC)",
        ),
    ],
)
def test_evaluation_tolerates_rounding_and_states_differences_of_processors(
    kind: str, name: str, hardware: str, difference: float, line: str
) -> None:
    fields = {"version": 1, "weights_sha256": "", "hardware": f"{hardware}, threads: 2"}
    fields |= {"metrics": {name: {"value": 0.5, "split": "", "decimals": 4}}}
    sizes = {"classes": 10} if kind == "conditional-generator" else {}
    card = store.Card.model_validate(tiny_card("a", KINDS[kind].task, kind, sizes, fields))
    now = {name: running.metric(0.5 + difference, ""), "new": running.metric(0.25, "", 2)}
    new, compared = sorted(evaluate.compare(card, now, "EPYC"), key=lambda text: "new" not in text)
    assert compared == f"  {name:34} {line}"
    assert new == f"  {'new':34} not on the card, measured 0.25"
    (missing,) = evaluate.compare(card, {}, "EPYC")
    assert missing == f"  {name:34} on the card only ✗"


def test_a_store_that_is_no_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--store", str(tmp_path / "nothing")])
    assert f"--store is '{tmp_path}/nothing', which is not a folder" in capsys.readouterr().err


def test_a_command_on_a_card_may_name_a_device_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("to be, or not to be\n" * 1000)
    command = f"python -m training.rnn --text {path} --name a --device cuda:99"
    card: Any = SimpleNamespace(data={"text:novel.txt": ""}, command=command)
    assert evaluate.own_data(card, tmp_path).train.startswith("to be")
    card.command += " --epoch 3 --nonsense"
    with pytest.raises(evaluate.EvaluationError, match=r"command 'python .* is rejected: .*--nonsense"):
        evaluate.own_data(card, tmp_path)
    card.command = command + " --set validation=5"
    with pytest.raises(evaluate.EvaluationError, match="is rejected: validation is 5; it should be less than 1"):
        evaluate.own_data(card, tmp_path)
