"""The workloads of the benchmarks: their requests, their numbers of callers, and the checks of the answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.networks import build
from app.store import Store
from benchmarks.support import load
from benchmarks.support.load import Answer, Figures, Request
from benchmarks.support.servers import ROOT, Server
from benchmarks.support.throughput_limits import Limit, newest

RNN = "bench-rnn"  # 2 layers of 512 units with random weights, in the benchmark's copy of the store
PHOTO = "bench-photo"  # EfficientNet-Lite0 with random weights, in the benchmark's copy of the store
STRONG = "cifar10-whitened"  # the strong CNN, if it is in the store
CHARACTERS = 200
PROMPT = 32  # length of a prompt in characters
HORIZON = 48
DIGITS = 16
SINGLE = 8  # callers per task in the mixed load
TEXTS = 32  # number of texts that are generated during the classification
MEGAPIXELS = (0.1, 2, 12, 50)
LARGE = 1_024  # number of digits in a large request
LARGE_CALLERS = 2  # number of large requests that run during the classification
ALONE = "images alone"
BESIDE = "images beside "
BESIDE_TEXTS = f"{TEXTS} texts"
BESIDE_DIGITS = f"{LARGE_CALLERS} requests of {LARGE:,} digits"

Check = Callable[[Any, Any], bool]  # (answer, Quartet's answer to the same request) -> whether the answer is right


@dataclass(frozen=True)
class Workload:
    """A workload. ``callers`` are the numbers of callers. If ``callers`` is empty, the command line sets them."""

    title: str
    requests: Sequence[Request]
    check: Check
    limits: Sequence[Limit] = ()
    callers: Sequence[int] = ()
    long: bool = False  # whether an answer that is unfinished at the end counts in part
    streamed: bool = False

    @property
    def rnn(self) -> bool:
        """Return whether the workload uses the benchmark's RNN."""
        return any(RNN.encode() in request.body for request in self.requests)

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        """Measure a server. Return a dict from the name of each part of the workload to its figures."""
        return {"": await self.once(server, callers, seconds)}

    async def once(self, server: Server, callers: int, seconds: float) -> Figures:
        own_generator = load.measure_streams if self.streamed else load.measure
        generator = own_generator if self.streamed or self.long or not load.has_wrk() else load.wrk
        return await generator(server.port, self.adapted_requests(server), callers, seconds)

    def adapted_requests(self, server: Server) -> list[Request]:
        return [server.adapt(request) for request in self.requests]

    def read(self, server: Server, answer: Answer) -> Any:
        """Return the content of an answer. For a stream, return the same content as for an answer without streaming.

        Raises ValueError for an error or an incomplete stream.
        """
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {answer.body[:300]!r}")
        if self.streamed:
            if b"data: [DONE]" not in answer.body:
                raise ValueError(f"the stream has no final event: {answer.body[-300:]!r}")
            return {"results": [{"text": "".join(character for _, character in load.arrivals(answer))}]}
        return server.convert(json.loads(answer.body))

    async def warm_up(self, server: Server, callers: int) -> None:
        await load.call(server.port, self.adapted_requests(server), callers, 0.5)


@dataclass(frozen=True, kw_only=True)
class UnderLoad(Workload):
    """Measures classification first alone, and then while ``other_callers`` callers send the workload ``other``.

    ``name`` is the name of the other workload in the results.
    """

    other: Workload
    other_callers: int
    name: str

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        alone = await self.once(server, callers, seconds)
        # The other requests start before this measurement and end after it.
        other = asyncio.create_task(self.other.once(server, self.other_callers, math.ceil(seconds) + 0.5))
        await asyncio.sleep(0.4)
        beside = await self.once(server, callers, seconds)
        return {ALONE: alone, BESIDE + self.name: beside, f"the {self.name}": await other}


