"""Run an ONNX model on random inputs to find out how the service may run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from app.importing.files import BadModel
from app.networks.imported import ANY, TEST_SIZE, ImportedSizes, Shape
from app.networks.imported.onnx_runner import OnnxRunner
from app.store import TensorSpec
from app.tasks import speed

TOLERANCE = 1e-4  # relative to the largest output: allowed difference of a row's output alone and in a batch
LOW_PRECISION_TOLERANCE = 2e-2  # the same if a weight or an output is in float16 or bfloat16
TEST_SIZES = (TEST_SIZE, 32, 64, 128, 256)  # tried in turn; a network may need images of at least 32 pixels
WIDE = 100  # largest integer in a second test of the rows, which a network may reject, for example as an index
MAX_ROWS = 1024  # largest number of rows of a batch

NamedArrays = dict[str, np.ndarray]  # tensors by name


@dataclass
class Examiner:
    """Examines a model whose inputs have the shapes ``inputs``.

    ``size`` is the preferred size of varying dimensions. If ``fixed`` is true, the sizes of outputs in the test run are
    those on the card, because the task needs them.
    """

    runner: OnnxRunner
    inputs: dict[str, Shape]
    size: int | None
    fixed: bool

    def examine(self) -> tuple[ImportedSizes, list[TensorSpec]]:
        """Return the sizes and the outputs of the model. The first dimension is the batch dimension if it may be.

        Raises:
            BadModel: the network fails on random inputs, or is not deterministic.
        """
        first = {shape[0] if shape else 0 for shape in self.inputs.values()}
        others = {size for shape in self.inputs.values() for size in shape[1:]}
        # A size in two dimensions may be the number of nodes of a graph, with a row and a column for each node. Some
        # exporters, such as tf2onnx, give the batch dimension another name in each input.
        if all(isinstance(size, str) for size in first) and not (first - {ANY}) & others:
            with suppress(BadModel):
                return self._examine(batched=True)
        return self._examine(batched=False)

    def _examine(self, batched: bool) -> tuple[ImportedSizes, list[TensorSpec]]:
        inputs = {name: [ANY, *shape[1:]] if batched else shape for name, shape in self.inputs.items()}
        sizes, arrays, outputs = self._first_run(ImportedSizes(inputs, batched, 1))
        again = self._run(arrays)
        if not all(np.array_equal(output, again[name], output.dtype.kind == "f") for name, output in outputs.items()):
            raise BadModel("two runs on the same input differ: the network draws random numbers; make them an input")
        if batched:
            if not self._has_independent_rows(arrays, outputs):
                raise BadModel("the rows of a batch affect each other")
            sizes = replace(sizes, max_rows=self._max_rows(sizes))
        specs = []
        for name, output in outputs.items():
            dtype, declared = self.runner.outputs[name]
            known = [self.fixed or each in declared[axis : axis + 1] for axis, each in enumerate(output.shape)]
            shape = [each if is_known and each else -1 for each, is_known in zip(output.shape, known, strict=True)]
            specs.append(TensorSpec(name=name, dtype=dtype, shape=[-1, *shape[1:]] if batched else shape))
        return sizes, specs

    def _first_run(self, sizes: ImportedSizes) -> tuple[ImportedSizes, NamedArrays, NamedArrays]:
        """Run the network with the first size of varying dimensions for which it succeeds.

        Returns the sizes with this size, the inputs and the outputs. Raises BadModel, the error of the first run, if
        all sizes fail.
        """
        varies = any(isinstance(size, str) for shape in sizes.inputs.values() for size in shape[sizes.batched :])
        errors = []
        for size in [*([self.size] if self.size else []), *TEST_SIZES][: None if varies else 1]:
            sizes = replace(sizes, test_size=size)
            arrays = self._random(sizes.dummy_shapes(2))
            try:
                return sizes, arrays, self._run(arrays)
            except BadModel as error:
                errors.append(error)
        tried = f"{self.size}, " * bool(self.size) + ", ".join(map(str, TEST_SIZES))
        hint = "if some of them cannot vary, state their sizes in the file"
        raise BadModel(f"{errors[0]}" + f"; tried the sizes {tried} for all varying dimensions: {hint}" * varies)

    def _run(self, arrays: NamedArrays) -> NamedArrays:
        """Return the outputs. Raises BadModel if the network fails."""
        try:
            return self.runner.run(arrays)
        except RuntimeError as error:
            texts = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise BadModel(f"the network fails on inputs of the shapes {texts}: {str(error)[:300]}") from error

    def _random(self, shapes: Mapping[str, Sequence[int]], largest: int = 1) -> NamedArrays:
        """Return normally distributed floats. Other values are 0 to ``largest``, to serve as indices or texts."""
        generator, arrays = np.random.default_rng(0), {}
        for name, shape in shapes.items():
            dtype = self.runner.inputs[name].dtype
            if dtype.startswith("float"):
                arrays[name] = generator.standard_normal(shape, np.float32).astype(dtype)
            else:
                values = generator.integers(0, largest + 1, shape, np.uint8)
                arrays[name] = values.astype(str).astype(object) if dtype == "string" else values.astype(dtype)
        return arrays

    def _max_rows(self, sizes: ImportedSizes) -> int:
        """Return the largest number of rows, up to a full batch, for which the memory is sufficient."""
        rows: int = speed.ROWS
        while rows > 1:
            with suppress(BadModel):
                self._run(self._random(sizes.dummy_shapes(rows)))
                return MAX_ROWS if rows == speed.ROWS else rows
            rows //= 2
        return rows

    def _has_independent_rows(self, arrays: NamedArrays, outputs: NamedArrays) -> bool:
        """Return whether each row of a batch has the output of a run on this row alone.

        Besides ``arrays``, this is tested with equal rows, and with larger integers. If the network fails on these
        other inputs, they are not tested.
        """
        low = self.runner.content.low_precision or any(output.dtype == np.float16 for output in outputs.values())
        tests = [(arrays, outputs)]
        equal = {name: np.repeat(array[:1], len(array), axis=0) for name, array in arrays.items()}
        for other in (equal, self._random({name: array.shape for name, array in arrays.items()}, WIDE)):
            with suppress(BadModel):
                tests.append((other, self._run(other)))
        return all(self._computes_rows(*test, LOW_PRECISION_TOLERANCE if low else TOLERANCE) for test in tests)

    def _computes_rows(self, arrays: NamedArrays, outputs: NamedArrays, tolerance: float) -> bool:
        """Return whether each row of ``outputs`` equals the output of a run on that input row alone."""
        rows = len(next(iter(arrays.values())))
        for row in range(rows):
            single = self._run({name: array[row : row + 1] for name, array in arrays.items()})
            for name, output in outputs.items():
                if output.ndim < 1 or len(output) != rows or single[name].shape != (1, *output.shape[1:]):
                    return False
                if output.dtype.kind != "f":
                    if not np.array_equal(single[name][0], output[row]):
                        return False
                    continue
                largest = float(np.abs(output[np.isfinite(output)]).max(initial=1e-30))
                if not np.allclose(single[name][0], output[row], tolerance, tolerance * largest, equal_nan=True):
                    return False
        return True
