"""Run an ONNX model on random inputs to find out how the service may run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
MAX_INPUT_BYTES = 2**30

NamedArrays = dict[str, np.ndarray]  # tensors by name


@dataclass
class Examiner:
    """Examines a model whose inputs have the shapes ``inputs``.

    ``size`` is the preferred size of varying dimensions. If ``fixed`` is true, a dimension of an output whose size does
    not vary in the test runs is a number on the card, because the task needs it.
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
        if self._may_have_batches():
            with suppress(BadModel):
                return self._examine(batched=True)
        return self._examine(batched=False)

    def _may_have_batches(self) -> bool:
        """Return whether the first dimension of all inputs varies, and no other dimension has the same name.

        An example of such another dimension is the number of nodes of a graph, for which one input has a row for each
        node, and another has a row and a column for each node. Some exporters, such as tf2onnx, give the batch
        dimension another name in each input.
        """
        first = {shape[0] if shape else 0 for shape in self.inputs.values()}
        others = {size for shape in self.inputs.values() for size in shape[1:]}
        return all(isinstance(size, str) for size in first) and not (first - {ANY}) & others

    def _examine(self, batched: bool) -> tuple[ImportedSizes, list[TensorSpec]]:
        first = [ANY] if batched else []
        sizes = ImportedSizes({name: [*first, *shape[len(first) :]] for name, shape in self.inputs.items()}, batched, 1)
        rows = 2 if batched else 1
        candidates = [*([self.size] if self.size else []), *TEST_SIZES]
        test_size, (arrays, outputs) = _first_success(
            lambda size: self._run(sizes.dummy_shapes(rows, size)), sizes, candidates
        )
        shapes = sizes.dummy_shapes(rows, test_size)
        again = self._run(shapes)[1]
        if not all(_same(output, again[name]) for name, output in outputs.items()):
            raise BadModel("two runs on the same input differ: the network draws random numbers; make them an input")
        if batched and not self._has_independent_rows(arrays, outputs, shapes):
            raise BadModel("the rows of a batch affect each other")
        max_rows = MAX_ROWS if batched else 1
        while (most := min(max_rows, speed.ROWS)) > 1:  # onnxruntime limits the memory of a run
            try:
                self._run(sizes.dummy_shapes(most, test_size))
                break
            except BadModel:
                max_rows = most // 2
        _, (_, others) = _first_success(  # the second size is for a network that reads only multiples of a number
            lambda size: self._run(sizes.dummy_shapes(rows + batched, size), seed=1),
            sizes,
            [test_size + 1, 2 * test_size],
        )
        specs = [self._output(name, output, others[name].shape, batched) for name, output in outputs.items()]
        return replace(sizes, max_rows=max_rows, test_size=test_size), specs

    def _run(self, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> tuple[NamedArrays, NamedArrays]:
        """Run the network on random inputs, and return the inputs and the outputs. Raises BadModel if it fails."""
        texts = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        if sum(math.prod(shape) for shape in shapes.values()) * 8 > MAX_INPUT_BYTES:
            raise BadModel(
                f"inputs of the shapes {texts} need too much memory; the maximum is {MAX_INPUT_BYTES:,} bytes"
            )
        arrays = self._random(shapes, seed)
        try:
            return arrays, self.runner.run(arrays)
        except RuntimeError as error:
            raise BadModel(f"the network fails on inputs of the shapes {texts}: {str(error)[:300]}") from error

    def _random(self, shapes: Mapping[str, Sequence[int]], seed: int, largest: int = 1) -> NamedArrays:
        """Return normally distributed floats. Other values are 0 to ``largest``, to serve as indices or texts."""
        generator = np.random.default_rng(seed)
        arrays = {}
        for name, shape in shapes.items():
            dtype = self.runner.inputs[name].dtype
            is_float = dtype.startswith("float")
            values = (
                generator.standard_normal(shape, np.float32) if is_float else generator.integers(0, largest + 1, shape)
            )
            arrays[name] = values.astype(str).astype(object) if dtype == "string" else values.astype(dtype)
        return arrays

    def _has_independent_rows(
        self, arrays: NamedArrays, outputs: NamedArrays, shapes: Mapping[str, Sequence[int]]
    ) -> bool:
        """Return whether each row of a batch has the output of a run on this row alone.

        Besides ``arrays``, this is tested with equal rows, and with larger integers. If the network fails on these
        other inputs, they are not tested.
        """
        low = self.runner.content.low_precision or any(output.dtype == np.float16 for output in outputs.values())
        tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE
        tests = [(arrays, outputs)]
        equal = {name: np.repeat(array[:1], len(array), axis=0) for name, array in arrays.items()}
        for other in (equal, self._random(shapes, 0, WIDE)):
            with suppress(RuntimeError):
                tests.append((other, self.runner.run(other)))
        with suppress(RuntimeError):
            return all(self._computes_rows(*test, tolerance) for test in tests)
        return False

    def _computes_rows(self, arrays: NamedArrays, outputs: NamedArrays, tolerance: float) -> bool:
        """Return whether each row of ``outputs`` equals the output of a run on that input row alone."""
        rows = len(next(iter(arrays.values())))
        for row in range(rows):
            single = self.runner.run({name: array[row : row + 1] for name, array in arrays.items()})
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

    def _output(self, name: str, output: np.ndarray, other: Sequence[int], batched: bool) -> TensorSpec:
        """Describe an output that has the shape ``other`` in another run. In its shape, -1 marks a varying size.

        If both sizes of a dimension are equal, it may still vary with input values. So the size is fixed only if the
        file declares it, or if the task needs it and it is not 0.
        """
        dtype, declared = self.runner.outputs[name]
        shape = []
        for axis, (size, second) in enumerate(zip(output.shape, other, strict=True)):
            known = len(declared) == output.ndim and isinstance(declared[axis], int)
            fixed = size == second and not (batched and axis == 0) and (known or (self.fixed and size > 0))
            shape.append(size if fixed else -1)
        return TensorSpec(name=name, dtype=dtype, shape=shape)


def _first_success(
    run: Callable[[int], tuple[NamedArrays, NamedArrays]], sizes: ImportedSizes, candidates: Iterable[int]
) -> tuple[int, tuple[NamedArrays, NamedArrays]]:
    """Return the first of the sizes ``candidates`` for which ``run`` succeeds, and its result.

    Raises BadModel, the error of the first run, if all fail. Its message has the sizes tried if there are several.
    Sizes that give the same shapes are tried only once.
    """
    error: BadModel | None = None
    tried: dict[int, dict[str, list[int]]] = {}
    for size in candidates:
        if (shapes := sizes.dummy_shapes(1, size)) in tried.values():
            continue
        tried[size] = shapes
        try:
            return size, run(size)
        except BadModel as failure:
            error = error or failure
    assert error
    if len(tried) < 2:
        raise error
    hint = "if some of them cannot vary, state their sizes in the file"
    raise BadModel(f"{error}; tried the sizes {', '.join(map(str, tried))} for all varying dimensions: {hint}")


def _same(output: np.ndarray, other: np.ndarray) -> bool:
    return output.shape == other.shape and np.array_equal(output, other, equal_nan=output.dtype.kind == "f")