@dataclass(frozen=True, kw_only=True)
class Mixed(UnderLoad):
    """Measures classification first alone, then while texts are generated, and then while all four tasks run."""

    others: Sequence[Workload]

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        parts = await super().measure(server, callers, seconds)
        together = [self.once(server, callers, seconds)]
        together += [workload.once(server, SINGLE, math.ceil(seconds)) for workload in self.others]
        names = [f"all four, {task}" for task in ("images", "texts", "forecasts", "generated images")]
        return parts | dict(zip(names, await asyncio.gather(*together), strict=True))


@dataclass(frozen=True)
class PhotoSizes(Workload):
    """Measures how photographs of several sizes are classified, one size after the other. ``model`` is the network."""

    model: str = ""

    async def measure(self, server: Server, callers: int, seconds: float) -> dict[str, Figures]:
        sizes = {f"{megapixels:g} megapixels": self.of_size(megapixels) for megapixels in MEGAPIXELS}
        return {title: await workload.once(server, callers, seconds) for title, workload in sizes.items()}

    def of_size(self, megapixels: float) -> Workload:
        """Return the workload with photographs of one size."""
        request = Request(f"/v1/images/classify?model={self.model}", large_photo(megapixels), "image/jpeg")
        return Workload(self.title, [request], self.check, long=True)


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


def prompts(model: str, stream: bool = False) -> list[Request]:
    text = (
        "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. First Citizen: You are all "
        "resolved rather to die than to famish? All: Resolved, resolved. First Citizen: First, you know Caius Marcius "
    )
    parts = [text[start : start + PROMPT] for start in range(0, len(text) - PROMPT, PROMPT)]
    options = {"max_characters": CHARACTERS, "temperature": 0.8, "model": model}
    if stream:
        options["stream"] = True
    return [Request("/v1/text/continue", json.dumps({"prompt": part, **options}).encode()) for part in parts]


def workloads(folder: Path) -> dict[str, Workload]:
    """Return a dict from the name of each workload to the workload, for the networks in the store ``folder``.

    The workload ``strong`` is left out if the store has no CNN for it.
    """
    pictures = [path.read_bytes() for path in sorted((ROOT / "tests/images/cifar10").glob("*.png"))]
    values = json.loads((ROOT / "docs/sine.json").read_text())["values"]
    history = json.dumps({"values": values, "horizon": HORIZON, "model": "sine-lstm"}).encode()

    def draw(count: int) -> list[Request]:
        return [Request("/v1/images/sample", json.dumps({"count": count, "model": "mnist-gan"}).encode())]

    def images(model: str) -> list[Request]:
        return [Request(f"/v1/images/classify?model={model}", picture, "image/png") for picture in pictures]

    def limits(workload: str, model: str, *layouts: tuple[int, int]) -> list[Limit]:
        return [Limit(workload, model, rows, threads) for rows, threads in layouts]

    cnn, strong = "cifar10-lenet", STRONG if (folder / STRONG).is_dir() else None
    workloads = {
        "cnn": Workload(
            "workshop CNN, one 32x32 PNG",
            images(cnn),
            same_label,
            limits("classify", cnn, (1, 1), (8, 1), (64, 1)),
        )
    }
    if strong:
        layouts = limits("classify", strong, (1, 1), (32, 1), (32, 2))
        workloads["strong"] = Workload(f"{strong}, one 32x32 PNG", images(strong), same_label, layouts)
    workloads |= photographs(strong or cnn)
    text = Workload(
        f"text, {PROMPT} characters in, {CHARACTERS} out",
        prompts(RNN),
        whole_text,
        limits("text", RNN, (1, 1), (32, 1), (32, 2)),
        long=True,
    )
    forecast = Workload(
        f"forecasts of {HORIZON} steps",
        [Request("/v1/series/forecast", history)],
        same_forecast,
        limits("forecast", "sine-lstm", (1, 1), (32, 1)),
    )
    sample = Workload(
        f"{DIGITS} digits as PNGs",
        draw(DIGITS),
        whole_digits,
        limits("sample", "mnist-gan", (1, 1), (4, 1)),
    )
    streams = Workload(
        f"streams of {CHARACTERS} characters", prompts(RNN, stream=True), whole_text, callers=[8, 64], streamed=True
    )
    workloads |= {"text": text, "streams": streams, "forecast": forecast, "sample": sample}
    return workloads | beside(images(cnn), [text, forecast, sample], Workload("large", draw(LARGE), whole_digits))


