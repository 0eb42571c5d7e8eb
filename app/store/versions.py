"""Read, verify, list and publish the versions in the model store. The store never contains or loads pickle files.

    defaults.json                the default model of each task
    <name>/active.json           the rollout of a model, see ``app.store.rollout``; absent until the first change
    <name>/<version>/            model.safetensors, card.json, and pictures of the training (curves.png, samples.png)
    .lock, <name>/.lock          empty files that a process locks while it changes the other files

A version never changes after it is published. A version is published by one rename, so readers see either the whole
version or nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from app.networks import KINDS, Kind, TaskName, build, is_imported
from app.store.atomic_files import folder_lock, replace_file, scratch_folder, sync
from app.store.card import CARD, Card, StoreError, card_text, parse_card, read_card

WEIGHTS = "model.safetensors"
ROLLOUT = "active.json"
LOST_AND_FOUND = "lost+found"  # at the root of an ext4 file system; only root may read it
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
REPEATED = ("layers", "members")  # sizes that count modules; each module has its own weights
PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")


class SkipInit(TorchFunctionMode):
    """A mode of torch that skips the initialisation of weights.

    Tensors on the meta device have no values to initialise. Without this mode, torch would import its compiler to
    initialise them, which takes a second and 67 MiB per process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]  # torch passes the arguments of these functions by name
        return (torch.empty if func in (torch.zeros, torch.ones) else func)(*args, **kwargs)


@dataclass(frozen=True)
class Version:
    """A verified version. Its card is valid, and its weights have the hash on the card.

    The weights are finite, except those of imported networks, which may contain infinity and NaN.
    """

    folder: Path
    card: Card
    tensors: dict[str, Tensor]

    @property
    def label(self) -> str:
        """The version as ``name@version``, for error messages."""
        return f"{self.folder.parent.name}@{self.folder.name}"

    def path_of(self, file: str) -> str:
        """Return ``name/version/file``, the path of a file in the store, for error messages."""
        return f"{self.folder.parent.name}/{self.folder.name}/{file}"

    def network(self) -> Any:
        """Return the network with its weights, in evaluation mode.

        Raises:
            StoreError: the kind is unknown, the card has another task, or the weights do not fit the sizes.
        """
        card = self.card
        if card.kind not in KINDS:
            raise StoreError(f"{self.path_of(CARD)}: kind is {card.kind!r}, expected one of {', '.join(KINDS)}")
        kind = KINDS[card.kind]
        if is_imported(card.kind):
            return self._imported_network(kind)
        if card.task != kind.task:
            raise StoreError(f"{self.path_of(CARD)}: task is {card.task!r}, expected {kind.task!r}")
        # check these sizes against the weights first, because a network with large wrong sizes would take much memory
        for key in REPEATED:
            if isinstance(count := card.sizes.get(key), int) and count > len(self.tensors):
                raise StoreError(f"{self.path_of(CARD)}: {key} is {count}, and there are {len(self.tensors)} tensors")
        try:
            with torch.device("meta"), SkipInit():
                expected = {
                    key: tuple(tensor.shape) for key, tensor in build(card.kind, card.sizes).state_dict().items()
                }
        except Exception as error:  # torch and Python raise exceptions of many classes for wrong sizes
            raise StoreError(f"{self.path_of(CARD)}: sizes {card.sizes} do not make a {card.kind}: {error}") from error
        actual = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        for key in sorted(expected.keys() | actual.keys()):
            if expected.get(key) != actual.get(key):
                raise StoreError(
                    f"{self.path_of(WEIGHTS)}: tensor {key!r} has shape {actual.get(key, 'none: it is missing')}, "
                    f"expected {expected.get(key, 'no such tensor')}"
                )
        network = build(card.kind, card.sizes)
        network.load_state_dict(self.tensors)
        return network.eval().requires_grad_(False)

    def _imported_network(self, kind: Kind) -> Any:
        """Return an imported network. Raises StoreError if it is invalid."""
        try:
            kind.sizes(**self.card.sizes)
        except TypeError as error:
            raise StoreError(f"{self.path_of(CARD)}: sizes do not fit: {error}") from error
        try:
            return kind.network(self.tensors)
        except ValueError as error:
            raise StoreError(f"{self.path_of(WEIGHTS)}: {error}") from error


Check = Callable[[Version], object]  # raises StoreError for a version that the service cannot load


