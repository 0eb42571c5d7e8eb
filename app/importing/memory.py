"""Compute how much memory a run of an exported program needs.

The result is computed from the shapes of all tensors, without running the program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.importing.pt2_graph import BadProgram, InputSpec
from app.networks.imported import ImportedSizes
from app.networks.imported.exported_program import DTYPES, ExportedProgram
from app.networks.imported.operators import ASSERT
from app.store import Version
from app.tasks import check_loading

MAX_RUN_BYTES = 2 * 2**30  # limit for all values that a run holds at the same time, without the weights
USUAL_ROWS = 16  # sizes without a stated maximum are limited so that a batch of this many rows fits into memory
LARGEST_SIZE = 2**20  # largest size of a dimension
MAX_ROWS = 1024  # largest number of rows of a batch


class MemoryLimit:
    """Finds the largest input sizes with which a run of a program fits into ``MAX_RUN_BYTES``.

    Raises:
        BadProgram: the program is invalid.
    """

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Sequence[InputSpec]) -> None:
        try:
            self._program = ExportedProgram(tensors).to(torch.device("meta"))
        except ValueError as error:
            raise BadProgram(str(error)) from None
        self._inputs = inputs

    def fit(
        self, shapes: dict[str, list[int | str]], ranges: Mapping[str, tuple[int, int | None]], batch: str | None
    ) -> ImportedSizes:
        """Return the sizes of the program. Their maxima are chosen so that a run fits into ``MAX_RUN_BYTES``.

        ``shapes`` are the shapes of the inputs. ``ranges`` has, for each varying size, the smallest and largest value
        that the program allows. ``batch`` is the name of the size that counts rows, or None.

        Raises:
            BadProgram: a run with the smallest sizes needs too much memory, or the memory depends on input values.
        """
        symbols = {str(rule).rpartition("*")[2] for shape in shapes.values() for rule in shape if isinstance(rule, str)}
        limits = {symbol: ranges.get(symbol, (1, None)) for symbol in sorted(symbols - {"?", batch})}
        lows = {symbol: max(low, 1) for symbol, (low, _) in limits.items()}
        highs = {symbol: min(high or LARGEST_SIZE, LARGEST_SIZE) for symbol, (_, high) in limits.items()}
        unlimited = [symbol for symbol, (_, high) in limits.items() if high is None or high > LARGEST_SIZE]

        def sizes(rows: int) -> ImportedSizes:
            pairs = {symbol: [min(lows[symbol], highs[symbol]), highs[symbol]] for symbol in highs}
            return ImportedSizes(shapes, pairs, batch is not None, rows)

        most_rows = min(ranges.get(batch or "", (1, None))[1] or MAX_ROWS, MAX_ROWS) if batch else 1
        for shrunk, rows in ((unlimited, min(USUAL_ROWS, most_rows)), (list(highs), 1)):
            while any(highs[symbol] > lows[symbol] for symbol in shrunk) and not self._fits(sizes(rows), rows):
                for symbol in shrunk:
                    highs[symbol] = max(highs[symbol] // 2, lows[symbol])
        if (needed := self.peak_bytes(sizes(1), 1)) > MAX_RUN_BYTES:
            raise BadProgram(f"one run needs {needed:,} bytes of memory; the maximum is {MAX_RUN_BYTES:,}")
        rows = most_rows
        while rows > 1 and not self._fits(sizes(rows), rows):
            rows //= 2
        return sizes(rows)

    def _fits(self, sizes: ImportedSizes, rows: int) -> bool:
        try:
            return self.peak_bytes(sizes, rows) <= MAX_RUN_BYTES
        except BadProgram:  # a size has more than 63 bits or exceeds a table of the program
            return False

    def peak_bytes(self, sizes: ImportedSizes, rows: int) -> int:
        """Return the peak memory of a run on ``rows`` rows with the largest sizes.

        The result is in bytes, and does not include the weights.

        Raises:
            BadProgram: the size of a result cannot be determined from shapes alone, because it depends on values.
        """
        shapes = replace(sizes, guards=[]).dummy_shapes(rows, LARGEST_SIZE)
        inputs = {
            spec.name: torch.empty(shapes[spec.name], dtype=DTYPES[spec.dtype], device="meta") for spec in self._inputs
        }
        values = self._program.values(inputs)
        counts: dict[int, int] = {}  # by storage: the number of values that share it
        used = peak = sum(tensor.nbytes for tensor in inputs.values())
        for tensor in values:
            if tensor is not None:
                counts[_storage(tensor)] = 1  # inputs and weights stay in memory
        for step in self._program.steps:
            before = used
            try:
                with LargestResult() as inner:
                    if step.target != ASSERT:  # the largest sizes may not fulfil the conditions of the program
                        step.run(values, keep=True)
            except Exception as error:  # torch raises exceptions of many classes
                reason = str(error).strip().partition("\n")[0][:200]
                raise BadProgram(
                    f"the result size of {step.target!r} is not known from shapes alone: {reason}"
                ) from error
            for tensor in _tensors([values[slot] for slot in step.written]):
                counts[_storage(tensor)] = counts.get(_storage(tensor), 0) + 1
                used += tensor.untyped_storage().nbytes() if counts[_storage(tensor)] == 1 else 0
            peak = max(peak, used, before + inner.bytes)
            for tensor in _tensors([values[slot] for slot in step.dead]):
                counts[_storage(tensor)] -= 1
                used -= tensor.untyped_storage().nbytes() if counts[_storage(tensor)] == 0 else 0
            step.free(values)
        return peak


class LargestResult(TorchDispatchMode):
    """Records the size of the largest tensor that an operator creates, as a result or internally."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(item: Any) -> Iterable[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for each in item:
            yield from _tensors(each)


def check_archived(version: Version) -> None:
    """Check that the service can load a version of an archive, and that its runs fit into memory. Raises StoreError."""
    check_memory(version)
    check_loading(version)


def check_memory(version: Version) -> None:
    """Check that the runs of a version fit into ``MAX_RUN_BYTES``. Another machine has imported this version.

    Only exported programs are checked, because onnxruntime itself limits the memory of ONNX models.

    Raises:
        StoreError: the network is invalid, or its runs may need more than ``MAX_RUN_BYTES``.
    """
    if version.card.kind != "exported-program":
        return
    version.network()  # checks the sizes and the graph
    sizes = ImportedSizes(**version.card.sizes)
    inputs = [InputSpec(spec.name, spec.dtype, tuple(sizes.inputs.get(spec.name, ()))) for spec in version.card.inputs]
    if any(spec.dtype not in DTYPES or spec.name not in sizes.inputs for spec in inputs):
        raise BadProgram(f"{version.label}: the inputs do not fit the sizes")
    needed = MemoryLimit(version.tensors, inputs).peak_bytes(sizes, sizes.max_rows)
    if needed > MAX_RUN_BYTES:
        raise BadProgram(f"{version.label}: one run needs {needed:,} bytes of memory; the maximum is {MAX_RUN_BYTES:,}")
