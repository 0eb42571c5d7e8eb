"""Imported networks: tensors to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.errors import BadValue
from app.networks.imported import Arrays, ImportedNetwork, ImportedSizes
from app.store import CARD, StoreError, Version
from app.tasks.latency_model import LatencyModel

DUMMY_SIZE = 16  # of a dimension that varies, in a batch that is timed
INPUT_ERRORS = (ValueError, IndexError, RuntimeError, TypeError)  # of a network that cannot read its input


@dataclass(frozen=True)
class TensorRows:
    """The inputs of a request by name. ``rows`` is the size of the first dimension, or 1 without a batch axis."""

    arrays: dict[str, np.ndarray]
    rows: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Items with the same key can be computed in one batch."""
        return tuple((name, array.dtype, array.shape[1:]) for name, array in self.arrays.items())


class TensorPredictor:
    """Predictor for imported networks: input arrays by name to output arrays by name."""

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.sizes = ImportedSizes(**version.card.sizes)
        network: ImportedNetwork = version.network()
        self.network = network.to(device)
        self.inputs = {spec.name: spec for spec in self.card.inputs}
        self.outputs = {spec.name: spec for spec in self.card.outputs}
        for key, names in (("inputs", self.network.inputs), ("outputs", self.network.outputs)):
            if sorted(names) != sorted(getattr(self, key)):
                raise StoreError(f"{version.label}/{CARD}: {key} are {', '.join(getattr(self, key))}, expected {names}")
        if sorted(self.sizes.inputs) != sorted(self.inputs):
            raise StoreError(f"{version.label}/{CARD}: sizes.inputs are {', '.join(self.sizes.inputs)}")
        self.latency = LatencyModel(0.0, 0.0)

    def parse(self, arrays: Mapping[str, np.ndarray]) -> TensorRows:
        """Return the item of a request. Raises BadValue if a shape does not fit; it names the input."""
        if problem := self.sizes.problem({name: array.shape for name, array in arrays.items()}):
            name, expected = problem
            raise BadValue(f"input {name!r} has the shape {list(arrays[name].shape)}, expected {expected}", "inputs")
        ordered = {name: arrays[name] for name in self.inputs}
        return TensorRows(ordered, len(next(iter(ordered.values()))) if self.sizes.batched else 1)

    def predict(self, items: Sequence[TensorRows]) -> list[dict[str, np.ndarray]]:
        """Return the outputs of each item. Items of other shapes are computed one after the other.

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
        """Return the outputs of each item, whose shapes are the same."""
        if len(items) == 1 and items[0].rows <= self.sizes.max_rows:
            return [self._run(items[0].arrays)]
        inputs = {name: np.concatenate([item.arrays[name] for item in items]) for name in items[0].arrays}
        rows, step = sum(item.rows for item in items), self.sizes.max_rows
        parts = [
            self._run({name: array[start : start + step] for name, array in inputs.items()})
            for start in range(0, rows, step)
        ]
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ends = np.cumsum([item.rows for item in items])
        return [
            {name: array[end - item.rows : end] for name, array in outputs.items()}
            for item, end in zip(items, ends, strict=True)
        ]

    def _run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        try:
            return self.network.run(arrays)
        except INPUT_ERRORS as error:
            if "allocate memory" in str(error):
                raise
            reason = str(error).strip().partition("\n")[0][:300]
            raise BadValue(f"{self.card.name} cannot read this input: {reason}", "inputs") from error

    def rows(self, item: TensorRows) -> int:
        """Return the number of batch rows that an item takes."""
        return item.rows

    def seconds(self, items: Sequence[TensorRows]) -> float:
        """Return the expected duration of a batch."""
        return self.latency(sum(item.rows for item in items))

    def dummy_item(self, rows: int) -> TensorRows:
        """Return an item of zeros with ``rows`` rows, or one if the network has no batch axis."""
        arrays = {}
        for name, shape in self.sizes.dummy_shapes(rows if self.sizes.batched else 1, DUMMY_SIZE).items():
            dtype = self.inputs[name].dtype
            arrays[name] = np.full(shape, "", object) if dtype == "string" else np.zeros(shape, dtype)
        return TensorRows(arrays, rows if self.sizes.batched else 1)

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy rows."""
        self.predict([self.dummy_item(rows)])

    def warm_up(self, rows: int) -> None:
        """Measure batches of 1 to ``rows`` rows. Raises StoreError if the network changes its own weights."""
        before = self.network.versions()
        self.latency = LatencyModel.measure(self.dummy_run, rows if self.sizes.batched else 1)
        if self.network.versions() != before:
            raise StoreError(f"{self.card.name} changes its own weights while it runs; export it in evaluation mode")
