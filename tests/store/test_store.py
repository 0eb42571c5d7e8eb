"""The model store: publishing, reading and verifying versions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import TINY, make_invalid, publish_small, publish_tiny, rewrite_card, rewrite_weights, tiny_card
from support.processes import start_python
from support.service import ROOT

from app import store
from app.networks import KINDS, build, is_imported
from app.store import versions
from app.store.atomic_files import folder_lock, replace_file


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


def test_nothing_is_published_if_the_default_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    calls: list[object] = []

    def replace_and_fail_once(*arguments: Any) -> None:
        replace_file(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            full_disk()

    for failing in (full_disk, replace_and_fail_once):
        with monkeypatch.context() as patch:
            patch.setattr(versions, "replace_file", failing)
            with pytest.raises(OSError, match="No space left on device"):
                publish_tiny(tmp_path, "tiny-gan")
        assert not list(store.all_versions(tmp_path))
        assert store.read_defaults(tmp_path) == {}
    assert publish_tiny(tmp_path, "tiny-gan").card.version == 1
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan"}


@pytest.mark.parametrize("killed_at", ["_write_defaults", "rename"])
def test_after_a_publisher_was_killed_the_next_one_publishes_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    for name in ("tiny-gan", "tiny-cgan"):
        with monkeypatch.context() as patch:
            patch.setattr(*((versions, killed_at) if killed_at == "_write_defaults" else (Path, killed_at)), kill)
            with pytest.raises(Killed):
                publish_tiny(tmp_path, name)
        assert not list(store.all_versions(tmp_path))  # no version without the default
    publish_tiny(tmp_path, "tiny-cgan")
    assert store.read_defaults(tmp_path) == {"sample": "tiny-cgan"}


def test_a_default_without_versions_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"sample": "gone", "classify": "unreadable"}
    (tmp_path / "defaults.json").write_text(json.dumps(defaults))
    (tmp_path / "unreadable").touch()
    publish_tiny(tmp_path, "tiny-cnn")
    assert store.read_defaults(tmp_path) == defaults

    def failing_rename(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(OSError, match="No space left on device"):
            publish_tiny(tmp_path, "tiny-gan")
    assert store.read_defaults(tmp_path) == defaults
    publish_tiny(tmp_path, "tiny-gan")
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan", "classify": "unreadable"}


def test_an_invalid_version_is_not_published(tmp_path: Path) -> None:
    task, kind, sizes, fields = TINY["tiny-gan"]
    tensors = build(kind, sizes).state_dict()
    tensors["layers.0.bias"][0] = torch.nan
    with pytest.raises(store.StoreError, match=r"layers\.0\.bias.* has 1 non-finite values"):
        store.publish(tmp_path, tiny_card("tiny-gan", task, kind, sizes, fields), tensors)
    with pytest.raises(store.StoreError, match=r"^the card of '\.\./up': name: .*found '\.\./up'$"):
        store.publish(tmp_path, tiny_card("../up", task, kind, sizes, fields), build(kind, sizes).state_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_version_for_another_task_than_the_other_versions_is_not_published(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    task, kind, sizes, fields = TINY["tiny-cnn"]
    card, tensors = tiny_card("tiny-gan", task, kind, sizes, fields), build(kind, sizes).state_dict()
    with pytest.raises(
        store.StoreError, match=r"^tiny-gan@2: task is 'classify', expected 'sample' as for tiny-gan@1; use another"
    ):
        store.publish(tmp_path, card, tensors)
    assert list(store.all_versions(tmp_path)) == [("tiny-gan", 1)]
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan"}
    rollout = tmp_path / "tiny-gan" / store.ROLLOUT
    for content in ("[]", '{"retired": 1}', '{"retired": null}', '{"retired": [2]}'):
        rollout.write_text(content)
        with pytest.raises(store.StoreError, match="expected 'sample'"):
            store.publish(tmp_path, card, tensors)
    rollout.write_text('{"retired": [1]}')
    assert store.publish(tmp_path, card, tensors).card.version == 2
    rollout.unlink()
    make_invalid(tmp_path / "tiny-gan" / "1")
    assert store.publish(tmp_path, card, tensors).card.version == 3


INVALID: list[tuple[str, Callable[[Path], object], str]] = [
    ("no card", lambda folder: (folder / "card.json").unlink(), r"^tiny-gan/1/card\.json cannot be read: No such file or directory$"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), r"^tiny-gan/1/model\.safetensors cannot be read: No such file or directory$"),
    ("card cut", lambda folder: os.truncate(folder / "card.json", 100), r"^tiny-gan/1/card\.json: the file: Invalid JSON"),
    ("weights cut", lambda folder: os.truncate(folder / "model.safetensors", 100), r"^tiny-gan/1/model\.safetensors: sha256 is \w{64}, expected \w{64} as on the card$"),
    ("unknown key", lambda folder: rewrite_card(folder, colour="red"), "colour: Extra inputs are not permitted, found 'red'"),
    ("missing key", lambda folder: rewrite_card(folder, seed="drop"), "seed: Field required"),
    ("other name", lambda folder: rewrite_card(folder, name="other"), r"^tiny-gan/1/card\.json: name is 'other', expected 'tiny-gan' as in the path$"),
    ("other version", lambda folder: rewrite_card(folder, version=7), r"^tiny-gan/1/card\.json: version is '7', expected '1' as in the path$"),
    ("unknown kind", lambda folder: rewrite_card(folder, kind="gru"), r"^tiny-gan/1/card\.json: kind is 'gru', expected one of lenet, "),
    ("other task", lambda folder: rewrite_card(folder, task="classify"), r"^tiny-gan/1/card\.json: task is 'classify', expected 'sample'$"),
    ("no time", lambda folder: rewrite_card(folder, created="yesterday"), "created: .*Invalid isoformat string"),
    ("residuals NaN", lambda folder: rewrite_card(folder, residuals=[1.0, float("nan")]), r"residuals\.1: Input should be a finite"),
    ("seed too wide", lambda folder: rewrite_card(folder, seed=2**64), "seed: Input should be less than"),
    ("size too wide", lambda folder: rewrite_card(folder, sizes={"hidden": [2**70]}), "sizes: .*an integer should have at most 64 bits"),
    ("size NaN", lambda folder: rewrite_card(folder, sizes={"latent": float("nan")}), "sizes: .*a number should be finite"),
    ("year one", lambda folder: rewrite_card(folder, created="0001-01-01"), "created: "),
    ("too many layers", lambda folder: rewrite_card(folder, kind="stacked-rnn", task="continue", sizes={"vocabulary": 5, "layers": 10**12}),
     r"^tiny-gan/1/card\.json: layers is 1000000000000, and there are 4 tensors$"),
    ("as many layers as tensors", lambda folder: rewrite_card(folder, kind="stacked-rnn", task="continue", sizes={"vocabulary": 5, "layers": 4}),
     r"^tiny-gan/1/model\.safetensors: tensor '.*' has shape none: it is missing, expected "),
    ("unknown size", lambda folder: rewrite_card(folder, sizes={"depth": 3}), r"^tiny-gan/1/card\.json: sizes {'depth': 3} do not make a gan-generator: .*depth"),
    ("other sizes", lambda folder: rewrite_card(folder, sizes={"latent": 5, "hidden": [8]}),
     r"^tiny-gan/1/model\.safetensors: tensor 'layers\.0\.weight' has shape \(8, 4\), expected \(8, 5\)$"),
    ("NaN", make_invalid,
     r"^tiny-gan/1/model\.safetensors: tensor 'layers\.0\.bias' has 8 non-finite values, expected none$"),
    ("beyond float32", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
     "8 non-finite values"),
    ("eight bits", lambda folder: rewrite_weights(folder, lambda t: t.update({"layers.0.bias": torch.ones(8, dtype=torch.float8_e4m3fn)})),
     r"'layers\.0\.bias' has dtype float8_e4m3fn, expected one of float32, float16, .*, uint8, bool$"),
    ("complex", lambda folder: raw_weights(folder, b'{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', bytes(8)), "has dtype complex64|not a safetensors"),
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
    with pytest.raises(store.StoreError, match=sentence):
        store.read_version(tmp_path, "tiny-gan", 1).network()


def test_a_pickle_instead_of_the_weights_is_not_loaded(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, "tiny-gan").folder
    torch.save({"layers.0.bias": torch.ones(8)}, folder / store.WEIGHTS)
    rewrite_card(folder, weights_sha256=hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(store.StoreError, match=r"^tiny-gan/1/model\.safetensors is not a safetensors file: "):
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
    processes = [start_python(["-c", PUBLISHER, str(tmp_path)]) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
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
    sizes = [path.stat().st_size for path in (ROOT / "models_store").rglob("*") if path.is_file()]
    assert max(sizes) < 25e6
    assert sum(sizes) < 80e6  # a clone of the repository downloads all of them


def test_the_next_publisher_removes_the_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    for folder in (".publish-dead", ".publish-busy", ".publish-young"):
        (tmp_path / folder / "tiny-gan" / "1").mkdir(parents=True)
    with folder_lock(tmp_path / ".publish-busy"):  # the lock of a running publisher
        for folder in (".publish-dead", ".publish-busy"):
            os.utime(tmp_path / folder, (0, 0))
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


def test_published_files_are_readable_by_other_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = publish_tiny(tmp_path, "tiny-gan").folder
    finally:
        os.umask(before)
    for path in (folder.parent, folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
        assert path.stat().st_mode & 0o111 == (0o111 if path.is_dir() else 0), path


def test_a_loaded_network_is_in_evaluation_mode_and_needs_no_gradients(tmp_path: Path) -> None:
    network = publish_tiny(tmp_path, "tiny-gan").network()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_digest_before_publishing_is_the_one_on_the_card(tmp_path: Path) -> None:
    version = publish_tiny(tmp_path, "tiny-gan")
    assert store.weights_digest(version.tensors) == version.card.weights_sha256
    transposed = {key: tensor.t().contiguous().t() for key, tensor in version.tensors.items()}
    assert store.weights_digest(transposed) == version.card.weights_sha256  # the memory layout does not matter


def test_pictures_are_published_with_a_version_and_listed(tmp_path: Path) -> None:
    task, kind, sizes, fields = TINY["tiny-gan"]
    card, tensors = tiny_card("tiny-gan", task, kind, sizes, fields), build(kind, sizes).state_dict()
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(name.encode())
    pictures = {name: tmp_path / name for name in ("b.png", "a.png")}
    folder = store.publish(tmp_path / "deep" / "store", card, tensors, pictures).folder
    (folder / "folder.png").mkdir()
    (folder / "Upper.png").touch()
    listed = store.version_pictures(tmp_path / "deep" / "store", "tiny-gan", 1)
    assert list(listed.items()) == [("a.png", folder / "a.png"), ("b.png", folder / "b.png")]
    assert listed["a.png"].read_bytes() == b"a.png"
    assert store.version_pictures(tmp_path, "tiny-gan", 2) == {}


def test_a_published_card_is_indented_utf8_with_a_final_newline(tmp_path: Path) -> None:
    task, kind, sizes, fields = TINY["tiny-gan"]
    card = tiny_card("tiny-gan", task, kind, sizes, {**fields, "notes": "é"})
    folder = store.publish(tmp_path, card, build(kind, sizes).state_dict()).folder
    text = (folder / store.CARD).read_bytes().decode()
    assert text.startswith('{\n  "name": "tiny-gan",\n')
    assert '"notes": "é"' in text
    assert text.endswith("\n}\n")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_imported(kind)])
def test_the_size_of_the_weights_is_that_in_memory(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = publish_small(tmp_path, kind, "model").folder

    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items() if tensor.is_floating_point()})

    rewrite_weights(folder, convert)
    version = store.read_version(tmp_path, "model", 1)
    in_memory = sum(tensor.nbytes for tensor in version.network().state_dict().values())
    assert store.weights_size(tmp_path, version.card) == in_memory


def test_the_size_of_missing_weights_is_0_and_that_of_damaged_ones_is_the_size_of_the_file(tmp_path: Path) -> None:
    version = publish_tiny(tmp_path, "tiny-gan")
    for number, content in enumerate((b"", b"{}", struct.pack("<Q", 3) + b"[1]", struct.pack("<Q", 2**63) + b"{")):
        (version.folder / store.WEIGHTS).write_bytes(content + bytes(number))
        assert store.weights_size(tmp_path, version.card) == len(content) + number
    assert store.weights_size(tmp_path, version.card.model_copy(update={"version": 2})) == 0


def test_the_first_default_of_a_task_stays_and_other_tasks_keep_theirs(tmp_path: Path) -> None:
    for name in ("tiny-gan", "tiny-cgan", "tiny-cnn"):
        publish_tiny(tmp_path, name)
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan", "classify": "tiny-cnn"}
    store.set_default(tmp_path, "sample", "tiny-cgan")
    assert (tmp_path / "defaults.json").read_text() == '{\n  "sample": "tiny-cgan",\n  "classify": "tiny-cnn"\n}\n'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"^defaults\.json cannot be read: Expecting property name"),
        ("[]", r"^defaults\.json: expected an object from task \(classify, .*, infer\) to the name of a model$"),
        ('{"sample": 1}', "expected an object from task"),
        ('{"sample": "a", "paint": "b"}', "expected an object from task"),
    ],
)
def test_invalid_defaults_are_rejected(tmp_path: Path, content: str, sentence: str) -> None:
    assert store.read_defaults(tmp_path) == {}
    (tmp_path / "defaults.json").write_text(content)
    with pytest.raises(store.StoreError, match=sentence):
        store.read_defaults(tmp_path)


def test_an_unreadable_folder_is_reported_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "lost+found").mkdir()  # at the root of an ext4 volume
    assert store.version_numbers(tmp_path, "missing") == []
    with pytest.raises(store.StoreError, match=r"^file cannot be read: Not a directory$"):
        store.version_numbers(tmp_path, "file")
    assert store.model_names(tmp_path) == []


def test_with_invalid_defaults_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "defaults.json").write_text("{")
    with pytest.raises(store.StoreError, match=r"^defaults\.json cannot be read: "):
        publish_tiny(tmp_path, "tiny-gan")
    assert list(store.all_versions(tmp_path)) == []


def test_the_first_default_of_a_task_is_chosen_under_the_lock_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_defaults = versions.read_defaults

    def read_locked(folder: Path) -> dict[store.TaskName, str]:
        with pytest.raises(BlockingIOError), folder_lock(folder, wait=False):
            pass
        return read_defaults(folder)

    monkeypatch.setattr(versions, "read_defaults", read_locked)
    for name in ("tiny-gan", "tiny-cgan"):
        publish_tiny(tmp_path, name)
    store.set_default(tmp_path, "classify", "tiny-cnn")
    assert read_defaults(tmp_path) == {"sample": "tiny-gan", "classify": "tiny-cnn"}


def test_a_number_that_was_published_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    first = publish_tiny(tmp_path, "tiny-gan")
    content = (first.folder / store.WEIGHTS).read_bytes()
    other = publish_tiny(tmp_path / "scratch", "tiny-gan")
    assert not store.move_into_store(tmp_path, other.folder)
    assert (first.folder / store.WEIGHTS).read_bytes() == content


def test_nothing_is_published_if_the_folder_of_the_model_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_sync(path: Path) -> None:
        if path == tmp_path / "tiny-gan":
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    publish_tiny(tmp_path, "tiny-gan")
    sync = versions.sync
    monkeypatch.setattr(versions, "sync", failing_sync)
    with pytest.raises(OSError, match="Input/output error"):
        publish_tiny(tmp_path, "tiny-gan")
    assert store.version_numbers(tmp_path, "tiny-gan") == [1]


def test_a_version_that_cannot_be_moved_into_the_store_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_rename(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="No space left"):
        publish_tiny(tmp_path, "tiny-gan")


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
        assert store.parse_card(content, "here").seed == changes["seed"]
        return
    with pytest.raises(store.StoreError, match=f"^here: {sentence}"):
        store.parse_card(content, "here")
