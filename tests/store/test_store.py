"""The model store: publishing, reading and verifying versions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.networks import TINY, publish_tiny, rewrite_card, rewrite_weights, tiny_card
from support.service import ROOT

from app import store
from app.networks import KINDS, build, is_imported
from app.serving.store_snapshot import StoreSnapshot
from app.store.atomic_files import file_lock


def raw_weights(folder: Path, head: bytes, content: bytes) -> None:
    (folder / store.WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + content)
    rewrite_card(folder, weights_sha256=hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_imported(kind)])
def test_a_loaded_version_equals_the_published_one(kind: str, tmp_path: Path) -> None:
    sizes = {"vocabulary": 5} if KINDS[kind][2] == "continue" else {}
    network = build(kind, sizes)
    card = tiny_card("one", KINDS[kind][2], kind, sizes, {})
    store.publish(tmp_path, card, network.state_dict())
    loaded = store.read_version(tmp_path, "one", 1).network()
    assert loaded.sizes == type(loaded.sizes)(**json.loads((tmp_path / "one" / "1" / "card.json").read_text())["sizes"])
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])


def test_versions_count_up_and_the_first_model_of_a_task_is_the_default(tmp_path: Path) -> None:
    assert [publish_tiny(tmp_path, "tiny-gan").card.version for _ in range(3)] == [1, 2, 3]
    assert list(store.all_versions(tmp_path)) == [("tiny-gan", 1), ("tiny-gan", 2), ("tiny-gan", 3)]
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan"}


def test_an_invalid_version_is_not_published(tmp_path: Path) -> None:
    task, kind, sizes, fields = TINY["tiny-gan"]
    tensors = build(kind, sizes).state_dict()
    tensors["layers.0.bias"][0] = torch.nan
    with pytest.raises(store.StoreError, match=r"layers\.0\.bias.* has 1 non-finite values"):
        store.publish(tmp_path, tiny_card("tiny-gan", task, kind, sizes, fields), tensors)
    with pytest.raises(store.StoreError, match=r"name: .*found '\.\./up'"):
        store.publish(tmp_path, tiny_card("../up", task, kind, sizes, fields), build(kind, sizes).state_dict())
    assert list(tmp_path.iterdir()) == []


INVALID: list[tuple[str, Callable[[Path], object], str]] = [
    ("no card", lambda folder: (folder / "card.json").unlink(), r"tiny-gan/1/card\.json cannot be read: No such file"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors cannot be read"),
    ("card cut", lambda folder: os.truncate(folder / "card.json", 100), r"card\.json: the file: Invalid JSON"),
    ("weights cut", lambda folder: os.truncate(folder / "model.safetensors", 100), "sha256 is .*, expected .* on the card"),
    ("unknown key", lambda folder: rewrite_card(folder, colour="red"), "colour: Extra inputs are not permitted, found 'red'"),
    ("missing key", lambda folder: rewrite_card(folder, seed="drop"), "seed: Field required"),
    ("other name", lambda folder: rewrite_card(folder, name="other"), "name is 'other', expected 'tiny-gan'"),
    ("other version", lambda folder: rewrite_card(folder, version=7), "version is '7', expected '1'"),
    ("unknown kind", lambda folder: rewrite_card(folder, kind="gru"), "kind is 'gru', expected one of lenet"),
    ("other task", lambda folder: rewrite_card(folder, task="classify"), "task is 'classify', expected 'sample'"),
    ("no time", lambda folder: rewrite_card(folder, created="yesterday"), "created: .*Invalid isoformat string"),
    ("residuals NaN", lambda folder: rewrite_card(folder, residuals=[1.0, float("nan")]), r"residuals\.1: Input should be a finite"),
    ("seed too wide", lambda folder: rewrite_card(folder, seed=2**64), "seed: Input should be less than"),
    ("size too wide", lambda folder: rewrite_card(folder, sizes={"hidden": [2**70]}), "sizes: .*an integer should have at most 64 bits"),
    ("size NaN", lambda folder: rewrite_card(folder, sizes={"latent": float("nan")}), "sizes: .*a number should be finite"),
    ("year one", lambda folder: rewrite_card(folder, created="0001-01-01"), "created: "),
    ("too many layers", lambda folder: rewrite_card(folder, kind="stacked-rnn", task="continue", sizes={"vocabulary": 5, "layers": 10**12}),
     "layers is 1000000000000, and there are 4 tensors"),
    ("unknown size", lambda folder: rewrite_card(folder, sizes={"depth": 3}), "sizes {'depth': 3} do not make a gan"),
    ("other sizes", lambda folder: rewrite_card(folder, sizes={"latent": 5, "hidden": [8]}),
     r"'layers\.0\.weight' has shape \(8, 4\), expected \(8, 5\)"),
    ("NaN", lambda folder: rewrite_weights(folder, lambda t: t["layers.0.bias"].fill_(torch.nan)), "8 non-finite values"),
    ("beyond float32", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
     "8 non-finite values"),
    ("eight bits", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.ones(8, dtype=torch.float8_e4m3fn)})),
     r"'layers\.0\.bias' has dtype float8_e4m3fn, expected one of float32"),
    ("complex", lambda folder: raw_weights(folder, b'{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', bytes(8)), "has dtype complex64|not a safetensors"),
    ("unknown type", lambda folder: raw_weights(folder, b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}', b"\0"), "not a safetensors|is of"),
    ("one tensor less", lambda folder: rewrite_weights(folder, lambda t: t.pop("layers.0.bias")), "none: it is missing"),
    ("one tensor more", lambda folder: rewrite_weights(folder, lambda t: t.update(more=torch.ones(1))), "no such tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_an_invalid_version_is_rejected_with_a_reason(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    folder = publish_tiny(tmp_path, "tiny-gan").folder
    damage(folder)
    with pytest.raises(store.StoreError, match=sentence):
        store.read_version(tmp_path, "tiny-gan", 1).network()


def test_a_pickle_instead_of_the_weights_is_not_loaded(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, "tiny-gan").folder
    torch.save({"layers.0.bias": torch.ones(8)}, folder / store.WEIGHTS)
    rewrite_card(folder, weights_sha256=hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(store.StoreError, match="not a safetensors file"):
        store.read_version(tmp_path, "tiny-gan", 1)


def test_leftovers_of_a_killed_publisher_are_not_versions(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    shutil.copytree(tmp_path / "tiny-gan", tmp_path / ".publish-x" / "tiny-gan")
    (tmp_path / "tiny-gan" / "latest").mkdir()
    (tmp_path / "tiny-gan" / "02").mkdir()
    assert list(store.all_versions(tmp_path)) == [("tiny-gan", 1)]


PUBLISHER = """
import sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
from support.networks import publish_tiny
for _ in range(3): publish_tiny(Path(sys.argv[1]), "tiny-gan")
"""


def test_concurrent_publishers_get_different_versions(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", PUBLISHER, str(tmp_path)]] * 2
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [number for _, number in store.all_versions(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for _, number in store.all_versions(tmp_path):
        store.read_version(tmp_path, "tiny-gan", number).network()


def test_the_shipped_store_is_valid() -> None:
    versions = [
        store.read_version(ROOT / "models_store", *version) for version in store.all_versions(ROOT / "models_store")
    ]
    assert {version.card.task for version in versions} == {"classify", "continue", "forecast", "sample"}
    for version in versions:
        version.network()
    assert set(store.read_defaults(ROOT / "models_store").values()) <= {version.card.name for version in versions}


def test_the_next_publisher_removes_the_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    for folder in (".publish-dead", ".publish-busy", ".publish-young"):
        (tmp_path / folder / "tiny-gan" / "1").mkdir(parents=True)
    for folder in (".publish-dead", ".publish-busy"):
        os.utime(tmp_path / folder, (0, 0))
    with file_lock(tmp_path / ".publish-busy"):  # the lock of a running publisher
        publish_tiny(tmp_path, "tiny-gan")
    assert {path.name for path in tmp_path.glob(".publish-*")} == {".publish-busy", ".publish-young"}


def test_reading_a_version_does_not_import_the_compiler() -> None:
    script = (
        "import sys; from pathlib import Path; from app import store; "
        "[store.read_version(Path('models_store'), *version).network() for version in store.all_versions(Path('models_store'))]; "
        "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_an_unreadable_folder_does_not_affect_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny-cnn", "tiny-gan"):
        publish_tiny(tmp_path, name)
    iterdir = Path.iterdir

    def failing_iterdir(self: Path) -> Iterator[Path]:  # root ignores file permissions
        if self.name == "tiny-cnn":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", failing_iterdir)
    assert list(store.all_versions(tmp_path)) == [("tiny-gan", 1)]
    monkeypatch.setattr(Path, "iterdir", iterdir)
    before = StoreSnapshot.scan(tmp_path, StoreSnapshot(), {})
    monkeypatch.setattr(Path, "iterdir", failing_iterdir)
    # The versions of the unreadable folder are kept.
    assert StoreSnapshot.scan(tmp_path, before, {}).numbers == {"tiny-cnn": [1], "tiny-gan": [1]}
    snapshot = StoreSnapshot.scan(tmp_path, StoreSnapshot(), {})
    assert [(failure.name, failure.version, failure.reason) for failure in snapshot.failures] == [
        ("tiny-cnn", 0, "tiny-cnn cannot be read: Permission denied")
    ]
    assert list(snapshot.cards) == [("tiny-gan", 1)]


def test_published_files_are_readable_by_other_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = publish_tiny(tmp_path, "tiny-gan").folder
    finally:
        os.umask(before)
    for path in (folder.parent, folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
        assert path.is_file() or path.stat().st_mode & 0o111 == 0o111, path