def model_names(store: Path) -> list[str]:
    """Return the sorted names of the folders in the store. Their content is not checked.

    Hidden folders, and the folder ``lost+found`` at the root of a file system, are left out.
    """
    return sorted(
        path.name
        for path in store.iterdir()
        if not path.name.startswith(".") and path.name != LOST_AND_FOUND and _is_folder(path)
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # treat it as a folder, so that the function that reads the folder reports the error
        return True


def version_numbers(store: Path, name: str) -> list[int]:
    """Return the sorted version numbers of a model. The versions may be invalid.

    Raises StoreError for an unreadable folder.
    """
    try:
        entries = [path.name for path in (store / name).iterdir()]
    except FileNotFoundError:  # the folder was just removed
        return []
    except OSError as error:
        raise StoreError(f"{name} cannot be read: {error.strerror}") from error
    return sorted(int(entry) for entry in entries if re.fullmatch(r"[1-9]\d{0,8}", entry))


def all_versions(store: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, version) of all published versions in sorted order. The versions may be invalid.

    Unreadable folders are skipped.
    """
    for name in model_names(store):
        with suppress(StoreError):
            yield from ((name, number) for number in version_numbers(store, name))


def read_version(store: Path, name: str, version: int) -> Version:
    """Read and verify one version. Raises StoreError if it is invalid."""
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
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch lacks
        raise StoreError(f"{path} is not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(_dtype_name, DTYPES))
            raise StoreError(f"{path}: tensor {key!r} has dtype {_dtype_name(tensor.dtype)}, expected one of {known}")
        if is_imported(card.kind):  # an imported graph may mask values with infinity
            continue
        finite = torch.isfinite(tensor.float())  # float64 values that are too large for float32 are not finite here
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise StoreError(f"{path}: tensor {key!r} has {bad} non-finite values, expected none")
    return Version(folder, card, tensors)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def version_pictures(store: Path, name: str, version: int) -> dict[str, Path]:
    """Return the paths of a version's pictures by file name, such as ``curves.png``."""
    try:
        paths = sorted((store / name / str(version)).iterdir())
        return {path.name: path for path in paths if PICTURE.fullmatch(path.name) and path.is_file()}
    except OSError:  # the folder was just removed, or cannot be read
        return {}


def read_defaults(store: Path) -> dict[TaskName, str]:
    """Return the name of the default model of each task. Raises StoreError if ``defaults.json`` is invalid."""
    path = store / "defaults.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be read: {error}") from error
    tasks = TaskName.__args__  # type: ignore[attr-defined]
    if not isinstance(content, dict) or not all(task in tasks and isinstance(content[task], str) for task in content):
        raise StoreError(f"{path.name}: expected an object from task ({', '.join(tasks)}) to the name of a model")
    return content


def unserved_defaults(
    defaults: Mapping[TaskName, str], stored: Collection[str], unloaded: Collection[str]
) -> list[str]:
    """Return an error message for each default model that is not in the store or that is unloaded."""
    names = dict.fromkeys(defaults.values())
    reasons = [f"defaults.json names {name!r}, which is not in the store" for name in names if name not in stored]
    return reasons + [f"defaults.json names {name!r}, which is unloaded" for name in names if name in unloaded]


