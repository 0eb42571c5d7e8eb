"""Read a ``.pt2`` file of ``torch.export.save`` as data. Nothing in it is unpickled or evaluated.

The file is an uncompressed zip archive with one root folder (torch 2.9 and later):

    archive_format                             "pt2"
    models/model.json                          the graph; its format is ``torch/_export/serde/schema.py``
    data/weights/model_weights_config.json     name, type, shape and file of each weight
    data/weights/weight_0 ...                  raw values
    data/constants/...                         the same for constants
    data/sample_inputs/model.pt                a pickle; it is not read

Pickled weights and constants, custom classes and native code (AOTInductor) are rejected.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from app.networks.imported.exported_program import MAX_GRAPH_BYTES
from app.store import StoreError
from app.store.archive import check_directory

MAX_DIRECTORY_BYTES = 4 * 2**20  # of the zip archive: enough for 30,000 weights
FORMAT, GRAPH_FILE = "archive_format", "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
CONFIGS = {
    "weights": "data/weights/model_weights_config.json",
    "constants": "data/constants/model_constants_config.json",
}
RAW_FILE = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
IGNORED = re.compile(r"archive_version|byteorder|\.data/\w+|extra/.*|" + re.escape(SAMPLE_INPUTS))
DTYPES = {  # of ``ScalarType`` in torch's schema
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16",
}  # fmt: skip
WEIGHT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
STRIDED = 7  # of ``Layout``
FORMULA = re.compile(r"(?:Mul\(Integer\((\d{1,9})\), )?(?:Symbol\(')?(\w{1,40})(?:'(?:, \w+=True)*\))?\)?")
KEYWORD = 2  # of ``ArgumentKind``
CHECKS = ("aten._assert_", "aten._functional_assert_", "aten.sym_constrain_range")  # left out: the service checks
PLAIN = ("as_int", "as_bool", "as_string", "as_ints", "as_bools", "as_strings", "as_int_lists")
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}


class BadProgram(StoreError):
    """The file is not a program that can be served. The message names the wrong part."""


@dataclass(frozen=True)
class InputSpec:
    """A tensor of a program. A dimension is a number, or the name or formula of a size that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Program:
    """The content of a ``.pt2`` file: its graph for ``ExportedProgram``, its weights, and its inputs.

    ``ranges`` are the smallest and the largest value of each varying size, None for no limit.
    """

    graph: dict[str, Any]
    tensors: dict[str, Tensor]
    inputs: list[InputSpec]
    ranges: dict[str, tuple[int, int | None]]
    torch_version: str


def read_pt2(file: IO[bytes], max_bytes: int) -> Program:
    """Read a ``.pt2`` file. Its weights may have ``max_bytes`` bytes.

    Raises:
        BadProgram, BadArchive: the file is wrong, too large, or contains pickles or native code.
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
    """Return the entries below the root folder by name. Raises BadProgram for any that a program does not need."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename.partition("/")[2] for info in infos]
    if FORMAT not in names:
        old = any(name.endswith("serialized_exported_program.json") for name in (*names, *archive.namelist()))
        hint = "; it was saved by an older torch: save it again with torch 2.9 or later" if old else ""
        raise BadProgram(f"the file is not a .pt2 archive of torch.export.save{hint}")
    for name, info in zip(names, infos, strict=True):
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
    if len(set(names)) < len(names):
        raise BadProgram("an entry occurs twice")
    if len({info.filename.partition("/")[0] for info in infos}) > 1:
        raise BadProgram("there is more than one root folder")
    if (total := sum(info.file_size for info in infos)) > max_bytes:
        raise BadProgram(f"it has {total:,} bytes; allowed are {max_bytes:,}")
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
        raise BadProgram(f"entry {name!r} has {size:,} bytes; allowed are {MAX_GRAPH_BYTES:,}")
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
    reader = _GraphReader(content)
    payloads = {kind: _json(archive, entries, path)["config"] for kind, path in CONFIGS.items()}
    tensors, weights = _tensors(archive, entries, payloads, reader.weights, max_bytes)
    graph: dict[str, Any] = {"inputs": [spec.name for spec in reader.inputs], "weights": weights}
    graph |= {"nodes": reader.nodes, "outputs": reader.outputs}
    ranges = {
        name: (limits["min_val"] or 0, limits["max_val"]) for name, limits in content["range_constraints"].items()
    }
    return Program(graph, tensors, reader.inputs, ranges, str(content.get("torch_version", "")))


