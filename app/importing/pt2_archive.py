"""Read a ``.pt2`` file of ``torch.export.save`` as data. Nothing in it is unpickled or evaluated.

The file is an uncompressed zip archive with one root folder (torch 2.9 and later):

    archive_format                             "pt2"
    models/model.json                          the graph; its format is ``torch/_export/serde/schema.py``
    data/weights/model_weights_config.json     name, type, shape and file of each weight
    data/weights/weight_0 ...                  raw values
    data/constants/...                         the same two kinds of files for constants
    data/sample_inputs/model.pt                a pickle; it is not read

Pickled weights and constants, custom classes and native code (AOTInductor) are rejected.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from app.importing.pt2_graph import DTYPES, BadProgram, GraphReader, InputSpec
from app.importing.pt2_guards import read_guards
from app.networks.imported.exported_program import MAX_GRAPH_BYTES
from app.store.archive import check_directory, check_offset

MAX_DIRECTORY_BYTES = 4 * 2**20  # largest central directory of the zip archive, enough for 30,000 weights
FORMAT, GRAPH_FILE = "archive_format", "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
CONFIGS = {
    "weights": "data/weights/model_weights_config.json",
    "constants": "data/constants/model_constants_config.json",
}
RAW_FILE = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
IGNORED = re.compile(r"archive_version|byteorder|\.data/\w+|extra/.*|" + re.escape(SAMPLE_INPUTS))
WEIGHT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
DEFAULT_MINIMUM = 2  # torch states this minimum for a size without a stated minimum, but still allows a size of 1
STRIDED = 7  # value of ``Layout.Strided`` in torch's schema


@dataclass(frozen=True)
class Program:
    """The content of a ``.pt2`` file: its graph in the format of ``ExportedProgram``, its weights, and its inputs.

    ``output_shapes`` maps each output to its declared shape, in which None stands for a size that varies. ``ranges``
    maps each varying size to its smallest and largest value. A largest value of None means no limit. ``guards`` are
    conditions on the sizes, see ``app.networks.imported.guards``.
    """

    graph: dict[str, Any]
    tensors: dict[str, Tensor]
    inputs: list[InputSpec]
    output_shapes: dict[str, list[int | None]]
    ranges: dict[str, tuple[int, int | None]]
    guards: list[str]
    torch_version: str


def read_pt2(file: IO[bytes], max_bytes: int) -> Program:
    """Read a ``.pt2`` file.

    All entries together may have at most ``max_bytes`` bytes. The same limit applies to the weights.

    Raises:
        BadProgram, BadArchive: the file is invalid, too large, or contains pickles or native code.
    """
    check_directory(file, MAX_DIRECTORY_BYTES)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise BadProgram(f"the file is not a .pt2 archive: {error}") from None
    with archive:
        entries = _entries(archive, max_bytes)
        content = _json(archive, entries, GRAPH_FILE)
        try:
            return _program(archive, entries, content, max_bytes)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BadProgram(f"{GRAPH_FILE} has a wrong entry: {type(error).__name__}: {error}") from error


def _entries(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their path below the root folder. Raises BadProgram if an entry is not allowed."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename.partition("/")[2] for info in infos]
    if FORMAT not in names:
        old = any(name.endswith("serialized_exported_program.json") for name in (*names, *archive.namelist()))
        hint = "; it was saved by an older torch: save it again with torch 2.9 or later" if old else ""
        if any(name.endswith("data.pkl") for name in names):
            hint = "; it is a TorchScript file or a pickle of torch.save: export the network with torch.export"
        raise BadProgram(f"the file is not a .pt2 archive of torch.export.save{hint}")
    for name, info in zip(names, infos, strict=True):
        check_offset(archive, info)
        if name.startswith("data/aotinductor/"):
            raise BadProgram(f"entry {name!r} is native code (AOTInductor), which is never loaded")
        if name.startswith("data/executorch/"):
            raise BadProgram(f"entry {name!r} is for ExecuTorch; save the program with torch.export.save")
        if name.startswith("models/") and name != GRAPH_FILE:
            raise BadProgram(f"entry {name!r}: a file with one program, models/model.json, is expected")
        known = name in (FORMAT, GRAPH_FILE, *CONFIGS.values()) or RAW_FILE.fullmatch(name) or IGNORED.fullmatch(name)
        if not known:
            raise BadProgram(f"entry {name[:80]!r} is not allowed: it may be a pickle, which is never loaded")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise BadProgram(f"entry {name!r} is compressed or encrypted; torch.export.save does neither")
    if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
        raise BadProgram(f"entry {repeated!r} occurs twice")
    if len(roots := sorted({info.filename.partition("/")[0] for info in infos})) > 1:
        raise BadProgram(f"there is more than one root folder: {', '.join(root[:80] for root in roots[:3])}")
    if (total := sum(info.file_size for info in infos)) > max_bytes:
        raise BadProgram(f"the entries have {total:,} bytes together; the maximum is {max_bytes:,}")
    return dict(zip(names, infos, strict=True))


def _read(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    if name not in entries:
        raise BadProgram(f"entry {name!r} is missing")
    try:
        return archive.read(entries[name])
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, struct.error) as error:
        raise BadProgram(f"entry {name!r} cannot be read: {error}") from None


def _json(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str) -> Any:
    if name in entries and (size := entries[name].file_size) > MAX_GRAPH_BYTES:
        raise BadProgram(f"entry {name!r} has {size:,} bytes; the maximum is {MAX_GRAPH_BYTES:,}")
    try:
        return json.loads(_read(archive, entries, name))
    except (ValueError, RecursionError) as error:
        raise BadProgram(f"entry {name!r} is not JSON: {error}") from None


def _program(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], content: dict[str, Any], max_bytes: int
) -> Program:
    if _read(archive, entries, FORMAT) != b"pt2":
        raise BadProgram(f"entry {FORMAT!r} should be 'pt2'")
    if "byteorder" in entries and _read(archive, entries, "byteorder") != b"little":
        raise BadProgram("entry 'byteorder' should be 'little'")
    if (major := content["schema_version"]["major"]) != 8:
        raise BadProgram(f"{GRAPH_FILE}: schema_version.major is {major!r}, expected 8 (torch 2.5 and later)")
    reader = GraphReader(content)
    payloads = {kind: _json(archive, entries, path)["config"] for kind, path in CONFIGS.items()}
    tensors, weights = _tensors(archive, entries, payloads, reader.weights, max_bytes)
    graph: dict[str, Any] = {"inputs": [spec.name for spec in reader.inputs], "weights": weights}
    graph |= {"nodes": reader.nodes, "outputs": reader.outputs}
    ranges = {name: _range(limits) for name, limits in content["range_constraints"].items()}
    guards = read_guards(content.get("guards_code") or [], reader.inputs)
    torch_version = str(content.get("torch_version", ""))
    return Program(graph, tensors, reader.inputs, reader.output_shapes, ranges, guards, torch_version)


def _range(limits: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the smallest and largest value of a size. None stands for no limit.

    ``Dim.AUTO`` and ``Dim.DYNAMIC`` have the range from ``DEFAULT_MINIMUM`` without a maximum.
    """
    low, high = limits["min_val"] or 0, limits["max_val"]
    return (1, None) if low == DEFAULT_MINIMUM and high is None else (low, high)


