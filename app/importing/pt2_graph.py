"""Convert the graph of a ``.pt2`` file, ``models/model.json``, to the format of ``ExportedProgram``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from app.networks.imported.operators import ASSERT
from app.store import StoreError

DTYPES = {  # values of ``ScalarType`` in torch's schema
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16",
}  # fmt: skip
FORMULA = re.compile(r"(?:Mul\(Integer\((\d{1,9})\), )?(?:Symbol\(')?(\w{1,40})(?:'(?:, \w+=True)*\))?\)?")
TERM = re.compile(r"Symbol\('(\w{1,40})'(?:, \w+=True)*\)|Integer\((-?\d{1,9})\)")
KEYWORD = 2  # value of ``ArgumentKind.KEYWORD`` in torch's schema
# The graph omits these operators, because the service checks the types and ranges of the inputs.
CHECKS = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._functional_assert_", "aten.sym_constrain_range")
PLAIN = ("as_int", "as_bool", "as_string", "as_ints", "as_bools", "as_strings", "as_int_lists")
DICTIONARIES = ("builtins.dict", "collections.OrderedDict")
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}


CHANGES_WEIGHTS = "the network changes its own weights or buffers; export it in evaluation mode"


class BadProgram(StoreError):
    """The file is not a program that can be served. The message states which part is wrong."""


@dataclass(frozen=True)
class InputSpec:
    """An input tensor of a program. Each size in ``shape`` is a number, or the name or formula of a varying size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphReader:
    """Converts a graph from torch's format to the format of ``ExportedProgram``."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        module = content["graph_module"]
        graph, signature = module["graph"], module["signature"]
        self.inputs: list[InputSpec] = []
        self.weights: dict[str, tuple[str, str]] = {}  # name of a value -> kind and name of its payload
        self.nodes: list[dict[str, Any]] = []
        for spec in signature["input_specs"]:
            self._read_input(spec, graph["tensor_values"])
        scope = {name: {"value": name} for name in (*self.weights, *(spec.name for spec in self.inputs))}
        self._read_nodes(graph, scope, "")
        specs = [spec for spec in signature["output_specs"] if "user_input_mutation" not in spec]
        names = [self._read_output(spec, index) for index, spec in enumerate(specs)]
        keys = _output_keys(module.get("module_call_graph"))
        pairs = zip(keys if len(keys) == len(names) else names, names, strict=True)
        outputs = _with_unique_keys([(str(key), name) for key, name in pairs if name is not None])
        self.outputs = [[key, scope[name]["value"]] for key, name in outputs.items()]
        self.output_shapes = {  # None stands for a size that varies
            key: [size.get("as_int") for size in graph["tensor_values"][name]["sizes"]] for key, name in outputs.items()
        }
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
            shape = tuple(_dimension(content["name"], axis, size) for axis, size in enumerate(meta["sizes"]))
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
        elif kind == "constant_input":  # an argument of forward that is not a tensor; its value is fixed
            pass
        else:
            raise BadProgram(f"an input is of kind {kind!r}; custom classes are not allowed")

    def _read_output(self, spec: Mapping[str, Any], index: int) -> str | None:
        """Return torch's name of an output, or None if the output is None."""
        ((kind, value),) = spec.items()
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
        return str(content["name"])

    def _read_nodes(self, graph: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> None:
        """Append the nodes of a graph. ``scope`` maps its names to arguments. New names begin with ``prefix``."""
        for node in graph["nodes"]:
            target = node["target"].removeprefix("torch.ops.")
            if target == "higher_order.wrap_with_set_grad_enabled":
                self._inline(node, scope, prefix)
            elif target == "higher_order.wrap_with_autocast":
                raise BadProgram("blocks of torch.autocast are not supported; export the network without them")
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
        if target == "aten.batch_norm.default" and self._updates_statistics(node, scope):
            raise BadProgram(CHANGES_WEIGHTS)
        results = [_result(result, scope, prefix) for result in node["outputs"]]
        outputs = results[0] if len(results) == 1 else results
        self.nodes.append({"op": target, "args": args, "kwargs": kwargs, "outputs": outputs})

    def _updates_statistics(self, node: Mapping[str, Any], scope: Mapping[str, Any]) -> bool:
        """Return whether a batch normalisation is in training mode and changes buffers of the network."""
        arguments = {item["name"]: item["arg"] for item in node["inputs"]}
        mean = _argument(arguments["running_mean"], scope)
        return arguments["training"]["as_bool"] is True and mean is not None and mean["value"] in self.weights

    def _inline(self, node: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> None:
        """Append the nodes of a ``torch.no_grad()`` block to the nodes of the surrounding graph."""
        _, block, *inputs = (item["arg"] for item in node["inputs"])
        graph = block["as_graph"]["graph"]
        names = [next(iter(each.values()))["name"] for each in graph["inputs"]]
        inner = {name: _argument(value, scope) for name, value in zip(names, inputs, strict=True)}
        self._read_nodes(graph, inner, f"{prefix}{block['as_graph']['name']}/")
        results = [name for each in graph["outputs"] for name in _names(each)]
        for name, result in zip((name for each in node["outputs"] for name in _names(each)), results, strict=True):
            scope[name] = inner[result]

    def _remove_unused(self) -> None:
        """Remove unused weights, and nodes with unused results. Some of these nodes compute sizes for ``CHECKS``.

        In-place operators such as ``add_`` and conditions on sizes are kept.
        """
        used = {value for _, value in self.outputs}
        nodes = []
        for node in reversed(self.nodes):
            kept = node["op"].rpartition(".")[0].endswith("_") or node["op"] == ASSERT
            if kept or used.intersection(_values(node["outputs"])):
                nodes.append(node)
                used.update(_values([node["args"], *node["kwargs"].values()]))
        self.nodes = nodes[::-1]
        self.weights = {value: payload for value, payload in self.weights.items() if value in used}


def _output_keys(calls: Any) -> list[str]:
    """Return the keys of the dictionary that a program returns, or an empty list if it returns anything else.

    The values of the dictionary must be tensors or None, and its keys must be texts.
    """
    try:
        _, tree = json.loads(calls[0]["signature"]["out_spec"])
        keys = json.loads(tree["context"]) if tree["type"] in DICTIONARIES else []
        is_flat = all(child["type"] is None for child in tree["children_spec"])
    except (KeyError, IndexError, TypeError, ValueError):
        return []
    return keys if is_flat and all(isinstance(key, str) and 0 < len(key) <= 200 for key in keys) else []


def _with_unique_keys(outputs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a dictionary from pairs of a key and a value. A repeated key gets a number, such as in ``mul_1``."""
    used = {key for key, _ in outputs}
    numbers = {key: count(1) for key in used}
    result: dict[str, str] = {}
    for key, value in outputs:
        unique = key
        if key in result:
            unique = next(name for number in numbers[key] if (name := f"{key}_{number}") not in used)
            used.add(unique)
        result[unique] = value
    return result


def _dimension(name: str, axis: int, size: Mapping[str, Any]) -> int | str:
    """Return the size of dimension ``axis`` of the input ``name``: a number, a name, or a multiple such as ``2*name``.

    Raises BadProgram for other formulas. Formulas are never evaluated.
    """
    if "as_int" in size:
        return int(size["as_int"])
    formula = size["as_expr"]["expr_str"]
    if match := FORMULA.fullmatch(formula):
        return f"{match[1]}*{match[2]}" if match[1] else match[2]
    readable = TERM.sub(lambda match: match[1] or match[2], formula)
    raise BadProgram(
        f"input {name!r} has the size {readable[:200]} in dimension {axis}; "
        "a varying size should be a name or a multiple of a name, such as k or 4*k"
    )


def _argument(argument: Mapping[str, Any], scope: Mapping[str, Any]) -> Any:
    """Convert an argument from torch's format."""
    ((kind, value),) = argument.items()
    if kind in PLAIN:
        return value
    if kind == "as_float":  # infinity is stored as a text
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
    """Convert an argument that is the name of a value, a number, or none."""
    if "name" in item:
        return scope[item["name"]]
    ((kind, value),) = item.items()
    if kind == "as_none":
        return None
    return scope[value["name"]] if kind == "as_tensor" else scope[value] if kind == "as_name" else value


def _result(result: Mapping[str, Any], scope: dict[str, Any], prefix: str) -> Any:
    """Convert a result of a node, and add the names of its values to ``scope``."""
    if next(iter(result)) == "as_none":
        return None
    names = [f"{prefix}{name}" for name in _names(result)]
    scope.update({name: {"value": full} for name, full in zip(_names(result), names, strict=True)})
    return names if "as_tensors" in result else names[0]


def _names(argument: Mapping[str, Any]) -> list[str]:
    """Return the names of the values in an argument. Raises BadProgram if it contains anything but values."""
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
