"""The model store: publishing, reading and verifying versions."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import failing
from support.imported.onnx_models import linear_model
from support.networks import SMALL, publish_small, publish_tiny, rewrite_card, rewrite_weights, tiny_card, tiny_version
from support.service import ROOT

from app.networks.imported.onnx_runner import MODEL
from app.store import WEIGHTS, RolloutRefused, Store, StoreError, catalogue, parse_card
from app.store.card import MAX_BYTES
from app.store.rollout import FILE
from app.store.version import weights_digest


def raw_weights(folder: Path, head: bytes, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + content)
    rewrite_card(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


@pytest.mark.parametrize("kind", SMALL)
def test_a_loaded_version_equals_the_published_one(kind: str, tmp_path: Path) -> None:
    published = publish_small(tmp_path, kind, "one")
    loaded = Store(tmp_path).verify("one", 1).network()
    assert loaded.sizes == type(loaded.sizes)(**json.loads((tmp_path / "one" / "1" / "card.json").read_text())["sizes"])
    for key, tensor in published.tensors.items():
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
    with pytest.raises(StoreError, match=r"^the card of 'tiny-gan' has a text that is not Unicode: "):
        Store(tmp_path).publish({**card, "notes": "\udcff"}, tensors)
    with pytest.raises(StoreError, match=r"^the card of 'tiny-gan' is too large; the maximum is 4,194,304 bytes$"):
        Store(tmp_path).publish({**card, "notes": "n" * MAX_BYTES}, tensors)
    tensors["layers.0.bias"][0] = torch.nan
    with pytest.raises(StoreError, match=r"layers\.0\.bias.* has 1 non-finite values"):
        Store(tmp_path).publish(card, tensors)
    (tmp_path / "defaults.json").write_text("{")
    with pytest.raises(StoreError, match=r"^defaults\.json: the file: Invalid JSON: "):
        publish_tiny(tmp_path, "tiny-gan")
    assert list(Store(tmp_path).versions()) == []


INVALID: list[tuple[str, Callable[[Path], object], str]] = [
    ("no card", lambda folder: (folder / "card.json").unlink(), r"^tiny-gan/1/card\.json cannot be read: No such file or directory$"),
    ("unknown field of a tensor", lambda folder: rewrite_card(folder, inputs=[{"name": "x", "dtype": "int8", "shape": [1], "layout": "NHWC"}]), r"inputs\.0\.layout: Extra inputs are not permitted"),
    ("other name", lambda folder: rewrite_card(folder, name="other"), r"^tiny-gan/1/card\.json: name is 'other', expected 'tiny-gan' as in the path$"),
    ("unknown kind", lambda folder: rewrite_card(folder, kind="gru"), r"^tiny-gan/1/card\.json: kind is 'gru', expected one of lenet, "),
    ("other task", lambda folder: rewrite_card(folder, task="classify"), r"^tiny-gan/1/card\.json: task is 'classify', expected 'sample'$"),
    ("too many layers", lambda folder: rewrite_card(folder, kind="gated-rnn", task="continue", sizes={"vocabulary": 5, "layers": 10**12}),
     r"^tiny-gan/1/card\.json: layers is 1000000000000, and there are 4 tensors$"),
    ("as many layers as tensors", lambda folder: rewrite_card(folder, kind="gated-rnn", task="continue", sizes={"vocabulary": 5, "layers": 4}),
     r"^tiny-gan/1/model\.safetensors: tensor '.*' has shape none: it is missing, expected "),
    ("unknown size", lambda folder: rewrite_card(folder, sizes={"depth": 3}), r"^tiny-gan/1/card\.json: sizes {'depth': 3} do not make a gan-generator: .*depth"),
    ("beyond float32", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
     "8 non-finite values"),
    ("unknown type", lambda folder: raw_weights(folder, b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}', b"\0"), "not a safetensors|is of"),
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


def test_other_files_and_folders_are_not_versions(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    for name in (".publish-x/1", "lost+found", "tiny-gan/latest", "tiny-gan/02", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    assert list(Store(tmp_path).versions()) == [("tiny-gan", 1)]
    assert Store(tmp_path).numbers("missing") == Store(tmp_path).numbers("file") == []
    assert [row["name"] for row in catalogue.list_models(Store(tmp_path))] == ["tiny-gan"]


def test_concurrent_publishers_get_different_versions(tmp_path: Path) -> None:
    def publish(_: int) -> int:
        return Store(tmp_path).publish(*tiny_version("tiny-gan")).card.version

    with ThreadPoolExecutor(3) as pool:  # threads exclude each other by the lock of the store, as processes do
        assert sorted(pool.map(publish, range(6))) == [1, 2, 3, 4, 5, 6]
    assert not any(row["problem"] for row in catalogue.verify(Store(tmp_path)))


def test_the_shipped_store_is_valid() -> None:
    store = Store(ROOT / "models_store")
    assert not any(row["problem"] for row in catalogue.verify(store))
    assert {store.card(*version).task for version in store.versions()} == {"classify", "continue", "forecast", "sample"}
    sizes = [path.stat().st_size for path in store.folder.rglob("*") if path.is_file()]
    assert max(sizes) < 25e6
    assert sum(sizes) < 47e6  # a clone of the repository downloads all of them


def test_a_version_is_read_with_few_imports() -> None:
    script = (
        "import sys; from pathlib import Path; from app.store import Store; store = Store(Path('models_store'))\n"
        "for key in store.versions(): store.card(*key)\n"
        "print([name for name in ('torch', 'numpy', 'pydantic_settings') if name in sys.modules])\n"
        "store.verify(*key)\n"
        "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n[]\n"


def test_the_digest_before_publishing_is_the_one_on_the_card(tmp_path: Path) -> None:
    version = publish_tiny(tmp_path, "tiny-gan")
    transposed = {key: tensor.t().contiguous().t() for key, tensor in version.tensors.items()}
    assert weights_digest(transposed) == version.card.weights_sha256  # the memory layout does not matter


def test_a_card_and_pictures_are_published_with_a_version(tmp_path: Path) -> None:
    pictures = {name: tmp_path / name for name in ("b.png", "a.png")}
    for name, path in pictures.items():
        path.write_bytes(name.encode())
    store, (card, tensors) = Store(tmp_path / "deep" / "store"), tiny_version("tiny-gan")
    folder = store.publish({**card, "notes": "é"}, tensors, pictures).folder
    (folder / "Upper.png").touch()
    assert store.pictures("tiny-gan", 1) == ["a.png", "b.png"]
    assert (folder / "a.png").read_bytes() == b"a.png"
    assert store.pictures("tiny-gan", 2) == []
    text = (folder / "card.json").read_text("utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_invalid_defaults_are_rejected(tmp_path: Path) -> None:
    assert Store(tmp_path).defaults() == {}
    (tmp_path / "defaults.json").write_text('{"sample": "a", "paint": "b"}')
    with pytest.raises(StoreError, match=r"^defaults\.json: paint.*: Input should be 'classify', .*, found 'paint'$"):
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


def publish_linear(folder: Path, task: str = "infer") -> Path:
    """Publish an ONNX model that multiplies rows by a matrix, and return the folder of the version."""
    tensors = {MODEL: torch.tensor(list(linear_model()[0].SerializeToString()), dtype=torch.uint8)}
    return Store(folder).publish(tiny_card("linear", task, "onnx", SIZES, {}), tensors).folder


def test_an_imported_network_gets_a_task_but_does_not_lose_it(tmp_path: Path) -> None:
    publish_linear(tmp_path)
    assert not (tmp_path / "defaults.json").exists()
    with pytest.raises(RolloutRefused, match=r"^linear is for the task 'infer', which has no default model$"):
        Store(tmp_path).make_default("linear")
    for _ in range(2):  # version 1 for the task infer does not count
        publish_linear(tmp_path, "classify")
    assert Store(tmp_path).defaults() == {"classify": "linear"}
    for change in (publish_linear, lambda folder: Store(folder).activate("linear", 1)):
        with pytest.raises(StoreError, match=r"^linear@\d: task is 'infer', expected 'classify' as for linear@2"):
            change(tmp_path)
    assert Store(tmp_path).activate("linear", 2).active == 2


def test_an_invalid_imported_network_is_rejected_with_a_reason(tmp_path: Path) -> None:
    folder = publish_linear(tmp_path)
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
    ({"seed": -(2**63), "sizes": {"latent": {"deep": [-(2**63)]}}, "series": {"known": holidays_on("2026-02-28")}}, ""),
    ({"seed": 2**63}, "seed: Input should be less than"),
    ({"sizes": {"latent": {"deep": [-(2**63) - 1]}}}, "sizes: Value error, an integer should have at most 64 bits"),
    ({"sizes": {"latent": float("nan")}}, "sizes: Value error, a number should be finite, found "),
    ({"version": 10**9}, "version: "),
    ({"series": {"season": 169}}, r"series\.season: "),
    ({"name": "Upper"}, "name: .*, found 'Upper'$"),
    ({"name": "stats"}, "name: 'stats' is reserved, because /v2/models/stats is another endpoint, found 'stats'$"),
    ({"created": "0001-01-01"}, "created: Value error, year .*, found '0001-01-01'$"),
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
