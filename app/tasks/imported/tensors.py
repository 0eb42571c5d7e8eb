"""Run imported networks on named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.errors import BadValue, is_out_of_memory
from app.networks.imported import Arrays, ImportedNetwork, ImportedSizes
from app.networks.imported.guards import broken_guard
from app.store import CARD, StoreError, TensorSpec, Version
from app.tasks.latency_model import LatencyModel

INPUT_ERRORS = (ValueError, IndexError, RuntimeError, TypeError)  # raised by a network that cannot read its input
# A CUDA error, which usually lasts until the process ends. Older versions of torch have no class for it.
DEVICE_ERROR = getattr(torch, "AcceleratorError", ())


@dataclass(frozen=True)
class TensorRows:
    """The inputs of a request by name. ``rows`` is the size of the batch dimension, or 1 if there is none."""

    arrays: dict[str, np.ndarray]
    rows: int

    @property
    def key(self) -> tuple[Any, ...]:
        """A key for batching: items with equal keys can be computed in one batch."""
        return tuple((name, array.dtype, array.shape[1:]) for name, array in self.arrays.items())


class TensorPredictor:
    """Predictor for imported networks. It computes output arrays by name from input arrays by name."""

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.sizes = ImportedSizes(**version.card.sizes)
        network: ImportedNetwork = version.network()
        self.network = network.to(device)
        self.inputs: dict[str, TensorSpec] = {spec.name: spec for spec in self.card.inputs}
        self.outputs: dict[str, TensorSpec] = {spec.name: spec for spec in self.card.outputs}
        for key, names in (("inputs", self.network.inputs), ("outputs", self.network.outputs)):
            if sorted(names) != sorted(getattr(self, key)):
                present = ", ".join(getattr(self, key))
                raise StoreError(f"{version.path_of(CARD)}: {key} are {present}, expected {', '.join(names)}")
        if sorted(self.sizes.inputs) != sorted(self.inputs):
            present = ", ".join(self.sizes.inputs)
            raise StoreError(f"{version.path_of(CARD)}: sizes.inputs are {present}, expected {', '.join(self.inputs)}")
        self.latency = LatencyModel(0.0, 0.0)

    def parse_tensors(self, arrays: Mapping[str, np.ndarray]) -> TensorRows:
        """Return the item for a request. Raises BadValue if the shape of an input does not fit."""
        if problem := self.sizes.problem({name: array.shape for name, array in arrays.items()}):
            name, expected = problem
            raise BadValue(f"input {name!r} has the shape {list(arrays[name].shape)}, expected {expected}", "inputs")
        ordered = {name: arrays[name] for name in self.inputs}
        return TensorRows(ordered, len(next(iter(ordered.values()))) if self.sizes.batched else 1)

    def predict(self, items: Sequence[TensorRows]) -> list[dict[str, np.ndarray]]:
        """Return the outputs of each item.

        If the network has a batch dimension, items whose shapes differ only in the number of rows are computed in one
        batch.

        Raises:
            BadValue: the network cannot read an input.
        """
        groups: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item.key if self.sizes.batched else index, []).append(index)
        results: list[dict[str, np.ndarray]] = [{}] * len(items)
        for indices in groups.values():
            group = [items[index] for index in indices]
            for index, result in zip(indices, self._compute(group), strict=True):
                results[index] = result
        return results

    def _compute(self, items: Sequence[TensorRows]) -> list[dict[str, np.ndarray]]:
        """Return the outputs of each item. All items must have the same shapes, apart from the number of rows."""
        if len(items) == 1 and items[0].rows <= self.sizes.max_rows:
            return [self._run(items[0].arrays)]
        inputs = {name: np.concatenate([item.arrays[name] for item in items]) for name in items[0].arrays}
        outputs = self.run_rows(inputs, sum(item.rows for item in items))
        ends = np.cumsum([item.rows for item in items])
        return [
            {name: array[end - item.rows : end] for name, array in outputs.items()}
            for item, end in zip(items, ends, strict=True)
        ]

    def run_rows(self, inputs: Arrays, rows: int) -> dict[str, np.ndarray]:
        """Run all ``rows`` rows, in batches that fit into memory. Raises BadValue if the network cannot read them."""
        step = self.sizes.max_rows
        if rows <= step:
            return self._run(inputs)
        parts = [
            self._run({name: array[start : start + step] for name, array in inputs.items()})
            for start in range(0, rows, step)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        if guard := broken_guard(self.sizes.guards, {name: array.shape for name, array in arrays.items()}):
            raise BadValue(f"{self.card.name} cannot read this input: expected sizes with {guard}", "inputs")
        try:
            return self.network.run(arrays)
        except INPUT_ERRORS as error:
            if is_out_of_memory(error, imported=True) or isinstance(error, DEVICE_ERROR):
                raise  # not caused by the input alone
            reason = str(error).strip().partition("\n")[0][:300]
            raise BadValue(f"{self.card.name} cannot read this input: {reason}", "inputs") from error

    def rows(self, item: TensorRows) -> int:
        """Return the number of batch rows that an item takes."""
        return item.rows

    def seconds(self, items: Sequence[TensorRows]) -> float:
        """Return the expected duration of a batch in seconds."""
        return self.latency(sum(item.rows for item in items))

    def split(self, item: Any, rows: int) -> list[Any]:
        """Split an item into parts of at most ``rows`` rows."""
        return [
            TensorRows(
                {name: array[start : start + rows] for name, array in item.arrays.items()}, min(rows, item.rows - start)
            )
            for start in range(0, item.rows, rows)
        ]

    def join(self, results: Sequence[Any]) -> Any:
        """Join the results of all parts of an item."""
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def dummy_item(self, rows: int) -> TensorRows:
        """Return an item of zeros with ``rows`` rows, or with one row if the network has no batch dimension."""
        arrays = {}
        for name, shape in self.sizes.dummy_shapes(rows if self.sizes.batched else 1).items():
            dtype = self.inputs[name].dtype
            arrays[name] = np.full(shape, "", object) if dtype == "string" else np.zeros(shape, dtype)
        return TensorRows(arrays, rows if self.sizes.batched else 1)

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy rows."""
        self.predict([self.dummy_item(rows)] if self.sizes.batched else [self.dummy_item(1)] * rows)

    def warm_up(self, rows: int) -> None:
        """Measure the duration of 1 to ``rows`` rows. Raises StoreError if the network changes its own weights."""
        before = self.network.weight_versions()
        self.latency = LatencyModel.measure(self.dummy_run, rows if self.sizes.batched else 1)
        if not self.sizes.batched:  # rows are computed one after the other
            self.latency = LatencyModel(self.latency.single_row, self.latency.single_row)
        if self.network.weight_versions() != before:
            raise StoreError(f"{self.card.name} changes its own weights while it runs; export it in evaluation mode")


