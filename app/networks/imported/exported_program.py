"""Run the graph of a ``torch.export`` program.

``torch.export.load`` is not used, because a malicious file could make it run any code. It unpickles the sample inputs,
evaluates strings of the graph as Python (by ``sympy.sympify``), and accepts any name below ``torch`` as an operator.
In this module, a graph is plain data. The whole graph is checked before it runs, and it can only call the operators in
``app.networks.imported.operators``.

A graph is a JSON object:

    inputs   names of the input values
    weights  value -> key of its tensor
    nodes    list of {"op": "aten.linear.default", "args": [...], "kwargs": {...}, "outputs": "linear"}
    outputs  list of [name of the output, value]

``outputs`` of a node is the name of its result. If the node has several results, ``outputs`` is a list of their names.
In this list, null marks an unused result, and a nested list stands for a result that is a list. An argument is a JSON
value, or one of the objects ``{"value": name}``, ``{"dtype": "float32"}``, ``{"memory_format": "channels_last"}`` and
``{"device": ""}``. The object with ``device`` stands for the device of the program.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from app.networks.imported import Arrays
from app.networks.imported.operators import CREATING, Operator, find_operator

GRAPH = "graph"  # key of the tensor uint8 [bytes] that holds the graph
MAX_GRAPH_BYTES = 64 * 2**20
DTYPES = {
    name: getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
                 "complex64", "complex128")
}  # fmt: skip
MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}


class Slot(int):
    """The index of a value in the list of values of a run."""


@dataclass(slots=True)
class Step:
    """One operator call.

    ``slots``, ``lists`` and ``named`` are the arguments that contain values of the run. ``slots`` are single values and
    ``lists`` are lists of values, each with its position. ``named`` are keyword arguments with their names. ``written``
    are the values that the step sets.
    """

    target: str
    operator: Operator
    args: list[Any]
    kwargs: dict[str, Any]
    results: Slot | list[Any]
    slots: list[tuple[int, Slot]] = field(default_factory=list)
    lists: list[tuple[int, list[Any]]] = field(default_factory=list)
    named: list[tuple[str, Any]] = field(default_factory=list)
    written: list[Slot] = field(default_factory=list)
    dead: list[Slot] = field(default_factory=list)  # values that no later step reads

    def run(self, values: list[Any], keep: bool = False) -> None:
        """Call the operator on ``values``, and store its results there.

        Unless ``keep`` is true, drop the values that no later step reads.
        """
        args, kwargs = self.args, self.kwargs
        if self.slots:
            args = args.copy()
            for position, slot in self.slots:
                args[position] = values[slot]
        if self.lists:
            args = args.copy()
            for position, items in self.lists:
                args[position] = _filled(items, values)
        if self.named:
            kwargs = kwargs | {name: _filled(item, values) for name, item in self.named}
        result = self.operator(*args, **kwargs)
        if type(self.results) is Slot:
            values[self.results] = result
        else:
            _store(result, self.results, values)
        if not keep:
            self.free(values)

    def free(self, values: list[Any]) -> None:
        """Drop the values that no later step reads."""
        for slot in self.dead:
            values[slot] = None


def _filled(item: Any, values: list[Any]) -> Any:
    if isinstance(item, Slot):
        return values[item]
    return [_filled(each, values) for each in item] if isinstance(item, list) else item


def _store(result: Any, places: Slot | list[Any] | None, values: list[Any]) -> None:
    if isinstance(places, Slot):
        values[places] = result
    elif places is not None:
        for value, target in zip(result, places, strict=True):
            _store(value, target, values)


def _slots(item: Any) -> Iterator[Slot]:
    if isinstance(item, Slot):
        yield item
    elif isinstance(item, list):
        for each in item:
            yield from _slots(each)


class ExportedProgram:
    """A graph with its weights. It computes outputs by name from inputs by name.

    Args:
        tensors: the weights by key, and the graph under ``GRAPH``.

    Raises:
        ValueError: the graph is invalid, calls an operator that is not allowed, or does not fit the weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        graph = read_graph(tensors)
        try:
            self._build(graph, tensors)
        except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the graph has a wrong entry: {type(error).__name__}: {error}") from error

    def _build(self, graph: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._names: dict[str, Slot] = {}
        self.inputs: list[str] = list(graph["inputs"])
        for name in self.inputs:
            self._define(name)
        self.keys = [str(key) for key in graph["weights"].values()]
        for name in graph["weights"]:
            self._define(name)
        for key in dict.fromkeys(self.keys):
            if key not in tensors or key == GRAPH:
                raise ValueError(f"there is no weight {key!r}")
        self._weights = {key: tensors[key] for key in self.keys}
        self.device = torch.device("cpu")
        if unused := sorted(tensors.keys() - self._weights.keys() - {GRAPH}):
            raise ValueError(f"weight {unused[0]!r} is not used by the graph")
        self.steps = [self._step(node) for node in graph["nodes"]]
        self.outputs: dict[str, Slot] = {str(name): self._slot(value) for name, value in graph["outputs"]}
        self._find_dead()

    def _define(self, name: Any) -> Slot:
        if not isinstance(name, str) or name in self._names:
            raise ValueError(f"value {str(name)[:80]!r} is defined twice, or is no string")
        return self._names.setdefault(name, Slot(len(self._names)))

    def _slot(self, name: Any) -> Slot:
        if name not in self._names:
            raise ValueError(f"value {str(name)[:80]!r} is used before it is defined")
        return self._names[name]

    def _step(self, node: dict[str, Any]) -> Step:
        target = str(node["op"])
        args = [self._argument(item) for item in node["args"]]
        kwargs = {str(name): self._argument(item) for name, item in node["kwargs"].items()}
        if "device" in kwargs or target in CREATING:  # make all tensors on the device of the program
            kwargs["device"] = torch.device("cpu")
        step = Step(target, find_operator(target), args, kwargs, self._results(node["outputs"]))
        for position, item in enumerate(args):
            if isinstance(item, Slot):
                step.slots.append((position, item))
            elif any(True for _ in _slots(item)):
                step.lists.append((position, item))
        step.named = [(name, item) for name, item in kwargs.items() if any(True for _ in _slots(item))]
        return step

    def _results(self, names: Any) -> Any:
        if names is None or isinstance(names, str):
            return None if names is None else self._define(names)
        return [self._results(name) for name in names]

    def _argument(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self._argument(each) for each in item]
        if not isinstance(item, dict):
            return item
        ((kind, value),) = item.items()
        if kind == "value":
            return self._slot(value)
        if kind == "device":
            return torch.device("cpu")
        return {"dtype": DTYPES, "memory_format": MEMORY_FORMATS}[kind][value]

    def _find_dead(self) -> None:
        """Set ``dead`` of each step to the values that no later step needs."""
        needed = {*self.outputs.values(), *range(len(self.inputs) + len(self.keys))}  # inputs and weights are first
        for step in reversed(self.steps):
            read = [slot for _, slot in step.slots] + list(_slots([item for _, item in step.lists + step.named]))
            step.written = list(_slots([step.results]))
            step.dead = [slot for slot in dict.fromkeys((*read, *step.written)) if slot not in needed]
            needed.update(step.dead)

    def to(self, device: torch.device) -> Self:
        """Move the weights to a device, where the graph then runs."""
        self._weights = {key: tensor.to(device) for key, tensor in self._weights.items()}
        self.device = device
        for step in self.steps:
            step.args = [device if isinstance(item, torch.device) else item for item in step.args]
            for name, item in step.kwargs.items():
                step.kwargs[name] = device if isinstance(item, torch.device) else item
        return self

    def weight_versions(self) -> list[int]:
        """Return a number for each weight that changes when an operator writes to it."""
        return [tensor._version for tensor in self._weights.values()]

    def values(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """Return the list of values before the first step, in which only the inputs and the weights are set."""
        values: list[Any] = [None] * len(self._names)
        for index, name in enumerate(self.inputs):
            values[index] = inputs[name]
        for index, key in enumerate(self.keys, len(self.inputs)):
            values[index] = self._weights[key]
        return values

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on the inputs by name, and return the outputs by name."""
        values = self.values(inputs)
        for step in self.steps:
            step.run(values)
        return {name: values[slot] for name, slot in self.outputs.items()}

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run the graph on numpy arrays. Outputs in bfloat16, which numpy lacks, become float32."""
        with torch.inference_mode():
            outputs = self({name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()})
        return {
            name: (output.float() if output.dtype == torch.bfloat16 else output).cpu().numpy()
            for name, output in outputs.items()
        }


def read_graph(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the graph that is stored with the weights. Raises ValueError if it is missing or not JSON."""
    content = tensors.get(GRAPH)
    if content is None or content.dtype != torch.uint8 or not 0 < content.numel() <= MAX_GRAPH_BYTES:
        raise ValueError(f"tensor {GRAPH!r} should be uint8 with up to {MAX_GRAPH_BYTES:,} values")
    try:
        graph = json.loads(content.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tensor {GRAPH!r} is not JSON: {error}") from error
    if not isinstance(graph, dict):
        raise ValueError(f"tensor {GRAPH!r} is not a JSON object")
    return graph


def graph_tensor(graph: Mapping[str, Any]) -> Tensor:
    """Return the tensor in which a graph is stored."""
    return torch.frombuffer(bytearray(json.dumps(graph).encode()), dtype=torch.uint8)
