"""The file format of ``models_store/``: read, verify, list and publish versions. No pickle is ever loaded from it.

    defaults.json                which model serves each task when the caller names none
    <name>/active.json           which version serves, once somebody has chosen: see ``app.store.rollout``
    <name>/<version>/            model.safetensors, card.json, and pictures of the training (curves.png, samples.png)

A version never changes after it is published, and becomes visible by one rename: a reader sees all of it or none.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from app.networks import KINDS, TaskName, build
from app.store.card import CARD, Card, StoreError, parse_card, read_card
from app.store.files import file_lock, replace_file, scratch_folder, sync

WEIGHTS = "model.safetensors"
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
REPEATED = ("layers", "members")  # sizes that say how many modules there are, each with weights of its own
PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")


class SkipInit(TorchFunctionMode):
    """Initialisers leave tensors as they are: on the meta device there is nothing to fill, and to try brings in torch's
    compiler, for a second and 67 MiB of every process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in (torch.zeros, torch.ones) else func)(*args, **kwargs)


@dataclass(frozen=True)
class Version:
    """A whole version: its card is checked, its weights have the card's hash and are finite."""

    folder: Path
    card: Card
    tensors: dict[str, Tensor]

    @property
    def label(self) -> str:
        """``name/version``, as sentences name it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def network(self) -> Any:
        """The network with its weights, in evaluation mode. Raises StoreError when they do not fit its sizes."""
        card = self.card
        if card.kind not in KINDS:
            raise StoreError(f"{self.label}/{CARD}: kind is {card.kind!r}, expected one of {', '.join(KINDS)}")
        if card.task != KINDS[card.kind].task:
            raise StoreError(f"{self.label}/{CARD}: task is {card.task!r}, expected {KINDS[card.kind].task!r}")
        # whatever the sizes say, no memory is taken, and no more modules made, before the weights are seen to fit
        for key in REPEATED:
            if isinstance(count := card.sizes.get(key), int) and count > len(self.tensors):
                raise StoreError(f"{self.label}/{CARD}: {key} is {count}, and there are {len(self.tensors)} tensors")
        try:
            with torch.device("meta"), SkipInit():
                expected = {
                    key: tuple(tensor.shape) for key, tensor in build(card.kind, card.sizes).state_dict().items()
                }
        except Exception as error:  # what torch and Python raise for sizes that are none has no common class
            raise StoreError(f"{self.label}/{CARD}: sizes {card.sizes} do not make a {card.kind}: {error}") from error
        found = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise StoreError(
                    f"{self.label}/{WEIGHTS}: tensor {key!r} has shape {found.get(key, 'none: it is missing')}, "
                    f"expected {expected.get(key, 'no such tensor')}"
                )
        network = build(card.kind, card.sizes)
        network.load_state_dict(self.tensors)
        return network.eval().requires_grad_(False)


def model_names(store: Path) -> list[str]:
    """The folders of the store, in order, whatever is in them."""
    return sorted(path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith("."))


def version_numbers(store: Path, name: str) -> list[int]:
    """The versions of a name, in order, whole or not. Raises StoreError for a folder that cannot be read."""
    try:
        entries = [path.name for path in (store / name).iterdir()]
    except FileNotFoundError:  # removed a moment ago
        return []
    except OSError as error:
        raise StoreError(f"{name} cannot be read: {error.strerror}") from error
    return sorted(int(entry) for entry in entries if re.fullmatch(r"[1-9]\d{0,8}", entry))


def all_versions(store: Path) -> Iterator[tuple[str, int]]:
    """Name and version of all that is published, whole or not, in order; nothing of folders that cannot be read."""
    for name in model_names(store):
        with suppress(StoreError):
            yield from ((name, number) for number in version_numbers(store, name))


def read_version(store: Path, name: str, version: int) -> Version:
    """One version, verified. Raises StoreError with the file, the key, what was found and what was expected."""
    folder = store / name / str(version)
    card = read_card(folder)
    path = f"{name}/{version}/{WEIGHTS}"
    try:
        content = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights_sha256:
        raise StoreError(f"{path}: sha256 is {digest}, expected {card.weights_sha256} as on the card")
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # a type that torch lacks is a KeyError
        raise StoreError(f"{path} is not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(_dtype_name, DTYPES))
            raise StoreError(f"{path}: tensor {key!r} is of {_dtype_name(tensor.dtype)}, expected one of {known}")
        finite = torch.isfinite(tensor.float())  # as it is computed with: a larger one of float64 is none there
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise StoreError(f"{path}: tensor {key!r} has {bad} values that are not finite, expected none")
    return Version(folder, card, tensors)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_size(store: Path, name: str, version: int) -> int:
    """The bytes of a version's weights file; 0 when there is none."""
    path = store / name / str(version) / WEIGHTS
    return path.stat().st_size if path.is_file() else 0


