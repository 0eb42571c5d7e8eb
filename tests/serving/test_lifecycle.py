"""Simulator of the versions in one process: a random sequence of events, and an oracle that knows each answer.

The store is a real folder, the networks are fake, and the clock is virtual. Each run has a new seed, which is printed;
the environment variable SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import secrets
import shutil
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.fake_network import Control, fake_networks, publish_fake
from support.service import make_settings

from app.errors import NotReady, QuartetError, RetiredModel, TooManyVersions, UnknownModel, UnloadedModel
from app.observability.metrics import Metrics
from app.serving.models import Models
from app.store import WEIGHTS, Roles, Rollout
from app.tasks import SAMPLE

pytestmark = pytest.mark.anyio

RUNS = max(1, int(os.environ.get("MODEL_RUNS", "1")) // 40)  # a run has more events than those of other models
EVENTS = 60  # of operators; about 20 requests follow each of them
ON_DEMAND = 2
IDLE_SECONDS, IN_USE_SECONDS, RETRY_SECONDS = 300.0, 10.0, 30.0
NAMES = ("a", "b", "c")  # a is the default model

Key = tuple[str, int]
Expected = set[int] | type[QuartetError]  # the versions that may answer, or the error


@dataclass
class Stored:
    """A version in the store. ``changes`` counts the changes of its files."""

    number: int  # of its network
    damaged: bool = False
    changes: int = 0


@dataclass
class Content:
    """The content of the store."""

    versions: dict[str, dict[int, Stored]] = field(default_factory=dict)
    rollouts: dict[str, Rollout] = field(default_factory=dict)


@dataclass
class Oracle:
    """What a process should do. It assumes that all loading ends before the next event.

    Attributes:
        store: the content of the store now, and ``seen`` its content at the last scan.
        memory: the versions in memory, with the time of their last request.
        failed: the versions that could not be loaded, with the changes of their files at the last scan, and the time
            after which loading is tried again.
    """

    control: Control
    now: float = 1000.0
    store: Content = field(default_factory=Content)
    seen: Content = field(default_factory=Content)
    memory: dict[Key, float] = field(default_factory=dict)
    failed: dict[Key, tuple[int, float]] = field(default_factory=dict)

    def usable(self, name: str) -> list[int]:
        rollout, versions = self.seen.rollouts[name], self.seen.versions.get(name, {})
        return [n for n in sorted(versions) if n not in rollout.retired and (name, n) not in self.failed]

    def roles(self, name: str) -> Roles:
        return self.seen.rollouts[name].roles(self.usable(name))

    def active(self, name: str) -> int | None:
        return self.roles(name).active

    def canary(self, name: str) -> int | None:
        canary = self.roles(name).canary
        return canary.version if canary else None

    def resident(self, name: str) -> list[int]:
        rollout, previous = self.seen.rollouts[name], self.roles(name).previous
        if rollout.unloaded:
            return []
        kept = previous if previous in rollout.history else None
        return [n for n in (self.active(name), self.canary(name), kept) if n is not None]

    def scan(self) -> None:
        self.seen = deepcopy(self.store)
        for key, (changes, retry_at) in list(self.failed.items()):
            version = self.seen.versions.get(key[0], {}).get(key[1])
            if version is None or version.changes != changes or self.now >= retry_at:
                del self.failed[key]
        self.settle()

    def settle(self) -> None:
        """Load the resident versions, and evict versions that are not served or not used."""
        for name in self.seen.versions:
            while missing := [n for n in self.resident(name) if (name, n) not in self.memory]:
                self.load((name, missing[0]))
        for name, n in list(self.memory):
            is_unloaded = name not in self.seen.versions or self.seen.rollouts[name].unloaded
            is_idle = (
                not is_unloaded and n not in self.resident(name) and self.now - self.memory[name, n] > IDLE_SECONDS
            )
            if is_unloaded or n not in self.usable(name) or is_idle:
                del self.memory[name, n]

    def load(self, key: Key) -> bool:
        version = self.store.versions.get(key[0], {}).get(key[1])
        if version and not version.damaged and version.number not in self.control.full:
            self.memory[key] = self.now
            return True
        is_full = version is not None and not version.damaged
        changes = self.seen.versions[key[0]][key[1]].changes
        self.failed[key] = changes, self.now + RETRY_SECONDS if is_full else math.inf
        return False

    def answer(self, model: str | None) -> Expected:
        """Return the expected answer to a request, and load and evict versions for it."""
        name, _, number = (model or "a").partition("@")
        if not self.seen.versions.get(name):
            return UnknownModel if model else NotReady
        if self.seen.rollouts[name].unloaded and self.usable(name):
            return UnloadedModel
        if not number:
            versions = {self.active(name), self.canary(name)} - {None}
            return {n for n in versions if n} or (UnknownModel if model else NotReady)
        key = name, int(number)
        if key[1] in self.seen.rollouts[name].retired:
            return RetiredModel
        if key[1] not in self.usable(name):
            return UnknownModel
        return self.on_demand(key) if key not in self.memory else {key[1]}

    def on_demand(self, key: Key) -> Expected:
        resident = {(name, n) for name in self.seen.versions for n in self.resident(name)}
        loaded = sorted((used_at, known) for known, used_at in self.memory.items() if known not in resident)
        replaced = loaded[: max(0, len(loaded) + 1 - ON_DEMAND)]
        if any(self.now - used_at < IN_USE_SECONDS for used_at, _ in replaced):
            return TooManyVersions
        for _, known in replaced:
            del self.memory[known]
        is_loaded = self.load(key)
        self.settle()
        return {key[1]} if is_loaded else UnknownModel


class Simulator:
    """Applies random events to a process and to the oracle, and compares each answer."""

    def __init__(self, folder: Path, control: Control, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder, self.control, self.oracle = folder, control, Oracle(control)
        self.numbers = count(1)
        self.answers = Counter[str]()

    async def start(self) -> None:
        for name in NAMES:
            self.oracle.store.versions[name], self.oracle.store.rollouts[name] = {}, Rollout()
            for _ in range(self.random.randint(1, 3)):
                self.publish(name)
        (self.folder / "defaults.json").write_text('{"sample": "a"}')
        settings = make_settings(
            store=self.folder, device="cpu", max_on_demand_versions=ON_DEMAND, inline_seconds=0, threads=1
        )
        self.models = Models(settings, Metrics(), clock=lambda: self.oracle.now)
        await self.models.start()
        self.oracle.scan()

    def note(self, text: str) -> None:
        print(f"{self.oracle.now:.3f} {text}")

    # Events of operators

    def publish(self, name: str) -> Key:
        version = Stored(next(self.numbers))
        number = publish_fake(self.folder, name, version.number).card.version
        self.oracle.store.versions[name][number] = version
        self.note(f"publish {name}@{number}")
        return name, number

    def roll_out(self, name: str) -> None:
        """Write a random rollout file."""
        numbers = sorted(self.oracle.store.versions[name])
        choose = self.random.choice
        active = choose([None, *numbers])
        canary = choose([None, *numbers])
        history = [choose(numbers) for _ in range(self.random.randint(0, 2))]
        retired = [n for n in numbers if n not in (active, canary) and self.random.random() < 0.2]
        content: dict[str, Any] = {"active": active, "history": history, "retired": retired}
        if canary:
            content["canary"] = {"version": canary, "share": choose([1.0, 25.0, 90.0])}
        content["unloaded"] = name != "a" and self.random.random() < 0.2
        self.oracle.store.rollouts[name] = Rollout(**content)
        (self.folder / name / "new.json").write_text(json.dumps(content))
        (self.folder / name / "new.json").rename(self.folder / name / "active.json")
        self.note(f"roll out {name}: {content}")

    def change_files(self, name: str) -> None:
        """Damage a version, or repair a damaged one."""
        number, version = self.random.choice(list(self.oracle.store.versions[name].items()))
        path = self.folder / name / str(number) / WEIGHTS
        path.chmod(0o644)
        content = path.read_bytes()
        path.write_bytes(content[:-7] if version.damaged else content + b"damaged")
        version.damaged, version.changes = not version.damaged, version.changes + 1
        self.note(f"{'damage' if version.damaged else 'repair'} {name}@{number}")

    def remove(self, name: str) -> None:
        if len(versions := self.oracle.store.versions[name]) > 1:
            number = self.random.choice(sorted(versions)[:-1])  # the number of the newest one would be given again
            shutil.rmtree(self.folder / name / str(number))
            del versions[number]
            self.note(f"remove {name}@{number}")

    def change_memory(self, name: str) -> None:
        """Let a version need more memory than there is, or as much as there is."""
        number, version = self.random.choice(list(self.oracle.store.versions[name].items()))
        self.control.full ^= {version.number}
        self.note(f"memory for {name}@{number}: {version.number not in self.control.full}")

    async def step(self) -> None:
        """Apply an event, sometimes scan the store, and send requests."""
        event = self.random.choice(
            [self.publish, self.roll_out, self.roll_out, self.change_files, self.remove, self.change_memory]
        )
        event(self.random.choice(NAMES))
        await self.requests(5)
        self.oracle.now += self.random.choice([0.0, 1.0, 12.0, 40.0, 400.0])
        if self.random.random() < 0.8:
            await self.scan()
        await self.requests(15)

    async def scan(self) -> None:
        self.oracle.now += 0.001
        self.note("scan")
        await self.models.refresh(self.deadline())
        await self.models.settled()
        self.oracle.scan()
        self.check_memory()

    def check_memory(self) -> None:
        """Compare versions in memory and failures with the oracle."""
        loaded = {(model.card.name, model.card.version) for model in self.models.loaded()}
        assert loaded == set(self.oracle.memory)
        failed = {(entry.name, entry.version) for entry in self.models.failures if entry.version}
        assert failed == set(self.oracle.failed)

    # Requests

    def deadline(self) -> float:
        return asyncio.get_running_loop().time() + 60

    async def ask(self, model: str | None, request_id: str = "") -> int | type[QuartetError]:
        """Return the version that answers a request, or its error."""
        try:
            version = await self.models.resolve(SAMPLE, model, request_id, self.deadline())
            return version.card.version
        except QuartetError as error:
            return type(error)

    async def requests(self, number: int) -> None:
        for _ in range(number):
            name = self.random.choice([*NAMES, *NAMES, *NAMES, None, "d"])
            model = f"{name}@{self.random.randint(1, 8)}" if name and self.random.random() < 0.5 else name
            if name in self.oracle.seen.rollouts and (
                self.oracle.seen.rollouts[name].unloaded != self.oracle.store.rollouts[name].unloaded
            ):
                continue  # such a request reads the store; test_models.py
            self.oracle.now += 0.001
            expected = self.oracle.answer(model)
            answer = await self.ask(model, f"r{self.random.randint(1, 10**9)}")
            await self.models.settled()
            self.note(f"request for {model}: {answer}")
            self.answers[str(answer)] += 1
            assert answer in expected if isinstance(expected, set) else answer is expected, expected
            if isinstance(answer, int):
                self.oracle.memory[(model or "a").partition("@")[0], answer] = self.oracle.now
        self.check_memory()

    async def check_share(self, name: str) -> None:
        """Compare the share of a canary's answers with its share in the rollout. The same id gets the same version."""
        canary, rollout = self.oracle.canary(name), self.oracle.seen.rollouts[name]
        if canary is None or rollout.unloaded or not rollout.canary:
            return
        ids = [f"{self.random.random()}" for _ in range(400)]
        answers = [await self.ask(name, each) for each in ids]
        share = rollout.canary.share / 100
        deviation = 5.5 * math.sqrt(len(ids) * share * (1 - share)) + 1
        assert abs(answers.count(canary) - len(ids) * share) < deviation
        assert [await self.ask(name, each) for each in ids[:20]] == answers[:20]
        self.oracle.memory |= {(name, answer): self.oracle.now for answer in answers if isinstance(answer, int)}

    async def check_slow_load(self, name: str) -> None:
        """While a new active version is being loaded, the versions before it answer. Without them, requests wait."""
        if self.oracle.store.rollouts[name].unloaded:
            return
        await self.scan()
        before, canary = self.oracle.active(name), self.oracle.canary(name)
        _, version = self.use_newest(name)
        number = self.oracle.store.versions[name][version].number
        self.control.held.add(number)
        self.note(f"{name}@{version} loads slowly")
        await self.models.refresh(self.deadline())
        await asyncio.to_thread(self.control.wait_until_held, number)
        if before:
            answers = {await self.ask(name, str(index)) for index in range(10)}
            assert answers <= {before, canary}
            self.oracle.memory |= {(name, n): self.oracle.now for n in answers if isinstance(n, int)}
            assert await self.ask(f"{name}@{version}") is UnknownModel  # not served yet
        waiting = [] if before else [asyncio.create_task(self.ask(model)) for model in (name, f"{name}@{version}")]
        await asyncio.sleep(0)
        assert not any(request.done() for request in waiting)
        self.control.release(number)
        await self.models.settled()
        assert await asyncio.gather(*waiting) == [version] * len(waiting)
        self.oracle.scan()
        self.check_memory()
        assert await self.ask(name) == version

    def use_newest(self, name: str, **rollout: Any) -> Key:
        """Publish a version that becomes active."""
        self.oracle.store.rollouts[name] = Rollout(**rollout)
        (self.folder / name / "active.json").write_text(json.dumps(rollout))
        return self.publish(name)

    async def check_shutdown(self) -> None:
        """Accepted requests are answered, also by an evicted version. Requests that wait for loading are rejected."""
        name, version = self.use_newest("a")
        self.use_newest("c", history=[])
        waiting_for, _ = self.publish("c"), self.publish("c")
        await self.scan()
        model = await self.models.resolve(SAMPLE, "a", "", self.deadline())
        number = self.oracle.store.versions[name][version].number
        self.control.held.add(number)
        images = [model.predictor.parse(1, None, seed) for seed in range(3)]
        running = [asyncio.create_task(model.engine.submit([images[0]]))]
        await asyncio.to_thread(self.control.wait_until_held, number)
        running += [asyncio.create_task(model.engine.submit([image])) for image in images[1:]]
        await asyncio.sleep(0)  # these two wait for the next batch
        self.use_newest("a", retired=[version])
        await self.scan()
        assert (name, version) not in self.oracle.memory
        slow = self.use_newest("b")
        slow_number = self.oracle.store.versions["b"][slow[1]].number
        self.control.held.add(slow_number)
        await self.models.refresh(self.deadline())
        await asyncio.to_thread(self.control.wait_until_held, slow_number)
        self.oracle.now += 2 * IN_USE_SECONDS
        waiting = asyncio.create_task(self.ask(f"c@{waiting_for[1]}"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(self.models.close())
        await asyncio.sleep(0)
        assert await self.ask("a") is NotReady
        assert await waiting is NotReady
        for each in (number, slow_number):
            self.control.release(each)
        await closing
        assert [int(image.item()) for (image,) in await asyncio.gather(*running)] == [number % 256] * 3


@pytest.mark.parametrize("_run", range(RUNS))
async def test_each_request_gets_the_answer_of_the_oracle(tmp_path: Path, _run: int) -> None:
    seed = int(os.environ.get("SEED", secrets.randbelow(2**32)))
    print(f"SEED={seed}")
    with fake_networks() as control:
        simulator = Simulator(tmp_path, control, seed)
        await simulator.start()
        for _ in range(EVENTS):
            await simulator.step()
            if simulator.random.random() < 0.3:
                await simulator.scan()
                await simulator.check_share(simulator.random.choice(NAMES))
            if simulator.random.random() < 0.2:
                await simulator.check_slow_load(simulator.random.choice(NAMES))
        await simulator.check_shutdown()
        assert simulator.answers.total() >= 1000
    print(simulator.answers)
