"""The workloads of the speed benchmarks: their requests, their numbers of callers, and the checks of the answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import cbook
from PIL import Image

from app.networks import build
from app.store import Store
from benchmarks.support import load
from benchmarks.support.load import Answer, Figures, Request
from benchmarks.support.servers import ROOT, Server

RNN = "bench-rnn"  # 2 layers of 512 units with random weights, in the benchmark's copy of the store
CNN, STRONG = "cifar10-lenet", "cifar10-whitened"
CHARACTERS = 200
PROMPT = 32  # length of a prompt in characters
HORIZON = 48
DIGITS = 16
TEXTS = 32  # number of texts that are generated during the classification
BOUNDARY = "quartet"

Check = Callable[[Any, Any], bool]  # (answer, Quartet's answer to the same request) -> whether the answer is right


@dataclass(frozen=True)
class Workload:
    """A workload. ``callers`` are the numbers of callers. If ``callers`` is empty, the command line sets them."""

    title: str
    requests: Sequence[Request]
    check: Check
    callers: Sequence[int] = ()
    long: bool = False  # whether an answer that is unfinished at the end counts in part, which ``wrk`` cannot do
    streamed: bool = False

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        """Measure a server. Return a dict from the name of each part of the workload to its figures."""
        return {"": await self.once(server, callers, seconds)}

    async def once(self, server: Server, callers: int, seconds: float) -> Figures:
        requests = self.adapted_requests(server)
        if not self.long and not self.streamed:
            return await load.wrk(server.port, requests, callers, seconds)
        answers = await load.call(server.port, requests, callers, seconds)
        return load.stream_summary(answers) if self.streamed else load.summary(answers)

    def adapted_requests(self, server: Server) -> list[Request]:
        return [server.adapt(request) for request in self.requests]

    def read(self, answer: Answer) -> Any:
        """Return the content of an answer; of a stream, the same content as without streaming.

        Raises ValueError for an error or an incomplete stream.
        """
        if not answer.succeeded or (self.streamed and answer.stream_end != "finished"):
            raise ValueError(f"status {answer.status}: {answer.body[-300:]!r}")
        if self.streamed:
            return {"results": [{"text": "".join(character for _, character in load.arrivals(answer))}]}
        return json.loads(answer.body)


@dataclass(frozen=True, kw_only=True)
class Mixed(Workload):
    """Measures classification alone, then while texts are generated, then while the ``others`` run, too."""

    texts: Workload
    others: Sequence[Workload]

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        alone = await self.once(server, callers, seconds)
        # The texts start before this measurement and end after it.
        texts = asyncio.create_task(self.texts.once(server, TEXTS, math.ceil(seconds) + 0.5))
        await asyncio.sleep(0.4)
        beside = await self.once(server, callers, seconds)
        parts = {"images alone": alone, f"images beside {TEXTS} texts": beside, f"the {TEXTS} texts": await texts}
        works = [self, self.texts, *self.others]
        together = await asyncio.gather(*(work.once(server, callers, math.ceil(seconds)) for work in works))
        names = [f"all four, {task}" for task in ("images", "texts", "forecasts", "generated images")]
        return parts | dict(zip(names, together, strict=True))


def same_label(answer: Any, ours: Any) -> bool:
    label, expected = (each["results"][0]["predictions"][0]["label"] for each in (answer, ours))
    return bool(label == expected)


def whole_text(answer: Any, ours: Any) -> bool:
    return len(answer["results"][0]["text"]) == CHARACTERS


def same_forecast(answer: Any, ours: Any) -> bool:
    """Return whether all means agree up to 0.001. Rounding in float32 causes smaller differences."""
    mean, expected = (each["results"][0]["mean"] for each in (answer, ours))
    return len(mean) == HORIZON and all(abs(a - b) < 1e-3 for a, b in zip(mean, expected, strict=True))


def whole_digits(answer: Any, ours: Any) -> bool:
    files = [io.BytesIO(base64.b64decode(result["image"])) for result in answer["results"]]
    return [Image.open(file).size for file in files] == [(28, 28)] * DIGITS


def prompts(model: str, **options: Any) -> list[Request]:
    text = (
        "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. First Citizen: You are all "
        "resolved rather to die than to famish? All: Resolved, resolved. First Citizen: First, you know Caius Marcius "
    )
    parts = [text[start : start + PROMPT] for start in range(0, len(text) - PROMPT, PROMPT)]
    options |= {"max_characters": CHARACTERS, "temperature": 0.8, "model": model}
    return [Request("/v1/text/continue", json.dumps({"prompt": part, **options}).encode()) for part in parts]


def raw(model: str, files: Sequence[bytes], kind: str) -> list[Request]:
    """Return requests with an image file as the body."""
    return [Request(f"/v1/images/classify?model={model}", file, kind) for file in files]


def form(model: str, files: Sequence[bytes], kind: str) -> list[Request]:
    """Return requests with an image file in a multipart form, as browsers and ``curl -F`` send it."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image"\r\nContent-Type: {kind}\r\n\r\n'
    )
    bodies = [head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode() for file in files]
    return raw(model, bodies, f"multipart/form-data; boundary={BOUNDARY}")