def _tensors(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    payloads: Mapping[str, Mapping[str, Any]],
    named_values: Mapping[str, tuple[str, str]],
    max_bytes: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return two dictionaries: from keys to tensors, and from each value of the graph to the key of its tensor.

    Values with the same payload share a tensor.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    weights: dict[str, str] = {}
    files: dict[str, Tensor] = {}  # each file is read once, even if several weights are parts of it
    remaining_bytes = max_bytes
    for value, (kind, name) in named_values.items():
        if name not in payloads[kind]:
            raise BadProgram(f"{CONFIGS[kind]}: {name!r} is missing")
        payload = payloads[kind][name]
        identity = json.dumps([kind, payload["path_name"], payload["tensor_meta"]], sort_keys=True)
        if identity not in keys:
            path = f"data/{kind}/{payload['path_name']}"
            if payload["use_pickle"] or not RAW_FILE.fullmatch(path) or payload["tensor_meta"] is None:
                raise BadProgram(f"{CONFIGS[kind]}: {name!r} is a pickle, which is never loaded")
            size = entries[path].file_size if path in entries else 0
            dtype, sizes, strides, offset = _layout(name, payload["tensor_meta"], size)
            remaining_bytes -= math.prod(sizes) * dtype.itemsize
            if remaining_bytes < 0:
                raise BadProgram(f"{name!r} exceeds the allowed {max_bytes:,} bytes of weights")
            is_read = path in files
            if not is_read:
                content = bytearray(_read(archive, entries, path) or bytes(8))
                files[path] = torch.frombuffer(content, dtype=torch.uint8)
            raw = files[path]
            flat = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
            tensor = flat.as_strided(sizes, strides, offset).contiguous()
            tensors[name] = tensor.clone() if is_read else tensor  # the store accepts no tensors that share memory
            keys[identity] = name
        weights[value] = keys[identity]
    return tensors, weights


def _layout(name: str, meta: Mapping[str, Any], size: int) -> tuple[torch.dtype, list[int], list[int], int]:
    """Return four values: the type, shape, strides and offset of a tensor in a file of ``size`` bytes.

    Raises BadProgram if the tensor is not allowed or does not fit into the file.
    """
    dtype_name = DTYPES.get(meta["dtype"], str(meta["dtype"]))
    if dtype_name not in WEIGHT_DTYPES or meta["layout"] != STRIDED:
        raise BadProgram(f"{name!r} has the type {dtype_name}; allowed types: dense {', '.join(WEIGHT_DTYPES)}")
    sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    numbers = [*sizes, *strides, offset]
    if len(sizes) != len(strides) or any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise BadProgram(
            f"{name!r} has the shape {sizes} with strides {strides} and offset {offset}, not integers from 0"
        )
    dtype: torch.dtype = getattr(torch, dtype_name)
    last = offset + sum((count - 1) * stride for count, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and (last + 1) * dtype.itemsize > size:
        raise BadProgram(f"{name!r} needs {(last + 1) * dtype.itemsize:,} bytes; its file has {size:,}")
    return dtype, sizes, strides, offset
