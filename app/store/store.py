"""The model store: a folder with all versions of all models.

    defaults.json                the default model of each task
    <name>/active.json           the rollout of a model, see ``app.store.rollout``; absent until the first change
    <name>/<version>/            model.safetensors, card.json, and pictures of the training (curves.png, samples.png)
    .lock                        empty file that a process locks while it changes the other files

A version never changes after it is published, and no command deletes one. Each change is one rename, so that readers
see either the old or the new store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import RootModel

from app.store.card import (
    CARD,
    Card,
    StoreError,
    TaskName,
    VersionNotFound,
    card_text,
    check_name,
    is_model_name,
    is_worse,
    parse,
    parse_card,
)
from app.store.disk import Disk
from app.store.rollout import FILE, LATEST, Canary, Roles, Rollout, Shadow

if TYPE_CHECKING:  # torch takes seconds to import, and many commands need only cards
    from torch import Tensor

    from app.store.version import Version

Check = Callable[["Version"], object]  # raises StoreError for a version that the service cannot load
WEIGHTS = "model.safetensors"
DEFAULTS = "defaults.json"
PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")
NUMBER = re.compile(r"[1-9]\d{0,8}")


class RolloutRefused(StoreError):
    """The model exists, but its current rollout does not allow the change."""


Defaults = RootModel[dict[TaskName, str]]


class Store:
    """The versions, rollouts and default models in ``folder``.

    ``check`` raises StoreError for a version that the service cannot load. With it, all files of a version are verified
    before the version is active. Without it, a version is valid if its card is readable.

    Methods raise VersionNotFound for a model or version that does not exist, StoreError for an invalid file, and
    OSError if the folder cannot be read or written. If a change raises an error, the store has its old or its new
    content.
    """

    def __init__(self, folder: Path, check: Check | None = None, disk: Disk | None = None) -> None:
        self.folder = folder
        self.disk = disk or Disk()
        self._check = check

    # Reading

    def path(self, name: str, number: int) -> Path:
        """Return the folder of a version."""
        return self.folder / name / str(number)

    def names(self) -> list[str]:
        """Return the sorted names of the models. They may have no version, or invalid ones."""
        return sorted(filter(is_model_name, self.disk.list(self.folder)))

    def numbers(self, name: str) -> list[int]:
        """Return the sorted version numbers of a model, or an empty list if there is no such model."""
        try:
            entries = self.disk.list(self.folder / name) if is_model_name(name) else []
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"{name} cannot be read: {error.strerror}") from error
        return sorted(int(entry) for entry in entries if NUMBER.fullmatch(entry))

    def versions(self) -> Iterator[tuple[str, int]]:
        """Yield (name, number) of all versions in sorted order, except those in unreadable folders."""
        for name in self.names():
            with suppress(StoreError):
                yield from ((name, number) for number in self.numbers(name))

    def find(self, name: str, number: int | None = None) -> list[int]:
        """Return the sorted version numbers of a model. Raises VersionNotFound also if ``number`` is not in them."""
        check_name(name)
        numbers = self.numbers(name)
        if not numbers:
            names = ", ".join(dict(self.versions())) or "none"
            raise VersionNotFound(f"there is no model {name!r} in the store; models in the store: {names}")
        if number is not None and number not in numbers:
            known = ", ".join(map(str, numbers))
            raise VersionNotFound(f"there is no {name}@{number} in the store; versions in the store: {known}")
        return numbers

    def card(self, name: str, number: int) -> Card:
        """Read the card of a version."""
        path = f"{name}/{number}/{CARD}"
        card = parse(Card, self.read_file(path), path)
        for key, actual, expected in (("name", card.name, name), ("version", card.version, number)):
            if actual != expected:
                raise StoreError(f"{path}: {key} is {str(actual)!r}, expected {str(expected)!r} as in the path")
        return card

    def read(self, name: str, number: int) -> Version:
        """Read a version and verify its files."""
        from app.store.version import decode_version

        card = self.card(name, number)
        return decode_version(self.path(name, number), card, self.read_file(f"{name}/{number}/{WEIGHTS}"))

    def verify(self, name: str, number: int) -> Version:
        """Read a version, verify its files, build its network, and apply the check of this store."""
        self.find(name, number)
        version = self.read(name, number)
        version.network()
        if self._check:
            self._check(version)
        return version

    def pictures(self, name: str, number: int) -> list[str]:
        """Return the sorted file names of a version's pictures, such as ``curves.png``."""
        try:
            return sorted(filter(PICTURE.fullmatch, self.disk.list(self.path(name, number))))
        except OSError:  # the folder was just removed, or cannot be read
            return []

    def size(self, name: str, number: int) -> int:
        """Return the total size of a version's files in bytes."""
        try:
            return sum(path.stat().st_size for path in self.path(name, number).iterdir())
        except OSError as error:
            raise StoreError(f"{name}/{number} cannot be read: {error.strerror}") from error

    def rollout(self, name: str) -> Rollout:
        """Read the rollout of a model. Without a file, the newest version is active."""
        content = self.read_file(f"{name}/{FILE}", optional=True)
        return parse(Rollout, content, f"{name}/{FILE}") if content is not None else Rollout()

    def roles(self, name: str, rollout: Rollout | None = None) -> Roles:
        """Return which versions of a model are active, canary and previous, by default with its stored rollout."""
        numbers = self.find(name)
        rollout = self.rollout(name) if rollout is None else rollout
        return rollout.roles(numbers, lambda number: self._is_valid(name, number))

    def active(self, name: str) -> int:
        """Return the active version of a model. Raises RolloutRefused if no version is active."""
        active = self.roles(name).active
        if active is None:
            raise RolloutRefused(f"no version of {name} is active; state a version, such as {name}@1")
        return active

    def defaults(self) -> dict[TaskName, str]:
        """Return the name of the default model of each task."""
        content = self.read_file(DEFAULTS, optional=True)
        return parse(Defaults, content, DEFAULTS).root if content is not None else {}

    def read_file(self, path: str, optional: bool = False) -> Any:
        """Return the content of a file in the store. If ``optional`` is true, return None for a missing file."""
        try:
            return self.disk.read(self.folder / path)
        except OSError as error:
            if optional and isinstance(error, FileNotFoundError):
                return None
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error

    def _is_valid(self, name: str, number: int) -> bool:
        with suppress(StoreError):
            self.verify(name, number) if self._check else self.card(name, number)
            return True
        return False

    # Publishing

    def publish(
        self,
        card: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, Path] | None = None,
        activate: bool | None = None,
    ) -> Version:
        """Publish the next version of the model ``card["name"]`` and return it.

        Args:
            card: all keys of Card except ``version`` and ``weights_sha256``.
            files: pictures to publish with the version, by file name.
            activate: see ``add``.
        """
        from app.store.version import encode_weights

        weights = encode_weights(tensors)
        content = {**card, "version": 1, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        parsed = parse_card(card_text(content), f"the card of {card['name']!r}")  # checks the name, which is a path
        self.disk.make_folder(self.folder)
        with self.disk.scratch(self.folder) as scratch:
            self.disk.write(scratch / WEIGHTS, [weights])
            for file, source in (files or {}).items():
                self.disk.write(scratch / file, [source.read_bytes()])
            return self.add(scratch, parsed, content, activate=activate)

    def add(
        self,
        scratch: Path,
        card: Card,
        content: Mapping[str, Any],
        number: int | None = None,
        activate: bool | None = None,
    ) -> Version:
        """Verify the files in a scratch folder, and move the folder into the store as a version of a model.

        The model becomes the default model of its task if the task has none with a version, unless the model is
        unloaded. The task ``infer`` never has a default.

        Args:
            card: the card, whose version number does not matter.
            content: the card as JSON. It is written with the number of the version.
            number: number of the version; by default the next free one.
            activate: whether the version becomes active. If not, the active version is pinned. None: it becomes active
                unless it is worse than the active version (see ``is_worse``), or an activated version is pinned. The
                first version of a model is always active.

        Raises StoreError for another task than that of the other versions, and RolloutRefused if ``number`` exists.
        """
        from app.store.version import decode_version

        name, wanted = card.name, number
        version = decode_version(scratch, card, self.disk.read(scratch / WEIGHTS))
        version.network()
        if self._check:
            self._check(version)
        with self.disk.lock(self.folder):
            others, rollout = self.numbers(name), self.rollout(name)
            number = wanted or max({0, *others, *rollout.history, *rollout.retired, *rollout.in_use}) + 1
            if number in others:
                advice = "with `renumber`, the import gives the version the next number"
                raise RolloutRefused(f"{name}@{number} is already in the store; {advice}")
            self.check_task(name, number, card.task)
            self.disk.write(scratch / CARD, [card_text({**content, "version": number})])
            for path in (*(scratch / file for file in self.disk.list(scratch)), scratch):
                self.disk.set_mode(path, 0o555 if path == scratch else 0o444)  # the service may run as another user
                self.disk.sync(path)
            self.disk.make_folder(self.folder / name)
            self.disk.set_mode(self.folder / name, 0o555)
            active = None
            if others and not activate:  # with ``activate`` false, an unreadable active version is an error
                active = self.active(name) if activate is False else self.roles(name).active
            if active and (activate is False or is_worse(card, self.card(name, active))):
                # If the process is killed before the next rename, the active version stays pinned.
                self._replace_rollout(name, f"publish {number} --no-activate", lambda _: {"active": active})
            self._move(scratch, card.task, name, number)
        if activate and self.roles(name).active != number:
            self.activate(name, number)
        return self.read(name, number)

    def _move(self, scratch: Path, task: TaskName, name: str, number: int) -> None:
        """Rename a scratch folder to the folder of a version. Change the default model before, and undo it on error.

        If the process is killed between both, the next publication for the task repairs the default model.
        """
        defaults = {} if task == "infer" else self.defaults()
        is_first = task != "infer" and not self.rollout(name).unloaded and not self._has_version(defaults.get(task))
        try:
            if is_first:
                self._write_json(DEFAULTS, {**defaults, task: name})
            self.disk.rename(scratch, self.path(name, number))
        except OSError:
            if is_first:
                self._write_json(DEFAULTS, defaults)
            raise
        for folder in (self.folder / name, self.folder):
            self.disk.sync(folder)

    def _has_version(self, name: str | None) -> bool:
        """Return whether a model has versions, which may be invalid, or a folder that cannot be read."""
        try:
            return name is not None and bool(self.numbers(name))
        except StoreError:
            return True

    def check_task(self, name: str, number: int | None, task: str) -> None:
        """Raise StoreError if a model has versions for another task. For a future version, ``number`` is None.

        Retired versions and those without a readable card do not count. Versions for the task ``infer`` do not count
        either, because an imported network with a task also answers requests of tensors.
        """
        tasks = {}
        for other in set(self.numbers(name)).difference(self.rollout(name).retired, [number]):
            with suppress(StoreError):
                tasks[other] = self.card(name, other).task
        for other, known in tasks.items():
            if known not in (task, "infer"):
                label = f"{name}@{number}" if number else name
                advice = f"use another name, or retire the versions for {known!r}"
                raise StoreError(f"{label}: task is {task!r}, expected {known!r} as for {name}@{other}; {advice}")

    # Changing rollouts and default models

    def activate(self, name: str, version: int | Literal["latest"], share: float = 100) -> Rollout:
        """Make a version the active version, or make it the canary if ``share`` (in per cent) is below 100.

        If ``version`` is "latest", the newest version becomes active. Each version that is published later also becomes
        active. A canary does not change which version is active, and whether later versions become active.

        Raises RolloutRefused if the version is retired, if the share is out of range, or if the requested canary is
        "latest" or the active version. Raises StoreError for another task than that of the other versions.
        """
        if not 0 < share <= 100:
            raise RolloutRefused(f"the share is {share:g}; it should be more than 0 and at most 100 per cent")
        if version == LATEST and share < 100:
            raise RolloutRefused("the newest version cannot be a canary; use a version number")

        alone = {"canary": None, "shadow": None, "unloaded": False}

        def choose(old: Rollout) -> dict[str, Any]:
            roles = self.roles(name)
            now = roles.active
            if version == LATEST:
                newest = self.roles(name, Rollout(retired=old.retired)).active
                if newest:
                    self.check_task(name, newest, self.card(name, newest).task)
                return {"active": None, "history": old.after(now, newest), **alone}
            self._check_usable(old, name, version)
            if share == 100:
                before = roles.previous if version == now else now
                return {"active": version, "history": old.after(before), **alone}
            if version == now:
                raise RolloutRefused(f"{name}@{version} is already active; a canary must be another version")
            return {"canary": Canary(version=version, share=share), "unloaded": False}

        return self._change(name, f"activate {version}" + (f" --share {share:g}" if share < 100 else ""), choose)

    def shadow(self, name: str, version: int | None, share: float = 100) -> Rollout:
        """Send copies of ``share`` per cent of the captured requests to a version. None ends this.

        The answers to the copies are only compared with those of the active version. Another activation ends it, too.

        Raises RolloutRefused and StoreError as ``activate`` does.
        """
        if not 0 < share <= 100:
            raise RolloutRefused(f"the share is {share:g}; it should be more than 0 and at most 100 per cent")

        def choose(old: Rollout) -> dict[str, Any]:
            if version is None:
                return {"shadow": None}
            self._check_usable(old, name, version)
            if version == self.roles(name).active:
                raise RolloutRefused(f"{name}@{version} is active; a shadow must be another version")
            return {"shadow": Shadow(version=version, share=share)}

        return self._change(name, f"shadow {version or 'off'}" + (f" --share {share:g}" if version else ""), choose)

    def _check_usable(self, rollout: Rollout, name: str, version: int) -> None:
        """Raise RolloutRefused for a retired version, and StoreError for one that cannot be served."""
        task = self.verify(name, version).card.task
        if version in rollout.retired:
            raise RolloutRefused(f"{name}@{version} is retired; `retire` with `undo` restores it")
        self.check_task(name, version, task)

    def rollback(self, name: str) -> Rollout:
        """End the canary if there is one. Otherwise, activate the version that was active before.

        Raises RolloutRefused if there is no valid previous version.
        """

        def choose(old: Rollout) -> dict[str, Any]:
            if old.canary:
                return {"canary": None}
            candidates = old.earlier(self.roles(name).active, self.numbers(name))
            target = next((number for number in candidates if self._is_valid(name, number)), None)
            if target is None:
                reason = f"; {name}@{candidates[0]} is invalid" if candidates else ""
                raise RolloutRefused(f"{name} has no previous version{reason}; activate one by its number")
            return {"active": target, "history": old.before(target)}

        return self._change(name, "rollback", choose)

    def retire(self, name: str, version: int, undo: bool = False) -> Rollout:
        """Stop serving a version, even to requests with its number. Its files stay, and ``undo`` serves it again.

        Raises RolloutRefused for the active version, for the canary, and if ``undo`` is true and the version is not
        retired. Raises StoreError if ``undo`` is true and the version is for another task than the other versions.
        """

        def choose(old: Rollout) -> dict[str, Any]:
            self.find(name, version)
            if undo:
                if version not in old.retired:
                    raise RolloutRefused(f"{name}@{version} is not retired")
                if self._is_valid(name, version):
                    self.check_task(name, version, self.card(name, version).task)
                return {"retired": [number for number in old.retired if number != version]}
            if version in (old.active, self.roles(name).active):
                raise RolloutRefused(f"{name}@{version} is the active version; activate another one first")
            if old.canary and version == old.canary.version:
                raise RolloutRefused(f"{name}@{version} is the canary; `rollback` ends it")
            if old.shadow and version == old.shadow.version:
                raise RolloutRefused(f"{name}@{version} is the shadow; `shadow {name} off` ends it")
            return {"retired": sorted({*old.retired, version})}

        return self._change(name, f"retire {version}" + (" --undo" if undo else ""), choose)

    def unload(self, name: str) -> Rollout:
        """Stop serving all versions of a model until it is loaded again. The rest of the rollout stays.

        Raises RolloutRefused for the default model of a task.
        """

        def choose(_: Rollout) -> dict[str, Any]:
            for task, known in self.defaults().items():
                if known == name:
                    raise RolloutRefused(
                        f"{name} is the default for the task {task!r}; make another model the default first"
                    )
            return {"unloaded": True}

        return self._change(name, "unload", choose)

    def load(self, name: str) -> Rollout:
        """Serve an unloaded model again. If the model is not unloaded, nothing is changed."""
        self.find(name)
        present = self.rollout(name)
        return self._change(name, "load", lambda _: {"unloaded": False}) if present.unloaded else present

    def make_default(self, name: str) -> TaskName:
        """Make a model the default model of its task, and return the task. The rollout does not change.

        Raises RolloutRefused if the model is unloaded, if no version is valid, or for the task ``infer``.
        """
        self.find(name)
        with self.disk.lock(self.folder):
            if self.rollout(name).unloaded:
                raise RolloutRefused(f"{name} is unloaded; `load` serves it again")
            active = self.roles(name).active
            if active is None:
                raise RolloutRefused(f"{name} has no valid version; `verify` prints the reasons")
            task = self.card(name, active).task
            if task == "infer":
                raise RolloutRefused(f"{name} is for the task 'infer', which has no default model")
            self._write_json(DEFAULTS, {**self.defaults(), task: name})
            return task

    def _change(self, name: str, command: str, choose: Callable[[Rollout], dict[str, Any]]) -> Rollout:
        """Replace the fields of a rollout that ``choose(rollout)`` returns, under a lock and with one rename."""
        self.find(name)  # checks the name before it becomes a path
        with self.disk.lock(self.folder):
            return self._replace_rollout(name, command, choose)

    def _replace_rollout(self, name: str, command: str, choose: Callable[[Rollout], dict[str, Any]]) -> Rollout:
        """Do the work of ``_change``. The caller must hold the lock of the store."""
        old = self.rollout(name)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        changed = old.model_copy(update={"changed": now, "by": command, **choose(old)})
        self._write_json(f"{name}/{FILE}", changed.model_dump())
        return changed

    def _write_json(self, path: str, content: object) -> None:
        """Replace a file. The caller must hold the lock of the store."""
        self.disk.replace(self.folder / path, (json.dumps(content, indent=2) + "\n").encode())
