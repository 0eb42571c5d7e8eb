"""Import a network that was trained outside this project as a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app import store
from app.importing.draft import Draft
from app.importing.memory import LARGEST_SIZE, MAX_ROWS, MemoryLimit
from app.importing.onnx_archive import is_onnx_archive, read_onnx_archive
from app.importing.onnx_file import fix_image_sizes, read_onnx_file, read_signature
from app.importing.pt2_archive import DEFAULT_MINIMUM, read_pt2
from app.importing.pt2_graph import BadProgram, InputSpec
from app.importing.pt2_guards import depend_on_rows
from app.networks.imported import ImportedSizes
from app.networks.imported.exported_program import GRAPH, graph_tensor
from app.store import UNKNOWN_CHARACTER, Card, TaskName
from app.store.rollout import name_problem
from app.tasks import speed

LARGEST_TEST_SIZE = 4096  # largest input size of the options that is used in test runs
SIZE_OPTIONS = {"classify": "size", "forecast": "context"}  # by task: the option with the size of the inputs
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")  # allowed for inputs


@dataclass(frozen=True)
class Description:
    """Information about a model that its file does not contain, such as the name, the task and the origin."""

    name: str
    title: str = ""
    task: TaskName = "infer"
    licence: str = "not stated"
    source: str = "not stated"
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    vocabulary: Sequence[str] | None = None  # without ``UNKNOWN_CHARACTER``
    command: str = "python -m app.models add"

    @property
    def size(self) -> int | None:
        """The size of the inputs according to the options, if it can be tested, otherwise None."""
        size = self.options.get(SIZE_OPTIONS.get(self.task, ""))
        return size if size and 0 < size <= LARGEST_TEST_SIZE else None


def add(models: Path, file: Path, description: Description, max_bytes: int) -> Card:
    """Import ``file`` as the next version of a model, and return its card.

    Raises:
        StoreError: the name or the file is invalid, or the file does not fit the task.
    """
    if problem := name_problem(description.name):
        raise BadProgram(problem)
    if (size := file.stat().st_size) > max_bytes:
        raise BadProgram(f"{file.name} has {size:,} bytes; the maximum is {max_bytes:,}")
    if is_onnx_archive(file):
        drafts = _read_onnx(read_onnx_archive(file, max_bytes), description)
    elif _is_archive(file):
        drafts = [_read_program(file, max_bytes)]
    else:
        drafts = _read_onnx(read_onnx_file(file, max_bytes), description)
    for draft in drafts:
        draft.card |= _card(description, file)
        draft.card["sizes"]["options"] = dict(description.options)
    draft = _checked(drafts, description.size)
    draft.measure(description.task)
    return store.publish(models, draft.card, draft.tensors).card


def _checked(drafts: Sequence[Draft], size: int | None) -> Draft:
    """Check the drafts in turn, and return the first that can be batched, or else the last.

    Raises BadProgram if the last draft is checked and invalid.
    """
    for draft in drafts[:-1]:
        with suppress(BadProgram):
            draft.check(size)
            if draft.card["sizes"]["batched"]:
                return draft
    drafts[-1].check(size)
    return drafts[-1]


def _is_archive(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(2) == b"PK"


def _read_program(file: Path, max_bytes: int) -> Draft:
    """Read a ``.pt2`` file. The maximum of each varying size is chosen so that a run fits into memory."""
    with file.open("rb") as content:
        program = read_pt2(content, max_bytes)
    if GRAPH in program.tensors:
        raise BadProgram(f"a weight has the name {GRAPH!r}, which is reserved for the program; rename it")
    tensors = {**program.tensors, GRAPH: graph_tensor(program.graph)}
    for spec in program.inputs:
        if spec.dtype not in DTYPES:
            raise BadProgram(f"input {spec.name!r} is of type {spec.dtype}; allowed types: {', '.join(DTYPES)}")
    batch = _batch_symbol(program.inputs)
    if batch and program.ranges.get(batch, (0, None))[0] > DEFAULT_MINIMUM:  # the program rejects a batch of one row
        batch = None
    if batch and depend_on_rows(program.guards, program.inputs, program.ranges, batch):
        batch = None
    limit = MemoryLimit(tensors, program.inputs)

    def fit(batch: str | None) -> ImportedSizes:
        return replace(limit.fit(_shapes(program.inputs), program.ranges, batch), guards=program.guards)

    versions = {"torch": torch.__version__, "exported by torch": program.torch_version}
    return Draft.start(
        "exported-program", program.inputs, fit(batch), versions, tensors, program.output_shapes, partial(fit, None)
    )


def _read_onnx(tensors: dict[str, Tensor], description: Description) -> list[Draft]:
    """Return the drafts for an ONNX file, in the order of preference.

    There are two drafts if the first dimensions of the inputs may be one batch dimension with several names. If no
    other dimension has a name or number, the last draft has no batch dimension, because all sizes may have to be equal.
    The memory of the runs is not checked, because onnxruntime limits it.
    """
    inputs, output_shapes = read_signature(tensors)
    if not inputs:
        raise BadProgram("the model should have at least one tensor as input")
    if description.task == "classify":
        inputs = fix_image_sizes(inputs, description.options.get("input"), description.size)
    start = partial(_onnx_draft, tensors, output_shapes)
    drafts = [start(each, _batch_symbol(each)) for each in (_rename_batch(inputs), inputs) if each]
    if _batch_symbol(inputs) and {size for spec in inputs for size in spec.shape[1:]} == {"?"}:
        drafts.append(start(inputs, None))
    return drafts


def _onnx_draft(
    tensors: dict[str, Tensor],
    output_shapes: Mapping[str, Sequence[object]],
    inputs: Sequence[InputSpec],
    batch: str | None,
) -> Draft:
    symbols = {str(size) for spec in inputs for size in spec.shape if isinstance(size, str)} - {"?"}

    def sizes(batch: str | None) -> ImportedSizes:
        ranges = {symbol: [1, LARGEST_SIZE] for symbol in sorted(symbols - {batch})}
        return ImportedSizes(_shapes(inputs), ranges, batch is not None, MAX_ROWS if batch else 1)

    versions = {"onnxruntime": version("onnxruntime")}
    return Draft.start("onnx", inputs, sizes(batch), versions, tensors, output_shapes, partial(sizes, None))


def _rename_batch(inputs: Sequence[InputSpec]) -> list[InputSpec] | None:
    """Return the inputs with one name for their first dimensions, or None if these cannot be one batch dimension.

    Exporters such as tf2onnx give the batch dimension another name in each input.
    """
    first = [spec.shape[0] for spec in inputs if spec.shape]
    names = {size for size in first if isinstance(size, str)}
    others = {size for spec in inputs for size in spec.shape[1:]}
    all_vary = len(first) == len(inputs) and all(isinstance(size, str) for size in first)
    if len(names) < 2 or not all_vary or names & others:
        return None
    return [replace(spec, shape=(first[0], *spec.shape[1:])) for spec in inputs]


def _shapes(inputs: Sequence[InputSpec]) -> dict[str, list[int | str]]:
    return {spec.name: list(spec.shape) for spec in inputs}


def _card(description: Description, file: Path) -> dict[str, Any]:
    """Return the part of the card that does not depend on the content of the file."""
    return {
        "name": description.name,
        "task": description.task,
        "title": _unicode(description.title or f"Imported from {file.name}"),
        "labels": list(description.labels) if description.labels else None,
        "vocabulary": [*description.vocabulary, UNKNOWN_CHARACTER] if description.vocabulary else None,
        "metrics": {},
        "data": {},
        "seed": 0,
        "command": _unicode(description.command),
        "commit": "",
        "hardware": speed.processor(),
        "minutes": 0.0,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": "",
        "licence": _unicode(description.licence),
        "source": _unicode(description.source),
    }


def _unicode(text: str) -> str:
    """Return ``text`` with a question mark for each byte of an argument or file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _batch_symbol(inputs: Sequence[InputSpec]) -> str | None:
    """Return the name of the batch size: the varying size that all inputs have as first dimension, or None.

    A size that another dimension has too is no batch size. An example is the number of nodes of a graph, for which one
    input has a row for each node, and another has a row and a column for each node.
    """
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    (symbol,) = first if len(first) == 1 else (None,)
    others = {str(size).rpartition("*")[2] for spec in inputs for size in spec.shape[1:]}
    return symbol if isinstance(symbol, str) and symbol.isidentifier() and symbol not in others else None