def photographs(model: str) -> dict[str, Workload]:
    """Return the workloads that classify JPEG files.

    EfficientNet-Lite0 classifies files of 224 pixels, and ``model`` classifies files of all sizes.
    """

    def photos(name: str) -> list[Request]:
        return [Request(f"/v1/images/classify?model={name}", photo(seed), "image/jpeg") for seed in range(10)]

    one_size = Workload("EfficientNet-Lite0 with random weights, one 224x224 JPEG", photos(PHOTO), same_label)
    all_sizes = PhotoSizes(f"{model}, one JPEG photograph", photos(model), same_label, callers=[16], model=model)
    return {"photo": one_size, "photos": all_sizes}


def beside(images: Sequence[Request], others: Sequence[Workload], large: Workload) -> dict[str, Workload]:
    """Return two workloads that classify images.

    ``mixed`` classifies while other tasks run. ``large`` classifies while large requests run.
    """
    return {
        "mixed": Mixed(
            "mixed load",
            images,
            same_label,
            callers=[1, SINGLE],
            other=others[0],
            other_callers=TEXTS,
            name=BESIDE_TEXTS,
            others=others,
        ),
        "large": UnderLoad(
            f"classification beside {BESIDE_DIGITS}",
            images,
            same_label,
            callers=[4],
            other=large,
            other_callers=LARGE_CALLERS,
            name=BESIDE_DIGITS,
        ),
    }


def photo(seed: int) -> bytes:
    """Return a JPEG file of 224 x 224 pixels that is about as detailed as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def large_photo(megapixels: float) -> bytes:
    """Return a JPEG file that is similar to a photograph: blurred colours with camera noise, aspect ratio 4:3.

    With 12 megapixels, the file has 2.8 MB.
    """
    width = int((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = width * 3 // 4
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (45, 60, 3), dtype=np.uint8))
    pixels = np.array(colours.resize((width, height), Image.Resampling.BICUBIC))
    noise = (6 * generator.standard_normal((512, 512, 3))).astype(np.int16)
    for top in range(0, height, 512):
        for left in range(0, width, 512):
            part = pixels[top : top + 512, left : left + 512]
            part[:] = np.clip(part + noise[: part.shape[0], : part.shape[1]], 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(included: Path, folder: Path) -> tuple[Path, str]:
    """Copy the included store, and add the networks of the benchmark.

    Returns the folder of the new store, and a text about the RNN.
    """
    target = folder / "store"
    shutil.copytree(included, target)
    model = newest(included, "shakespeare-rnn").card
    sizes: dict[str, Any] = {"vocabulary": len(model.vocabulary or []), "hidden": 512, "layers": 2}
    torch.manual_seed(0)
    network = build("character-rnn", sizes)
    card = {key: value for key, value in model.model_dump().items() if key not in ("version", "weights_sha256")}
    card |= {"name": RNN, "title": "untrained, for the benchmark", "metrics": {}}
    card |= {"kind": "character-rnn", "sizes": sizes}
    Store(target).publish(card, network.state_dict())
    classifier = newest(included, "cifar10-lenet").card
    card = {key: value for key, value in classifier.model_dump().items() if key not in ("version", "weights_sha256")}
    card |= {"name": PHOTO, "title": "untrained, for the benchmark", "metrics": {}, "kind": "efficientnet-lite"}
    card |= {"sizes": {"classes": len(classifier.labels or ())}}
    Store(target).publish(card, build("efficientnet-lite", card["sizes"]).state_dict())
    return target, f"RNN {sizes['layers']} x {sizes['hidden']}, random weights"