def workloads() -> dict[str, Workload]:
    """Return a dict from the name of each workload to the workload."""
    pictures = [path.read_bytes() for path in sorted((ROOT / "tests/images/cifar10").glob("*.png"))]
    photograph = [Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes()]
    values = json.loads((ROOT / "docs/sine.json").read_text())["values"]
    history = json.dumps({"values": values, "horizon": HORIZON, "model": "sine-lstm"}).encode()
    digits = json.dumps({"count": DIGITS, "model": "mnist-gan"}).encode()
    cnn, photo = "workshop CNN, one 32x32 PNG", f"{STRONG}, one photograph of 512x600 pixels"
    made = {
        "cnn": Workload(cnn, raw(CNN, pictures, "image/png"), same_label),
        "cnn-form": Workload(f"{cnn} in a form", form(CNN, pictures, "image/png"), same_label),
        "strong": Workload(f"{STRONG}, one 32x32 PNG", raw(STRONG, pictures, "image/png"), same_label),
        "photo": Workload(photo, raw(STRONG, photograph, "image/jpeg"), same_label),
        "photo-form": Workload(f"{photo} in a form", form(STRONG, photograph, "image/jpeg"), same_label),
        "text": Workload(f"text, {PROMPT} characters in, {CHARACTERS} out", prompts(RNN), whole_text, long=True),
        "streams": Workload(
            f"streams of {CHARACTERS} characters", prompts(RNN, stream=True), whole_text, (8, 64), streamed=True
        ),
        "forecast": Workload(f"forecasts of {HORIZON} steps", [Request("/v1/series/forecast", history)], same_forecast),
        "sample": Workload(f"{DIGITS} digits as PNGs", [Request("/v1/images/sample", digits)], whole_digits),
    }
    others = [made["forecast"], made["sample"]]
    mixed = Mixed("mixed load", made["cnn"].requests, same_label, (8,), texts=made["text"], others=others)
    return made | {"mixed": mixed}


def prepare(included: Path, folder: Path) -> Path:
    """Copy the included store and add the benchmark's RNN. Return the folder of the new store."""
    shutil.copytree(included, folder / "store")
    store = Store(folder / "store")
    card = store.card("shakespeare-rnn", 1).model_dump(exclude={"version", "weights_sha256"})
    sizes: dict[str, Any] = {"vocabulary": len(card["vocabulary"]), "hidden": 512, "layers": 2}
    torch.manual_seed(0)
    network = build("character-rnn", sizes)
    card |= {"name": RNN, "title": "random weights, for the benchmark", "metrics": {}, "sizes": sizes}
    store.publish(card, network.state_dict())
    return store.folder