class TaskPredictor(TensorPredictor):
    """Base class of predictors that run an imported network for a task, and for requests of tensors.

    An item is an input of the task, or ``TensorRows``. ``options`` in the card's ``sizes`` say how the task uses the
    tensors.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(version, device)
        self.options = self.sizes.options
        self._card = version.path_of(CARD)
        self.device = device
        firsts = {name: shape[0] if shape else 0 for name, shape in self.sizes.inputs.items()}
        for name, first in firsts.items():
            if not self.sizes.batched and first != 1:
                expected = "should have a first dimension that is 1, or that counts rows which do not affect each other"
                raise self.mismatch(name, expected)

    def mismatch(self, tensor: str, expected: str) -> StoreError:
        """Return the error for a tensor that does not fit the task."""
        spec = self.inputs.get(tensor) or self.outputs.get(tensor)
        actual = f"{spec.dtype} {spec.shape}" if spec else "missing"
        return StoreError(
            f"{self._card}: for the task {self.card.task!r}, tensor {tensor!r} {expected}; it is {actual}"
        )

    def tensor(self, role: str, specs: Mapping[str, TensorSpec], rank: Sequence[int], dtypes: str) -> TensorSpec:
        """Return the spec of the tensor that an option on the card names.

        ``role`` is the name of the option, such as "input". Without this option, ``specs`` must have only one tensor.

        Raises:
            StoreError: there is no such tensor, or it has another number of dimensions or another type.
        """
        name = self.options.get(role)
        if name is None:
            if len(specs) > 1:
                raise StoreError(f"{self._card}: option {role} is missing; known tensors: {', '.join(specs)}")
            name = next(iter(specs))
        if name not in specs:
            raise StoreError(f"{self._card}: option {role} is {name!r}; known tensors: {', '.join(specs)}")
        spec = specs[name]
        if len(spec.shape) not in rank or not spec.dtype.startswith(tuple(dtypes.split())):
            types, dimensions = dtypes.replace(" ", " or "), " or ".join(map(str, rank))
            raise self.mismatch(name, f"should be {types}, with {dimensions} dimension{'s' * (dimensions != '1')}")
        return spec

    def reject_inputs_except(self, *names: str | None) -> None:
        """Raise StoreError if the network has another input, because this task could not fill it."""
        if unused := [name for name in self.inputs if name not in names]:
            raise self.mismatch(unused[0], "is not an input of this task")

    def check_finite(self, total: float, outputs: str) -> None:
        """Raise BadValue if ``total``, the sum of the network's outputs, is not finite.

        Unlike networks of this project, an imported network may return such outputs for some inputs. For example, it
        may divide by the deviation of a constant series. The error must not count as a fault of the machine.
        """
        if not math.isfinite(total):
            raise BadValue(f"{self.card.name} returns no finite {outputs} for this input")

    def predict(self, items: Sequence[Any]) -> list[Any]:
        """Return the result of each item: the result of the task or, for ``TensorRows``, the outputs by name."""
        tensors = [item for item in items if isinstance(item, TensorRows)]
        own = [item for item in items if not isinstance(item, TensorRows)]
        results = {
            True: iter(super().predict(tensors) if tensors else ()),
            False: iter(self.predict_task(own) if own else ()),
        }
        return [next(results[isinstance(item, TensorRows)]) for item in items]

    def predict_task(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the result of the task for each item. No item is ``TensorRows``."""
        raise NotImplementedError

    def rows(self, item: Any) -> int:
        """Return the number of batch rows that an item takes."""
        return item.rows if isinstance(item, TensorRows) else 1

    def seconds(self, items: Sequence[Any]) -> float:
        """Return the expected duration of a batch in seconds."""
        return self.latency(sum(map(self.rows, items)))
