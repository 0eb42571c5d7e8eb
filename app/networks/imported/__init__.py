"""The signature of imported networks: the shapes of their inputs, and how the service may run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TEST_SIZE = 16  # size of the varying dimensions in test runs, unless the network needs another size
ANY = "?"  # a dimension that varies and has no name
Arrays = Mapping[str, np.ndarray]  # tensors by name; a tensor of texts is an array with dtype object
Shape = list[int | str]  # a dimension is a number, the name of a varying size, or ``ANY``


@dataclass(frozen=True)
class ImportedSizes:
    """The signature of an imported network.

    Attributes:
        inputs: the shape of each input.
        batched: whether the first dimension of all inputs and outputs counts rows that do not affect each other.
        max_rows: largest number of rows in one run.
        test_size: a size of the varying dimensions with which the network runs.
        options: settings that tell the task how to use the network, such as the names of its tensors.
    """

    inputs: dict[str, Shape]
    batched: bool
    max_rows: int
    test_size: int = TEST_SIZE
    options: dict[str, Any] = field(default_factory=dict)

    def dummy_shapes(self, rows: int, size: int = 0) -> dict[str, list[int]]:
        """Return a shape for each input. All varying sizes are ``size``, or ``test_size`` if it is 0."""
        shapes = {
            name: [each if isinstance(each, int) else size or self.test_size for each in shape]
            for name, shape in self.inputs.items()
        }
        return {name: [rows, *shape[1:]] for name, shape in shapes.items()} if self.batched else shapes

    def problem(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
        """Return the name of the first input with a wrong shape, and the expected shape, or None if all shapes fit."""
        sizes: dict[str, int] = {}
        for name, expected in self.inputs.items():
            if len(shapes[name]) != len(expected):
                return name, f"{len(expected)} dimensions"
            for axis, (size, rule) in enumerate(zip(shapes[name], expected, strict=True)):
                if isinstance(rule, int) and size != rule:
                    return name, f"{rule} in dimension {axis}"
                if isinstance(rule, str) and rule != ANY and size != sizes.setdefault(rule, max(size, 1)):
                    return name, f"{sizes[rule]:,} in dimension {axis}, like all dimensions {rule!r}"
        return None
