"""The signature of imported networks, and the interface through which the tasks run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any, Protocol, Self

import numpy as np
import torch

from app.networks.imported.guards import MAX_CHARACTERS, broken_guard, read_guard

TEST_SIZE = 16  # size of the variable dimensions in test runs, unless the network needs another size
TRIED_SIZES = 4096  # combinations of sizes that are tried to find one that fulfils the guards
Arrays = Mapping[str, np.ndarray]  # tensors by name; a tensor of texts is an array with dtype object


@dataclass(frozen=True)
class ImportedSizes:
    """The signature of an imported network.

    Attributes:
        inputs: the shape of each input. A dimension is a number, the name of a variable size, a multiple such as
            ``2*name``, or ``?`` if any size is allowed.
        ranges: the smallest and the largest value of each variable size.
        batched: whether the first dimension of all inputs and outputs counts rows that do not affect each other.
        max_rows: largest number of rows in one run. For an exported program, a run of this size fits into memory.
        test_size: a size of the variable dimensions with which the network runs, for test runs and measurements.
        options: settings that tell the task how to use the network, such as the names of its tensors.
        guards: conditions on the sizes of an exported program, such as ``image.shape[2] % 2 == 0``.
    """

    inputs: dict[str, list[int | str]]
    ranges: dict[str, list[int]]
    batched: bool
    max_rows: int
    test_size: int = TEST_SIZE
    options: dict[str, Any] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rules = [rule for shape in self.inputs.values() for rule in shape]
        limits = [limit for pair in self.ranges.values() for limit in pair]
        if not all(type(rule) in (int, str) for rule in rules) or not all(type(limit) is int for limit in limits):
            raise TypeError("inputs should hold numbers and names, and ranges numbers")
        if type(self.batched) is not bool or type(self.max_rows) is not int or self.max_rows < 1:
            raise TypeError("batched should be a boolean, and max_rows a number from 1 on")
        if type(self.test_size) is not int or self.test_size < 1:
            raise TypeError("test_size should be a number from 1 on")
        if any(len(pair) != 2 for pair in self.ranges.values()):
            raise TypeError("ranges should hold pairs of numbers")
        self._check_guards()

    def _check_guards(self) -> None:
        """Raise TypeError if a guard is invalid, or reads a size that no input has."""
        if sum(map(len, self.guards)) > MAX_CHARACTERS:
            raise TypeError(f"guards should have at most {MAX_CHARACTERS:,} characters together")
        for guard in self.guards:
            try:
                sizes = read_guard(guard).sizes
            except ValueError as error:
                raise TypeError(str(error)) from error
            if not sizes:
                raise TypeError(f"guard {guard[:200]!r} should read the size of an input")
            for name, axis in sizes:
                if not 0 <= axis < len(self.inputs.get(name, ())):
                    raise TypeError(f"guard {guard[:200]!r} reads dimension {axis} of {name!r}, which does not exist")

    def dummy_shapes(self, rows: int, size: int = 0) -> dict[str, list[int]]:
        """Return a shape for each input.

        Variable sizes are ``size``, or the nearest value in their range. If ``size`` is 0, ``test_size`` is used. If
        these sizes break a guard, sizes near them are tried, first larger ones.
        """
        size = size or self.test_size
        shapes = self._shapes(rows, size, {})
        if not broken_guard(self.guards, shapes):
            return shapes
        count = int(TRIED_SIZES ** (1 / max(len(self.ranges), 1)) / 2)
        steps = [*range(count), *range(-1, -count, -1)]
        for combination in islice(product(steps, repeat=len(self.ranges)), TRIED_SIZES):
            other = self._shapes(rows, size, dict(zip(self.ranges, combination, strict=True)))
            if not broken_guard(self.guards, other):
                return other
        return shapes

    def _shapes(self, rows: int, size: int, steps: Mapping[str, int]) -> dict[str, list[int]]:
        """Return a shape for each input. ``steps`` has the difference of a variable size from ``size``."""
        sizes = {
            symbol: min(max(size + steps.get(symbol, 0), low), high) for symbol, (low, high) in self.ranges.items()
        }
        shapes = {}
        for name, rules in self.inputs.items():
            shape = []
            for axis, rule in enumerate(rules):
                factor, _, symbol = str(rule).rpartition("*")
                value = rule if isinstance(rule, int) else sizes.get(symbol, size) * int(factor or 1)
                shape.append(rows if self.batched and axis == 0 else value)
            shapes[name] = shape
        return shapes

    def problem(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
        """Return the name of the first input with a wrong shape, and the expected shape, or None if all shapes fit."""
        sizes: dict[str, int] = {}
        for name, expected in self.inputs.items():
            shape = shapes[name]
            if len(shape) != len(expected):
                return name, f"{len(expected)} dimensions"
            for axis, (size, rule) in enumerate(zip(shape, expected, strict=True)):
                if isinstance(rule, int):
                    if size != rule:
                        return name, f"{rule} in dimension {axis}"
                    continue
                factor, _, symbol = rule.rpartition("*")
                number, rest = divmod(size, int(factor or 1))
                if rest:
                    return name, f"a multiple of {factor} in dimension {axis}"
                if sizes.setdefault(symbol, number) != number and symbol != "?":
                    return name, f"{sizes[symbol] * int(factor or 1):,} in dimension {axis}, as in another dimension"
                low, high = self.ranges.get(symbol, (0, size))
                if not low <= number <= high:
                    allowed = f"{low * int(factor or 1):,} to {high * int(factor or 1):,}"
                    return name, f"{allowed} in dimension {axis}"
        if guard := broken_guard(self.guards, shapes):
            return min(read_guard(guard).sizes)[0], guard
        return None


class ImportedNetwork(Protocol):
    """A network from outside this project. Its inputs and outputs are tensors with names."""

    inputs: list[str]
    outputs: Mapping[str, Any]

    def to(self, device: torch.device) -> Self:
        """Move the network to a device."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises ValueError, IndexError, RuntimeError or TypeError for invalid inputs."""

    def weight_versions(self) -> list[int]:
        """Return a version number for each weight, which changes when the network changes this weight."""