def publish(
    store: Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Mapping[str, Path] | None = None
) -> Version:
    """Publish the next version of the model ``card["name"]`` and return it.

    The model becomes the default model of its task if the task has none with a version. The task ``infer`` never has a
    default.

    Args:
        card: all keys of Card except ``version`` and ``weights_sha256``.
        files: pictures to publish with the version, by file name.

    Raises:
        StoreError: the version or ``defaults.json`` is invalid. Nothing has been published.
        OSError: the store cannot be written.
    """
    name, weights = str(card["name"]), encode_weights(tensors)
    store.mkdir(parents=True, exist_ok=True)
    number, is_moved = 0, False
    while not is_moved:
        number = next_number(store, name)
        content = {**card, "version": number, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        text = card_text(content)
        parse_card(text, f"the card of {name!r}")  # checks the name before it becomes a path
        with scratch_folder(store) as scratch:
            folder = scratch / name / str(number)
            folder.mkdir(parents=True)
            (folder / WEIGHTS).write_bytes(weights)
            (folder / CARD).write_bytes(text)
            for file, source in (files or {}).items():
                shutil.copyfile(source, folder / file)
            is_moved = move_into_store(store, folder)
    return read_version(store, name, number)


def next_number(store: Path, name: str) -> int:
    """Return the number of the next version of a model.

    The number is larger than all numbers in the rollout file too. Otherwise, a new version could get the number of a
    removed version, and would be retired or active as the removed version was.
    """
    numbers = [number for known, number in all_versions(store) if known == name]
    rollout = _rollout(store, name)
    with suppress(TypeError, AttributeError):
        canary = rollout.get("canary") or {}
        named = [rollout.get(key) for key in ("active", "previous", "latest")]
        named += [canary.get("version"), *rollout.get("retired", ())]
        numbers += [number for number in named if isinstance(number, int)]
    return max(numbers, default=0) + 1


def _rollout(store: Path, name: str) -> dict[str, Any]:
    """Return the content of the rollout file. The result is empty for an invalid file, which other functions report."""
    with suppress(OSError, ValueError):
        content = json.loads((store / name / ROLLOUT).read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def task_problem(store: Path, name: str, version: int | None, task: str, retired: Collection[int]) -> str | None:
    """Return an error message if a model has versions for another task. For a future version, ``version`` is None.

    Versions in ``retired`` and invalid versions do not count. Versions for the task ``infer`` do not count either,
    because an imported network with a task also answers requests of tensors.
    """
    for number in version_numbers(store, name):
        if number == version or number in retired:
            continue
        with suppress(StoreError):
            other = read_card(store / name / str(number)).task
            if other not in (task, "infer"):
                read_version(store, name, number).network()
                label = f"{name}@{version}" if version else name
                advice = f"use another name, or retire the versions for {other!r}"
                return f"{label}: task is {task!r}, expected {other!r} as for {name}@{number}; {advice}"
    return None


def move_into_store(store: Path, folder: Path, check: Check | None = None) -> bool:
    """Verify a version in a scratch folder ``.../name/number`` and move it into the store by one rename.

    The model becomes the default model of its task if the task has none with a version, unless the model is unloaded.
    The task ``infer`` never has a default. Returns False if a version with this number has been published in the
    meantime, otherwise True. Raises StoreError for an invalid version, for a version with another task than the other
    versions of the model, and for an invalid ``defaults.json``. After any error, the version is still in the scratch
    folder.
    """
    name, number = folder.parent.name, folder.name
    version = read_version(folder.parent.parent, name, int(number))
    version.network()
    if check:
        check(version)
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))  # the service may run as another user
        sync(path)
    with suppress(FileExistsError):
        (store / name).mkdir()
        (store / name).chmod((store / name).stat().st_mode | 0o555)
    task, target, moved = version.card.task, store / name / number, False
    with folder_lock(store):  # so that two first publications do not both become the default model
        rollout = _rollout(store, name)
        retired = rollout.get("retired")
        if problem := task_problem(store, name, int(number), task, retired if isinstance(retired, list) else ()):
            raise StoreError(problem)
        defaults = {} if task == "infer" else read_defaults(store)
        may_be_default = task != "infer" and rollout.get("unloaded") is not True
        is_first = may_be_default and not _has_version(store, defaults.get(task))
        try:
            if is_first:  # before the rename: if the process is killed in between, the next publication repairs it
                _write_defaults(store, {**defaults, task: name})
            folder.rename(target)
            moved = True
            sync(store / name)
            sync(store)
        except OSError:
            with suppress(OSError):  # the file may have been replaced before the error
                if is_first and read_defaults(store) != defaults:
                    _write_defaults(store, defaults)
            if moved:
                target.rename(folder)
            elif target.exists():
                return False
            raise
    return True


def _has_version(store: Path, name: str | None) -> bool:
    """Return whether the store has versions of a model, which may be invalid, or a folder of it that is unreadable."""
    try:
        return name is not None and bool(version_numbers(store, name))
    except StoreError:
        return True


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the weights file that ``publish`` would write."""
    return hashlib.sha256(encode_weights(tensors)).hexdigest()


def encode_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a weights file with these tensors."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})


def set_default(store: Path, task: TaskName, name: str) -> None:
    """Make a model the default of a task, by one rename."""
    with folder_lock(store):
        _write_defaults(store, {**read_defaults(store), task: name})


def _write_defaults(store: Path, defaults: dict[TaskName, str]) -> None:
    """Replace ``defaults.json``. The caller must hold the ``folder_lock`` of the store."""
    replace_file(store / "defaults.json", json.dumps(defaults, indent=2) + "\n")
