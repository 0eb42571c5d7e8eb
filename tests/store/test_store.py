"""The model store: publishing, reading and verifying versions."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.disk import WatchedDisk, failing
from support.imported.onnx_models import linear_model
from support.networks import make_invalid, publish_tiny, rewrite_card, rewrite_weights, tiny_card, tiny_version
from support.processes import start_python
from support.service import ROOT

from app.networks import KINDS, build, is_imported
from app.networks.imported.onnx_runner import MODEL
from app.store import CARD, WEIGHTS, RolloutRefused, Store, StoreError, catalogue, parse_card
from app.store.card import MAX_BYTES
from app.store.rollout import FILE
from app.store.version import Version, weights_digest


def raw_weights(folder: Path, head: bytes, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + content)
    rewrite_card(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_imported(kind)])
def test_a_loaded_version_equals_the_published_one(kind: str, tmp_path: Path) -> None:
    sizes = {"vocabulary": 5} if KINDS[kind].task == "continue" else {}
    network = build(kind, sizes)
    card = tiny_card("one", str(KINDS[kind].task), kind, sizes, {})
    Store(tmp_path).publish(card, network.state_dict())
    loaded = Store(tmp_path).verify("one", 1).network()
    assert loaded.sizes == type(loaded.sizes)(**json.loads((tmp_path / "one" / "1" / "card.json").read_text())["sizes"])
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_versions_count_up_and_the_first_model_of_a_task_is_the_default(tmp_path: Path) -> None:
    for name in ("tiny-gan", "tiny-gan", "tiny-cgan", "tiny-cnn"):
        publish_tiny(tmp_path, name)
    assert list(Store(tmp_path).versions()) == [("tiny-cgan", 1), ("tiny-cnn", 1), ("tiny-gan", 1), ("tiny-gan", 2)]
    assert Store(tmp_path).defaults() == {"sample": "tiny-gan", "classify": "tiny-cnn"}


def test_a_default_without_versions_is_replaced_unless_its_folder_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "defaults.json").write_text(json.dumps({"sample": "gone", "classify": "unreadable"}))
    disk = failing(("list", tmp_path / "unreadable"), error=PermissionError(13, "Permission denied"))
    for name in ("tiny-gan", "tiny-cnn"):
        Store(tmp_path, disk=disk).publish(*tiny_version(name))
    assert Store(tmp_path).defaults() == {"sample": "tiny-gan", "classify": "unreadable"}


def test_an_unloaded_model_does_not_become_the_default_by_publication(three: Path) -> None:
    publish_tiny(three, "tiny-cgan")
    Store(three).unload("tiny-cgan")
    (three / "tiny-gan").rename(three / ".removed")
    publish_tiny(three, "tiny-cgan")
    assert Store(three).defaults() == {"sample": "tiny-gan"}
    Store(three).load("tiny-cgan")
    publish_tiny(three, "tiny-cgan")
    assert Store(three).defaults() == {"sample": "tiny-cgan"}


def test_an_invalid_version_is_not_published(tmp_path: Path) -> None:
    card, tensors = tiny_version("tiny-gan")
    with pytest.raises(StoreError, match=r"^the card of '\.\./up': name: .*found '\.\./up'$"):
        Store(tmp_path).publish({**card, "name": "../up"}, tensors)
    with pytest.raises(StoreError, match=r"^the card of 'tiny-gan': colour: Extra inputs are not permitted"):
        Store(tmp_path).publish({**card, "colour": "red"}, tensors)
    with pytest.raises(StoreError, match=r"^the card of 'tiny-gan' is too large; the maximum is 4,194,304 bytes$"):
        Store(tmp_path).publish({**card, "notes": "n" * MAX_BYTES}, tensors)
    tensors["layers.0.bias"][0] = torch.nan
    with pytest.raises(StoreError, match=r"layers\.0\.bias.* has 1 non-finite values"):
        Store(tmp_path).publish(card, tensors)
    (tmp_path / "defaults.json").write_text("{")
    with pytest.raises(StoreError, match=r"^defaults\.json: the file: Invalid JSON: "):
        publish_tiny(tmp_path, "tiny-gan")
    assert list(Store(tmp_path).versions()) == []


def test_a_version_for_another_task_than_the_other_versions_is_not_published(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    card, tensors = tiny_version("tiny-cnn")
    card["name"] = "tiny-gan"
    sentence = r"^tiny-gan@2: task is 'classify', expected 'sample' as for tiny-gan@1; use another"
    with pytest.raises(StoreError, match=sentence):
        Store(tmp_path).publish(card, tensors)
    assert Store(tmp_path).defaults() == {"sample": "tiny-gan"}
    (tmp_path / "tiny-gan" / FILE).write_text('{"retired": [1]}')
    assert Store(tmp_path).publish(card, tensors).card.version == 2


INVALID: list[tuple[str, Callable[[Path], object], str]] = [
    ("no card", lambda folder: (folder / "card.json").unlink(), r"^tiny-gan/1/card\.json cannot be read: No such file or directory$"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), r"^tiny-gan/1/model\.safetensors cannot be read: No such file or directory$"),
    ("card cut", lambda folder: os.truncate(folder / "card.json", 100), r"^tiny-gan/1/card\.json: the file: Invalid JSON"),
    ("weights cut", lambda folder: os.truncate(folder / "model.safetensors", 100), r"^tiny-gan/1/model\.safetensors: sha256 is \w{64}, expected \w{64} as on the card$"),
    ("unknown field of a tensor", lambda folder: rewrite_card(folder, inputs=[{"name": "x", "dtype": "int8", "shape": [1], "layout": "NHWC"}]), r"inputs\.0\.layout: Extra inputs are not permitted"),
    ("missing key", lambda folder: rewrite_card(folder, seed="drop"), "seed: Field required"),
    ("other name", lambda folder: rewrite_card(folder, name="other"), r"^tiny-gan/1/card\.json: name is 'other', expected 'tiny-gan' as in the path$"),
    ("other version", lambda folder: rewrite_card(folder, version=7), r"^tiny-gan/1/card\.json: version is '7', expected '1' as in the path$"),
    ("unknown kind", lambda folder: rewrite_card(folder, kind="gru"), r"^tiny-gan/1/card\.json: kind is 'gru', expected one of lenet, "),
    ("other task", lambda folder: rewrite_card(folder, task="classify"), r"^tiny-gan/1/card\.json: task is 'classify', expected 'sample'$"),
    ("no time", lambda folder: rewrite_card(folder, created="yesterday"), "created: .*Invalid isoformat string"),
    ("residuals NaN", lambda folder: rewrite_card(folder, residuals=[1.0, float("nan")]), r"residuals\.1: Input should be a finite"),
    ("too many layers", lambda folder: rewrite_card(folder, kind="gated-rnn", task="continue", sizes={"vocabulary": 5, "layers": 10**12}),
     r"^tiny-gan/1/card\.json: layers is 1000000000000, and there are 4 tensors$"),
    ("as many layers as tensors", lambda folder: rewrite_card(folder, kind="gated-rnn", task="continue", sizes={"vocabulary": 5, "layers": 4}),
     r"^tiny-gan/1/model\.safetensors: tensor '.*' has shape none: it is missing, expected "),
    ("unknown size", lambda folder: rewrite_card(folder, sizes={"depth": 3}), r"^tiny-gan/1/card\.json: sizes {'depth': 3} do not make a gan-generator: .*depth"),
    ("other sizes", lambda folder: rewrite_card(folder, sizes={"latent": 5, "hidden": [8]}),
     r"^tiny-gan/1/model\.safetensors: tensor 'layers\.0\.weight' has shape \(8, 4\), expected \(8, 5\)$"),
    ("NaN", make_invalid,
     r"^tiny-gan/1/model\.safetensors: tensor 'layers\.0\.bias' has 8 non-finite values, expected none$"),
    ("beyond float32", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
     "8 non-finite values"),
    ("unknown type", lambda folder: raw_weights(folder, b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}', b"\0"), "not a safetensors|is of"),
    ("one tensor less", lambda folder: rewrite_weights(folder, lambda t: t.pop("layers.0.bias")), r"^tiny-gan/1/model\.safetensors: tensor 'layers\.0\.bias' has shape none: it is missing, expected \(8,\)$"),
    ("one tensor more", lambda folder: rewrite_weights(folder, lambda t: t.update(more=torch.ones(1))), r"tensor 'more' has shape \(1,\), expected no such tensor$"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_an_invalid_version_is_rejected_with_a_reason(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    folder = publish_tiny(tmp_path, "tiny-gan").folder
    damage(folder)
    with pytest.raises(StoreError, match=sentence):
        Store(tmp_path).verify("tiny-gan", 1)


def test_unknown_fields_of_a_newer_service_are_ignored(tmp_path: Path) -> None:
    """During a rolling update, an old service reads cards and rollouts that a newer service has written."""
    folder = publish_tiny(tmp_path, "tiny-gan").folder
    speed = {"milliseconds": 1.0, "per_second": 2.0, "rows": 1, "hardware": "none", "watts": 3}
    rewrite_card(folder, colour="red", speed=speed)
    (tmp_path / "tiny-gan" / FILE).write_text('{"active": 1, "mirror": 2}')
    assert Store(tmp_path).verify("tiny-gan", 1).card.speed
    assert Store(tmp_path).rollout("tiny-gan").active == 1
    rewrite_card(folder, seed="drop")
    with pytest.raises(StoreError, match=r"^tiny-gan/1/card\.json: seed: Field required"):
        Store(tmp_path).card("tiny-gan", 1)


def test_other_files_and_folders_are_not_versions(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    for name in (".publish-x/1", "lost+found", "tiny-gan/latest", "tiny-gan/02", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    assert list(Store(tmp_path).versions()) == [("tiny-gan", 1)]
    assert Store(tmp_path).numbers("missing") == Store(tmp_path).numbers("file") == []
    assert [row["name"] for row in catalogue.list_models(Store(tmp_path))] == ["tiny-gan"]


PUBLISHER = """
import sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
from support.networks import publish_tiny
for _ in range(3): publish_tiny(Path(sys.argv[1]), "tiny-gan")
"""


def test_concurrent_publishers_get_different_versions(tmp_path: Path) -> None:
    processes = [start_python(["-c", PUBLISHER, str(tmp_path)]) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Store(tmp_path).numbers("tiny-gan") == [1, 2, 3, 4, 5, 6]
    assert not any(row["problem"] for row in catalogue.verify(Store(tmp_path)))


def test_the_shipped_store_is_valid() -> None:
    store = Store(ROOT / "models_store")
    assert not any(row["problem"] for row in catalogue.verify(store))
    assert {store.card(*version).task for version in store.versions()} == {"classify", "continue", "forecast", "sample"}
    sizes = [path.stat().st_size for path in store.folder.rglob("*") if path.is_file()]
    assert max(sizes) < 25e6
    assert sum(sizes) < 47e6  # a clone of the repository downloads all of them


@pytest.mark.parametrize(
    ("action", "modules"),
    [("verify(*key)", ("sympy", "torch._dynamo")), ("card(*key)", ("torch", "numpy", "pydantic_settings"))],
)
def test_a_version_is_read_with_few_imports(action: str, modules: tuple[str, ...]) -> None:
    script = (
        "import sys; from pathlib import Path; from app.store import Store; store = Store(Path('models_store'))\n"
        f"for key in store.versions(): store.{action}\n"
        f"print([name for name in {modules} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_digest_before_publishing_is_the_one_on_the_card(tmp_path: Path) -> None:
    version = publish_tiny(tmp_path, "tiny-gan")
    transposed = {key: tensor.t().contiguous().t() for key, tensor in version.tensors.items()}
    assert weights_digest(transposed) == version.card.weights_sha256  # the memory layout does not matter


def test_pictures_are_published_with_a_version_and_listed(tmp_path: Path) -> None:
    pictures = {name: tmp_path / name for name in ("b.png", "a.png")}
    for name, path in pictures.items():
        path.write_bytes(name.encode())
    store = Store(tmp_path / "deep" / "store")
    folder = store.publish(*tiny_version("tiny-gan"), pictures).folder
    (folder / "Upper.png").touch()
    assert store.pictures("tiny-gan", 1) == ["a.png", "b.png"]
    assert (folder / "a.png").read_bytes() == b"a.png"
    assert store.pictures("tiny-gan", 2) == []


def test_a_published_card_is_indented_utf8_with_a_final_newline(tmp_path: Path) -> None:
    card, tensors = tiny_version("tiny-gan")
    text = (Store(tmp_path).publish({**card, "notes": "é"}, tensors).folder / CARD).read_bytes().decode()
    assert text.startswith('{\n  "name": "tiny-gan",\n')
    assert '"notes": "é"' in text
    assert text.endswith("\n}\n")
    with pytest.raises(StoreError, match=r"^the card of 'tiny-gan' has a text that is not Unicode: "):
        Store(tmp_path).publish({**card, "notes": "\udcff"}, tensors)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"^defaults\.json: the file: Invalid JSON: EOF"),  # while a file is being copied
        ("{", r"^defaults\.json: the file: Invalid JSON: EOF"),
        ("[]", r"^defaults\.json: the file: Input should be an object, found '\[\]'$"),
        ('{"sample": 1}', "sample: Input should be a valid string, found '1'$"),
        ('{"sample": "a", "paint": "b"}', "paint.*: Input should be 'classify', .*, found 'paint'$"),
    ],
)
def test_invalid_defaults_are_rejected(tmp_path: Path, content: str, sentence: str) -> None:
    assert Store(tmp_path).defaults() == {}
    (tmp_path / "defaults.json").write_text(content)
    with pytest.raises(StoreError, match=sentence):
        Store(tmp_path).defaults()


def test_an_unreadable_folder_does_not_hide_the_versions_of_other_models(tmp_path: Path) -> None:
    for name in ("tiny-cnn", "tiny-gan", "tiny-rnn"):
        publish_tiny(tmp_path, name)
    error = PermissionError(13, "Permission denied")  # file permissions would not stop root
    store = Store(tmp_path, disk=failing(("list", tmp_path / "tiny-gan"), error=error))
    assert list(store.versions()) == [("tiny-cnn", 1), ("tiny-rnn", 1)]
    problem = "tiny-gan cannot be read: Permission denied"
    assert [(row["versions"], row["problem"]) for row in catalogue.list_models(store)] == [
        ([1], ""),
        ([], problem),
        ([1], ""),
    ]
    assert [row for row in catalogue.verify(store) if row["problem"]] == [{"what": "tiny-gan", "problem": problem}]


SIZES: dict[str, Any] = {"inputs": {"x": ["?", 4]}, "batched": True, "max_rows": 64}


def publish_linear(folder: Path, task: str = "infer") -> tuple[Version, np.ndarray]:
    """Publish an ONNX model that multiplies rows by a matrix. Return both."""
    model, matrix = linear_model()
    tensors = {MODEL: torch.tensor(list(model.SerializeToString()), dtype=torch.uint8)}
    return Store(folder).publish(tiny_card("linear", task, "onnx", SIZES, {}), tensors), matrix


def test_an_imported_network_computes_with_the_stored_tensors(tmp_path: Path) -> None:
    version, matrix = publish_linear(tmp_path)
    rows = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(version.network().run({"x": rows})["y"], rows @ matrix, rtol=1e-5)


def test_an_imported_network_of_the_task_infer_is_never_a_default(tmp_path: Path) -> None:
    publish_linear(tmp_path)
    assert not (tmp_path / "defaults.json").exists()
    with pytest.raises(RolloutRefused, match=r"^linear is for the task 'infer', which has no default model$"):
        Store(tmp_path).make_default("linear")


def test_an_imported_network_gets_a_task_but_does_not_lose_it(tmp_path: Path) -> None:
    publish_linear(tmp_path)
    for _ in range(2):  # version 1 for the task infer does not count
        publish_linear(tmp_path, "classify")
    assert Store(tmp_path).defaults() == {"classify": "linear"}
    for change in (publish_linear, lambda folder: Store(folder).activate("linear", 1)):
        with pytest.raises(StoreError, match=r"^linear@\d: task is 'infer', expected 'classify' as for linear@2"):
            change(tmp_path)
    assert Store(tmp_path).activate("linear", 2).active == 2


def test_an_invalid_imported_network_is_rejected_with_a_reason(tmp_path: Path) -> None:
    folder = publish_linear(tmp_path)[0].folder
    rewrite_weights(folder, lambda tensors: tensors.update(mask=torch.tensor([-torch.inf, torch.nan])))
    assert torch.isneginf(Store(tmp_path).read("linear", 1).tensors["mask"][0])  # imported graphs may have these
    rewrite_weights(folder, lambda tensors: tensors.pop("mask"))
    rewrite_card(folder, sizes={**SIZES, "more": 0})
    with pytest.raises(StoreError, match=r"^linear/1/card\.json: sizes do not fit: .*'more'$"):
        Store(tmp_path).verify("linear", 1)
    rewrite_card(folder, sizes=SIZES)
    rewrite_weights(folder, lambda tensors: tensors.update(more=torch.ones(1)))
    with pytest.raises(StoreError, match=r"^linear/1/model\.safetensors: tensor 'more' should be uint8"):
        Store(tmp_path).verify("linear", 1)


def holidays_on(day: str) -> dict[str, object]:
    """Return the known covariates of a card with a calendar of one public holiday."""
    column = {"name": "holidays", "mean": 0.0, "scale": 1.0, "coefficient": 0.0}
    calendar = {"country": "DE", "step": "D", "first_year": 2026, "last_year": 2026, "dates": [day]}
    return {"columns": [column], "calendar": calendar}


CARD_LIMITS: list[tuple[dict[str, object], str]] = [
    ({"seed": 2**63 - 1, "sizes": {"latent": 2**63 - 1}}, ""),
    ({"seed": -(2**63), "sizes": {"latent": {"deep": [-(2**63)]}}}, ""),
    ({"seed": 2**63}, "seed: Input should be less than"),
    ({"sizes": {"latent": 2**63}}, "sizes: Value error, an integer should have at most 64 bits"),
    ({"sizes": {"latent": {"deep": [-(2**63) - 1]}}}, "sizes: Value error, an integer should have at most 64 bits"),
    ({"sizes": {"latent": float("nan")}}, "sizes: Value error, a number should be finite, found "),
    ({"version": 0}, "version: "),
    ({"version": 10**9}, "version: "),
    ({"series": {"season": 169}}, r"series\.season: "),
    ({"name": "Upper"}, "name: .*, found 'Upper'$"),
    ({"name": "stats"}, "name: 'stats' is reserved, because /v2/models/stats is another endpoint, found 'stats'$"),
    ({"name": "x" * 90}, f"name: .*, found '{'x' * 80}'$"),
    ({"created": "0001-01-01"}, "created: Value error, year .*, found '0001-01-01'$"),
    ({"seed": 1, "series": {"known": holidays_on("2026-02-28")}}, ""),
    ({"series": {"known": holidays_on("2026-02-30")}}, r"series\.known\.calendar\.dates\.0: Value error, day "),
]


@pytest.mark.parametrize(("changes", "sentence"), CARD_LIMITS, ids=range(len(CARD_LIMITS)))
def test_the_limits_of_a_card(changes: dict[str, object], sentence: str) -> None:
    card = tiny_card("tiny-gan", "sample", "gan-generator", {"latent": 4, "hidden": [8]}, {"version": 1})
    content = json.dumps({**card, "weights_sha256": "0" * 64, **changes}).encode()
    if not sentence:
        assert parse_card(content, "here").seed == changes["seed"]
        return
    with pytest.raises(StoreError, match=f"^here: {sentence}"):
        parse_card(content, "here")


def test_a_failed_publication_keeps_the_default_models(tmp_path: Path) -> None:
    def fail_moving_a_version(call: str, path: Path) -> None:
        if call == "rename" and path.is_dir():
            raise OSError(28, "No space left on device")

    publish_tiny(tmp_path, "tiny-gan")
    with pytest.raises(OSError, match="No space left"):
        Store(tmp_path, disk=WatchedDisk(fail_moving_a_version)).publish(*tiny_version("tiny-cnn"))
    assert Store(tmp_path).defaults() == {"sample": "tiny-gan"}
