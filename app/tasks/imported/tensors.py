"""Run imported networks on named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.errors import BadValue
from app.networks.imported import Arrays, ImportedSizes
from app.networks.imported.onnx_runner import OnnxRunner
from app.store import CARD, StoreError, TensorSpec
from app.store.version import Version
from app.tasks.job import Job
from app.tasks.predictor import SplittingPredictor


@dataclass
class TensorJob(Job):
    """Inputs of an imported network by name."""

    arrays: dict[str, np.ndarray]

    def answer_size(self, outputs: Sequence[Any]) -> int:
        return sum(array.size for output in outputs for array in output.values())


@dataclass(frozen=True)
class TensorRows:
    """The inputs of a request by name. ``rows`` is the size of the batch dimension, or 1 if there is none."""

    arrays: dict[str, np.ndarray]
    rows: int

    @property
    def key(self) -> tuple[Any, ...]:
        """A key for batching: items with equal keys can be computed in one batch."""
        return tuple((name, array.dtype, array.shape[1:]) for name, array in self.arrays.items())

    def between(self, start: int, end: int) -> TensorRows:
        """Return the rows from ``start`` to ``end``."""
        rows = min(end, self.rows) - start
        return TensorRows({name: array[start:end] for name, array in self.arrays.items()}, rows)


class TensorPredictor(SplittingPredictor):
    """Predictor for imported networks. It computes output arrays by name from input arrays by name."""

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.sizes = ImportedSizes(**version.card.sizes)
        runner: OnnxRunner = version.network()
        self.runner = runner.to(device)
        self.inputs: dict[str, TensorSpec] = {spec.name: spec for spec in self.card.inputs}
        self.outputs: dict[str, TensorSpec] = {spec.name: spec for spec in self.card.outputs}
        for key, actual, expected in (
            ("inputs", self.inputs, runner.inputs),
            ("outputs", self.outputs, runner.outputs),
            ("sizes.inputs", self.sizes.inputs, runner.inputs),
        ):
            if sorted(actual) != sorted(expected):
                message = f"{key} are {', '.join(actual)}, expected {', '.join(expected)}"
                raise StoreError(f"{version.path_of(CARD)}: {message}")

    def prepare(self, job: TensorJob) -> list[TensorRows]:
        """Return the item for a job. Raises BadValue if the shape of an input does not fit."""
        return [self.parse_tensors(job.arrays)]

    def finish(
        self, job: TensorJob, items: Sequence[TensorRows], outputs: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return the outputs by name, given the result of ``predict`` for the item."""
        return outputs[0]

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
            inputs = {name: np.concatenate([item.arrays[name] for item in group]) for name in group[0].arrays}
            outputs = self.run(inputs if len(group) > 1 else group[0].arrays, sum(item.rows for item in group))
            if len(group) == 1:
                results[indices[0]] = outputs
                continue
            ends = np.cumsum([item.rows for item in group])
            for index, item, end in zip(indices, group, ends, strict=True):
                results[index] = {name: array[end - item.rows : end] for name, array in outputs.items()}
        return results

    def run(self, arrays: Arrays, rows: int) -> dict[str, np.ndarray]:
        """Run all ``rows`` rows, in batches that fit into memory. Raises BadValue if the network cannot read them."""
        step = self.sizes.max_rows
        try:
            parts = (
                [
                    self.runner.run({name: array[start : start + step] for name, array in arrays.items()})
                    for start in range(0, rows, step)
                ]
                if rows > step
                else [self.runner.run(arrays)]
            )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0][:300]
            raise BadValue(f"{self.card.name} cannot read this input: {reason}", "inputs") from error
        return parts[0] if len(parts) == 1 else self.join(parts)

    def rows(self, item: TensorRows) -> int:
        """Return the number of batch rows that an item takes."""
        return item.rows

    def split(self, item: TensorRows, rows: int) -> list[TensorRows]:
        """Split an item into parts of at most ``rows`` rows."""
        return [item.between(start, start + rows) for start in range(0, item.rows, rows)]

    def join(self, results: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Join the results of all parts of an item."""
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` rows of zeros, one after the other if the network has no batch dimension."""
        types = {name: object if spec.dtype == "string" else spec.dtype for name, spec in self.inputs.items()}
        shapes = self.sizes.dummy_shapes(rows)
        arrays = {
            name: np.full(shape, "" if types[name] is object else 0, types[name]) for name, shape in shapes.items()
        }
        for _ in range(1 if self.sizes.batched else rows):
            self.run(arrays, rows if self.sizes.batched else 1)
