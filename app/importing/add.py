"""Import a network that was trained outside this project as a version."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from app import store
from app.errors import BadValue
from app.importing.convert import convert
from app.importing.examine import Examiner
from app.importing.files import BadModel, read_files
from app.importing.options import Task
from app.networks.imported import Shape
from app.networks.imported.onnx_runner import OnnxRunner
from app.store import Card, Store, check_name
from app.store.version import Version
from app.tasks import TASKS, speed

CHANNELS = 3  # of an image if the file does not state their number
LARGEST_TEST_SIZE = 4096  # largest image size of the options that is used in test runs
ASSUMED_SCALING = "pixels are scaled to 0 to 1 and not normalised further; --mean and --std set another scaling"


@dataclass(frozen=True)
class Description:
    """Information about a model that its file does not contain, such as the name, the task and the origin."""

    name: str
    title: str = ""
    task: Task = "infer"
    licence: str = "not stated"
    source: str = "not stated"
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    command: str = "python -m app.models add"


def add(
    folder: Path, file: Path, description: Description, max_bytes: int, speed_seconds: float,
    activate: bool | None = None,
) -> Card:  # fmt: skip
    """Import ``file`` as the next version of a model in the store ``folder``, and return its card.

    The measurement of its speed takes at least ``speed_seconds``. ``activate``: see ``Store.add``.

    Raises:
        StoreError: the name or the file is invalid, or the file does not fit the task.
    """
    check_name(description.name)
    if (size := file.stat().st_size) > max_bytes:
        raise BadModel(f"{file.name} has {size:,} bytes; the maximum is {max_bytes:,}")
    try:
        with TemporaryDirectory() as scratch:
            path = convert(file, Path(scratch)) if file.suffix == ".pt2" else file
            tensors = read_files(path, Path(scratch) / "unpacked", max_bytes)
        content = _examined(OnnxRunner(tensors), description) | _card(description, file)
        draft = Version(folder / description.name / "1", _parsed(content), tensors)
        predictor = TASKS[description.task].load(draft, torch.device("cpu"))
        content["speed"] = speed.measure(predictor, speed.processor(), speed_seconds)
    except (ValueError, BadValue) as error:
        raise BadModel(str(error)) from None
    except MemoryError:
        raise BadModel(f"the import of {file.name} needs too much memory") from None
    return Store(folder).publish(content, tensors, activate=activate).card


def _parsed(content: Mapping[str, Any]) -> Card:
    card = store.card_text({**content, "version": 1, "weights_sha256": ""})
    return store.parse_card(card, f"the card of {content['name']!r}")


def _examined(runner: OnnxRunner, description: Description) -> dict[str, Any]:
    """Return the part of the card that depends on the content of the file."""
    if not runner.inputs:
        raise BadModel("the model should have at least one tensor as input")
    shapes, size = {name: tensor.shape for name, tensor in runner.inputs.items()}, None
    if description.task == "classify":
        size = description.options.get("size")
        size = size if size and 0 < size <= LARGEST_TEST_SIZE else None
        images = description.options.get("input")
        shapes = {
            name: _image_shape(shape, size) if name == (images or name) else shape for name, shape in shapes.items()
        }
    sizes, outputs = Examiner(runner, shapes, size, fixed=description.task != "infer").examine()
    inputs = [
        {
            "name": name,
            "dtype": runner.inputs[name].dtype,
            "shape": [each if isinstance(each, int) else -1 for each in shape],
        }
        for name, shape in sizes.inputs.items()
    ]
    versions = {package: version(package) for package in ("torch", "onnxruntime")}
    return {
        "kind": "onnx",
        "inputs": inputs,
        "outputs": [spec.model_dump() for spec in outputs],
        "sizes": asdict(replace(sizes, options=dict(description.options))),
        "versions": {"python": platform.python_version(), **versions},
    }


def _image_shape(shape: Shape, side: int | None) -> Shape:
    """Return the shape of images with fixed sizes.

    Exporters such as Hugging Face Optimum declare all dimensions as varying, although the network reads only one number
    of channels and one image size. A varying number of channels becomes ``CHANNELS``. A varying height and width become
    ``side``, unless it is None. If all dimensions vary, the channels are taken to come first.
    """
    if len(shape) != 4:
        return shape
    last = shape[3] in (1, CHANNELS) and shape[1] not in (1, CHANNELS)
    known = (None, side, side, None) if last else (None, CHANNELS, side, side)
    return [new if isinstance(size, str) and new else size for size, new in zip(shape, known, strict=True)]


def _card(description: Description, file: Path) -> dict[str, Any]:
    """Return the part of the card that does not depend on the content of the file."""
    is_scaled = description.task == "classify" and not {"mean", "std"} & description.options.keys()
    return {
        "name": description.name,
        "task": description.task,
        "title": _unicode(description.title or f"Imported from {file.name}"),
        "labels": list(description.labels) if description.labels else None,
        "metrics": {},
        "data": {},
        "seed": 0,
        "command": _unicode(description.command),
        "commit": "",
        "hardware": speed.processor(),
        "minutes": 0.0,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": f"Assumed: {ASSUMED_SCALING}." if is_scaled else "",
        "licence": _unicode(description.licence),
        "source": _unicode(description.source),
    }


def _unicode(text: str) -> str:
    """Return ``text`` with a question mark for each byte of an argument or file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()