def _tensors(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    payloads: Mapping[str, Mapping[str, Any]],
    named_values: Mapping[str, tuple[str, str]],
    max_bytes: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by key, and the key of each value. Values with the same payload share a tensor."""
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    weights: dict[str, str] = {}
    files: dict[str, Tensor] = {}  # each file is read once, however many weights are parts of it
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
            if path not in files:
                content = bytearray(_read(archive, entries, path) or bytes(8))
                files[path] = torch.frombuffer(content, dtype=torch.uint8)
            raw = files[path]
            flat = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
            tensors[name] = flat.as_strided(sizes, strides, offset).contiguous()
            keys[identity] = name
        weights[value] = keys[identity]
    return tensors, weights


def _layout(name: str, meta: Mapping[str, Any], size: int) -> tuple[torch.dtype, list[int], list[int], int]:
    """Return type, shape, strides and offset of a payload of ``size`` bytes. Raises BadProgram if they exceed it."""
    dtype_name = DTYPES.get(meta["dtype"], str(meta["dtype"]))
    if dtype_name not in WEIGHT_DTYPES or meta["layout"] != STRIDED:
        raise BadProgram(f"{name!r} has the type {dtype_name}; allowed are dense {', '.join(WEIGHT_DTYPES)}")
    sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    numbers = [*sizes, *strides, offset]
    if len(sizes) != len(strides) or any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise BadProgram(f"{name!r} has the shape {sizes} with strides {strides} and offset {offset}")
    dtype: torch.dtype = getattr(torch, dtype_name)
    last = offset + sum((count - 1) * stride for count, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and (last + 1) * dtype.itemsize > size:
        raise BadProgram(f"{name!r} needs {(last + 1) * dtype.itemsize:,} bytes; its file has {size:,}")
    return dtype, sizes, strides, offset


class _GraphReader:
    """Converts torch's graph to the format of ``ExportedProgram``."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        module = content["graph_module"]
        graph, signature = module["graph"], module["signature"]
        self.inputs: list[InputSpec] = []
        self.weights: dict[str, tuple[str, str]] = {}  # value -> (kind of payload, name)
        self.nodes: list[dict[str, Any]] = []
        for spec in signature["input_specs"]:
            self._read_input(spec, graph["tensor_values"])
        scope = {name: {"value": name} for name in (*self.weights, *(spec.name for spec in self.inputs))}
        self._read_nodes(graph, scope, "")
        outputs = [self._read_output(spec, index, scope) for index, spec in enumerate(signature["output_specs"])]
        self.outputs = [output for output in outputs if output is not None]
        keys = _output_keys(module.get("module_call_graph"))
        if len(keys) == len(outputs) == len(self.outputs):
            self.outputs = [[key, value] for key, (_, value) in zip(keys, self.outputs, strict=True)]
        if not self.inputs or not self.outputs:
            raise BadProgram("the program should have at least one tensor as input and one as output")
        self._remove_unused()

    def _read_input(self, spec: Mapping[str, Any], tensor_values: Mapping[str, Any]) -> None:
        ((kind, value),) = spec.items()
        if kind == "user_input":
            ((argument, content),) = value["arg"].items()
            if argument != "as_tensor":
                raise BadProgram(f"input {str(content)[:80]!r} is not a tensor ({argument})")
            meta = tensor_values[content["name"]]
            shape = tuple(map(_dimension, meta["sizes"]))
            self.inputs.append(InputSpec(content["name"], DTYPES.get(meta["dtype"], "?"), shape))
        elif kind == "parameter":
            self.weights[value["arg"]["name"]] = ("weights", value["parameter_name"])
        elif kind == "buffer":
            self.weights[value["arg"]["name"]] = (
                "weights" if value["persistent"] else "constants",
                value["buffer_name"],
            )
        elif kind == "tensor_constant":
            self.weights[value["arg"]["name"]] = ("constants", value["tensor_constant_name"])
        elif kind == "constant_input":  # an argument of forward that is no tensor; its value is fixed
            pass
        else:
            raise BadProgram(f"an input is of kind {kind!r}; custom classes are not allowed")

    def _read_output(self, spec: Mapping[str, Any], index: int, scope: Mapping[str, Any]) -> list[Any] | None:
        ((kind, value),) = spec.items()
        if kind == "user_input_mutation":
            return None
        if kind != "user_output":
            raise BadProgram(
                f"output {index} is of kind {kind!r}: the program changes its own weights or buffers; "
                "export it in evaluation mode"
            )
        ((argument, content),) = value["arg"].items()
        if argument == "as_none":
            return None
        if argument != "as_tensor":
            raise BadProgram(f"output {index} is not a tensor ({argument})")
        return [content["name"], scope[content["name"]]["value"]]

    def _read_nodes(self, graph: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> None:
        """Append the nodes of a graph. ``scope`` maps its names to arguments; new names get ``prefix``."""
        for node in graph["nodes"]:
            target = node["target"].removeprefix("torch.ops.")
            if target == "higher_order.wrap_with_set_grad_enabled":
                self._inline(node, scope, prefix)
            elif target.startswith("higher_order."):
                raise BadProgram(f"operator {target!r} is not allowed: control flow that depends on values")
            elif not target.startswith(CHECKS):
                self._read_node(node, target, scope, prefix)

    def _read_node(self, node: Mapping[str, Any], target: str, scope: dict[str, Any], prefix: str) -> None:
        args, kwargs = [], {}
        for item in node["inputs"]:
            if item["name"] in ("layout", "pin_memory"):
                continue
            value = _argument(item["arg"], scope)
            if item.get("kind") == KEYWORD:
                kwargs[item["name"]] = value
            else:
                args.append(value)
        results = [_result(result, scope, prefix) for result in node["outputs"]]
        outputs = results[0] if len(results) == 1 else results
        self.nodes.append({"op": target, "args": args, "kwargs": kwargs, "outputs": outputs})

    def _inline(self, node: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> None:
        """Append the nodes of a block under ``torch.no_grad()``."""
        _, block, *inputs = (item["arg"] for item in node["inputs"])
        graph = block["as_graph"]["graph"]
        names = [next(iter(each.values()))["name"] for each in graph["inputs"]]
        inner = {name: _argument(value, scope) for name, value in zip(names, inputs, strict=True)}
        self._read_nodes(graph, inner, f"{prefix}{block['as_graph']['name']}/")
        results = [name for each in graph["outputs"] for name in _names(each)]
        for name, result in zip((name for each in node["outputs"] for name in _names(each)), results, strict=True):
            scope[name] = inner[result]

    def _remove_unused(self) -> None:
        """Remove nodes whose results are not used, such as sizes for checks that are left out, and unused weights."""
        used = {value for _, value in self.outputs}
        nodes = []
        for node in reversed(self.nodes):
            if node["op"].rpartition(".")[0].endswith("_") or used.intersection(
                _values(node["outputs"])
            ):  # ``add_`` changes its argument
                nodes.append(node)
                used.update(_values([node["args"], *node["kwargs"].values()]))
        self.nodes = nodes[::-1]
        self.weights = {value: payload for value, payload in self.weights.items() if value in used}


def _output_keys(calls: Any) -> list[str]:
    """Return the keys if the program returns a flat dictionary of tensors with texts as keys; else an empty list."""
    try:
        _, tree = json.loads(calls[0]["signature"]["out_spec"])
        keys = json.loads(tree["context"]) if tree["type"] == "builtins.dict" else []
        is_flat = all(child["type"] is None for child in tree["children_spec"])
    except (KeyError, IndexError, TypeError, ValueError):
        return []
    return keys if is_flat and all(isinstance(key, str) and 0 < len(key) <= 200 for key in keys) else []


def _dimension(size: Mapping[str, Any]) -> int | str:
    """Return a number, the name of a size, ``2*name``, or ``?`` for another formula. Formulas are never evaluated."""
    if "as_int" in size:
        return int(size["as_int"])
    if match := FORMULA.fullmatch(size["as_expr"]["expr_str"]):
        return f"{match[1]}*{match[2]}" if match[1] else match[2]
    return "?"


def _argument(argument: Mapping[str, Any], scope: Mapping[str, Any]) -> Any:
    """Convert an argument of torch's graph."""
    ((kind, value),) = argument.items()
    if kind in PLAIN:
        return value
    if kind == "as_float":  # infinity is a text
        return float(value)
    if kind == "as_floats":
        return [float(each) for each in value]
    if kind in ("as_none", "as_layout"):
        return None
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
        return _reference(value, scope)
    if kind in ("as_tensors", "as_optional_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_reference(each, scope) for each in value]
    if kind == "as_scalar_type":
        return {"dtype": DTYPES[value]}
    if kind == "as_memory_format":
        return {"memory_format": MEMORY_FORMATS[value]}
    if kind == "as_device":
        return {"device": ""}
    raise BadProgram(f"an argument is of kind {kind!r}, which is not allowed")


def _reference(item: Mapping[str, Any], scope: Mapping[str, Any]) -> Any:
    """Convert a value, a number or none."""
    if "name" in item:
        return scope[item["name"]]
    ((kind, value),) = item.items()
    if kind == "as_none":
        return None
    return scope[value["name"]] if kind == "as_tensor" else scope[value] if kind == "as_name" else value


def _result(result: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> Any:
    """Convert a result of a node, and add its names to the scope."""
    if next(iter(result)) == "as_none":
        return None
    names = [f"{prefix}{name}" for name in _names(result)]
    scope.update({name: {"value": full} for name, full in zip(_names(result), names, strict=True)})
    return names if "as_tensors" in result else names[0]


def _names(argument: Mapping[str, Any]) -> list[str]:
    """Return the names of the values in an argument that holds values only."""
    ((kind, value),) = argument.items()
    if kind not in ("as_tensor", "as_tensors", "as_sym_int", "as_sym_bool", "as_sym_float"):
        raise BadProgram(f"a result is of kind {kind!r}, which is not allowed")
    items = value if isinstance(value, list) else [value]
    return [item["name"] if "name" in item else item["as_name"] for item in items]


def _values(item: Any) -> Iterator[str]:
    """Yield the names of values in arguments or results of a node."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict):
        if "value" in item:
            yield item["value"]
    elif isinstance(item, list):
        for each in item:
            yield from _values(each)