def version_pictures(store: Path, name: str, version: int) -> dict[str, Path]:
    """The pictures that lie beside a published version, by file name, such as ``curves.png``."""
    try:
        paths = sorted((store / name / str(version)).iterdir())
    except OSError:  # removed a moment ago
        return {}
    return {path.name: path for path in paths if PICTURE.fullmatch(path.name) and path.is_file()}


def read_defaults(store: Path) -> dict[TaskName, str]:
    """The model that serves each task when the caller names none. Raises StoreError."""
    path = store / "defaults.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be read: {error}") from error
    tasks = TaskName.__args__  # type: ignore[attr-defined]
    if not isinstance(content, dict) or not all(task in tasks and isinstance(content[task], str) for task in content):
        raise StoreError(f"{path.name}: expected an object from task ({', '.join(tasks)}) to the name of a model")
    return content


def publish(
    store: Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Mapping[str, Path] | None = None
) -> Version:
    """Write the next version of ``card["name"]`` and return it as a reader sees it.

    ``card`` has all keys of Card but ``version`` and ``weights_sha256``; ``files`` are pictures to lie beside it.
    Becomes the task's default when the task has none. Raises StoreError, and leaves nothing behind, when the
    version would not be whole; OSError when the store cannot be written.
    """
    name, weights = str(card["name"]), save(_contiguous(tensors))
    store.mkdir(parents=True, exist_ok=True)
    number, placed = 0, False
    while not placed:
        number = max((number for known, number in all_versions(store) if known == name), default=0) + 1
        whole = {**card, "version": number, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        text = (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
        parse_card(text, f"the card of {name!r}")  # before a name becomes a path
        with scratch_folder(store) as aside:
            folder = aside / name / str(number)
            folder.mkdir(parents=True)
            (folder / WEIGHTS).write_bytes(weights)
            (folder / CARD).write_bytes(text)
            for file, source in (files or {}).items():
                shutil.copyfile(source, folder / file)
            placed = place(store, folder)
    return read_version(store, name, number)


def place(store: Path, folder: Path) -> bool:
    """Check a version that lies aside, in ``.../name/number``, and make it visible by one rename.

    Becomes its task's default when the task has none. False when somebody else has published this number in the
    meantime. Raises StoreError when it is not whole.
    """
    name, number = folder.parent.name, folder.name
    version = read_version(folder.parent.parent, name, int(number))
    version.network()
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))  # whoever serves is often another user
        sync(path)
    with suppress(FileExistsError):
        (store / name).mkdir()
        (store / name).chmod((store / name).stat().st_mode | 0o555)
    try:
        folder.rename(store / name / number)
    except OSError:
        if (store / name / number).exists():
            return False
        raise
    sync(store / name)
    sync(store)
    if version.card.task not in read_defaults(store):
        set_default(store, version.card.task, name)
    return True


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 that weights have once they are published."""
    return hashlib.sha256(save(_contiguous(tensors))).hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def set_default(store: Path, task: TaskName, name: str) -> None:
    """Make a model the one that serves its task, by one rename."""
    with file_lock(store):
        replace_file(store / "defaults.json", json.dumps({**read_defaults(store), task: name}, indent=2) + "\n")
