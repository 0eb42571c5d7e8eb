"""Check and measure an imported network before it is published."""

from __future__ import annotations

import math
import platform
import re
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from app import store
from app.errors import BadValue
from app.importing.memory import MAX_RUN_BYTES
from app.importing.onnx_file import TYPES
from app.importing.pt2_graph import CHANGES_WEIGHTS, BadProgram, InputSpec
from app.networks.imported import TEST_SIZE, ImportedNetwork, ImportedSizes
from app.networks.imported.guards import broken_guard
from app.networks.imported.onnx_format import read_onnx
from app.networks.imported.onnx_network import MODEL
from app.store import TaskName, TensorSpec, Version
from app.tasks import TASKS, speed

TOLERANCE = 1e-4  # relative to the largest output: allowed difference of a row's output alone and in a batch
LOW_PRECISION_TOLERANCE = 2e-2  # the same if a weight or an output is in float16 or bfloat16
TEST_SIZES = (TEST_SIZE, 32, 64, 128, 256)  # tried in turn; a network may need images of at least 32 pixels
WIDE = 100  # largest integer in a second test of the rows, which a network may reject, for example as an index
MIDDLE_ROWS = 8  # a batch of this many rows is timed too, besides one row and a full batch

NamedArrays = dict[str, np.ndarray]  # tensors by name


@dataclass
class Draft:
    """A version that is not published yet. Its card is completed step by step.

    ``output_shapes`` are the shapes that the file declares for the outputs. A size that is no number varies.
    ``unbatched`` returns the sizes for the case that rows affect each other.
    """

    card: dict[str, Any]
    tensors: dict[str, Tensor]
    output_shapes: Mapping[str, Sequence[object]]
    unbatched: Callable[[], ImportedSizes]

    @classmethod
    def start(
        cls,
        kind: str,
        inputs: Sequence[InputSpec],
        sizes: ImportedSizes,
        versions: dict[str, str],
        tensors: dict[str, Tensor],
        output_shapes: Mapping[str, Sequence[object]],
        unbatched: Callable[[], ImportedSizes],
    ) -> Draft:
        """Return a draft with the part of the card that is known from the file."""
        versions = {"python": platform.python_version(), **versions}
        card = {"kind": kind, "inputs": list(map(_tensor_spec, inputs)), "sizes": asdict(sizes), "versions": versions}
        return cls(card, tensors, output_shapes, unbatched)

    def version(self) -> Version:
        """Return the version. Raises StoreError if the card is invalid, for example if the name is not allowed."""
        known = {"version": 1, "weights_sha256": ""}
        card = store.parse_card(store.card_text({**self.card, **known}), f"the card of {self.card['name']!r}")
        return Version(Path(card.name) / "1", card, self.tensors)

    def check(self, preferred_size: int | None = None) -> None:
        """Run the network on random inputs to find its outputs, and whether it computes each row independently.

        The varying dimensions have the size ``preferred_size`` or, if the network fails on it, one of ``TEST_SIZES``.

        Raises:
            BadProgram: the network fails on these inputs, changes its own weights, or is not deterministic.
        """
        self.card["outputs"] = []
        network = self.version().network()
        sizes = ImportedSizes(**self.card["sizes"])
        dtypes = {spec["name"]: spec["dtype"] for spec in self.card["inputs"]}

        def run(rows: int, size: int, seed: int, sizes: ImportedSizes = sizes) -> tuple[NamedArrays, NamedArrays]:
            shapes = sizes.dummy_shapes(rows, size)
            if guard := broken_guard(sizes.guards, shapes):
                raise BadProgram(
                    f"the shapes {_shape_texts(shapes)} do not fulfil the condition {guard} of the program"
                )
            return _run_on_random(network, shapes, dtypes, seed)

        rows = 2 if sizes.batched and sizes.max_rows > 1 else 1
        before = network.weight_versions()
        preferred = [preferred_size] if preferred_size else []
        size, (inputs, outputs) = _first_success(lambda size: run(rows, size, 0), sizes, [*preferred, *TEST_SIZES])
        self.card["sizes"]["test_size"] = size
        if network.weight_versions() != before:
            raise BadProgram(CHANGES_WEIGHTS)
        if not all(
            _same(output, other) for output, other in zip(outputs.values(), run(rows, size, 0)[1].values(), strict=True)
        ):
            raise BadProgram("two runs on the same input differ: the network draws random numbers; make them an input")
        low = self._has_low_precision() or any(output.dtype == np.float16 for output in outputs.values())
        tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE
        wide = partial(_random_arrays, sizes.dummy_shapes(rows, size), dtypes, 0, WIDE)
        if sizes.batched and not _are_independent(network, inputs, outputs, wide, rows, tolerance):
            self.card["sizes"] |= {"batched": False, "max_rows": 1, "ranges": self.unbatched().ranges}
        if self.card["kind"] == "onnx":
            self._limit_rows(lambda rows: run(rows, size, 0))
        other_rows, other_sizes = rows + 1 if rows > 1 else 1, _other_sizes(sizes, size)
        _, (_, others) = _first_success(  # the second size is for a network that reads only multiples of a number
            lambda other: run(other_rows, other, 1, other_sizes), other_sizes, [size + 1, 2 * size]
        )
        self.card["outputs"] = [
            {
                "name": name,
                "dtype": _output_type(name, output),
                "shape": self._output_shape(output.shape, others[name].shape, self.output_shapes[name]),
            }
            for name, output in outputs.items()
        ]

    def _output_shape(self, shape: Sequence[int], other: Sequence[int], declared: Sequence[object]) -> list[int]:
        """Return the shape of an output for the card, where -1 marks a varying size.

        ``shape`` and ``other`` are the shapes in two runs. If the sizes of a dimension are equal, it may still vary
        with input values. So a dimension that the file declares as varying is fixed only for a task, which needs
        the size, and only if the size is not 0. ``declared`` is the declared shape.
        """
        result = []
        for axis, sizes in enumerate(zip(shape, other, strict=True)):
            counts_rows = axis == 0 and self.card["sizes"]["batched"]
            fixed = len(declared) == len(shape) and isinstance(declared[axis], int)
            needed = self.card["task"] != "infer" and sizes[0] > 0
            result.append(sizes[0] if sizes[0] == sizes[1] and not counts_rows and (fixed or needed) else -1)
        return result

    def _has_low_precision(self) -> bool:
        """Return whether a weight is float16 or bfloat16. Results then have rounding errors of this type."""
        if self.card["kind"] == "onnx":
            return read_onnx(self.tensors[MODEL].numpy().data).low_precision
        return any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in self.tensors.values())

    def _limit_rows(self, run: Callable[[int], object]) -> None:
        """Reduce ``max_rows`` until a run succeeds, because onnxruntime limits the memory of a run."""
        sizes = self.card["sizes"]
        while (rows := min(sizes["max_rows"], speed.ROWS)) > 1:
            try:
                run(rows)
                return
            except BadProgram:
                sizes["max_rows"] = rows // 2

    def measure(self, task: TaskName) -> None:
        """Measure speed, latency of batches, and memory, all on one thread. Write the results to the card.

        Raises:
            StoreError: the network does not fit the task.
            BadProgram: the network fails on the inputs of the task, or on a full batch.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._measure(task)
        except BadValue as error:
            raise BadProgram(str(error)) from error
        finally:
            torch.set_num_threads(threads)

    def _measure(self, task: TaskName) -> None:
        weights = sum(tensor.nbytes for tensor in self.tensors.values()) / 2**20  # they are already in memory
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which includes reading and checking
        before = _peak_mib()
        predictor = TASKS[task].load(self.version(), torch.device("cpu"))
        measured = self.card["speed"] = speed.measure(predictor, speed.processor())
        middle = speed.median_seconds(partial(predictor.dummy_run, MIDDLE_ROWS))
        milliseconds = {
            1: measured["milliseconds"],
            MIDDLE_ROWS: 1000 * middle,
            measured["rows"]: 1000 * measured["rows"] / measured["per_second"],
        }
        for rows, value in milliseconds.items():
            split = f"{speed.processor()}, one thread"
            self._add_metric(f"milliseconds_for_{rows}_rows", speed.round_figure(value), split, 3)
        self._add_metric("memory_mib", round(_peak_mib() - before + weights), "network and batch of 64", 0)

    def _add_metric(self, name: str, value: float, split: str, decimals: int) -> None:
        self.card["metrics"][name] = {"value": value, "split": split, "decimals": decimals}


def _output_type(name: str, output: np.ndarray) -> str:
    """Return the type of an output for the card. Raises BadProgram if clients cannot receive this type."""
    dtype = "string" if output.dtype.kind in "OU" else str(output.dtype)
    if dtype not in (types := TYPES.values()):
        raise BadProgram(f"output {name!r} is of type {dtype}; allowed types: {', '.join(types)}")
    return dtype


def _tensor_spec(spec: InputSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape).model_dump()


T = TypeVar("T")


def _first_success(run: Callable[[int], T], sizes: ImportedSizes, candidates: Iterable[int]) -> tuple[int, T]:
    """Return the first of the sizes ``candidates`` for which ``run`` succeeds, and its result.

    Raises BadProgram, the error of the first run, if all fail. Its message has the sizes tried if there are several.
    Sizes that give the same shapes are tried only once.
    """
    error: BadProgram | None = None
    tried: dict[int, dict[str, list[int]]] = {}
    for size in candidates:
        if (shapes := sizes.dummy_shapes(1, size)) in tried.values():
            continue
        tried[size] = shapes
        try:
            return size, run(size)
        except BadProgram as failure:
            error = error or failure
    assert error
    if len(tried) < 2:
        raise error
    hint = "if some of them cannot vary, state their sizes in the file"
    raise BadProgram(f"{error}; tried the sizes {', '.join(map(str, tried))} for all varying dimensions: {hint}")


def _other_sizes(sizes: ImportedSizes, size: int) -> ImportedSizes:
    """Return ``sizes`` with smaller ranges, so that a run with ``size + 1`` differs from a run with ``size``.

    If both sizes are outside the range, both runs would otherwise use the same limit of the range.
    """
    ranges = {
        symbol: [min(low + 1, high) if low > size else low, max(high - 1, low) if high <= size else high]
        for symbol, (low, high) in sizes.ranges.items()
    }
    return replace(sizes, ranges=ranges)


def _run_on_random(
    network: ImportedNetwork, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str], seed: int
) -> tuple[NamedArrays, NamedArrays]:
    """Run a network on random inputs of these shapes, and return the inputs and the outputs.

    Raises BadProgram if the network fails, or if the inputs need more than ``MAX_RUN_BYTES``.
    """
    texts = _shape_texts(shapes)
    if sum(math.prod(shape) * _numpy_type(dtypes[name]).itemsize for name, shape in shapes.items()) > MAX_RUN_BYTES:
        raise BadProgram(f"inputs of the shapes {texts} need too much memory; the maximum is {MAX_RUN_BYTES:,} bytes")
    arrays = _random_arrays(shapes, dtypes, seed)
    try:
        return arrays, network.run({name: array.copy() for name, array in arrays.items()})  # it may change them
    except Exception as error:
        raise BadProgram(f"the network fails on inputs of the shapes {texts}: {str(error)[:300]}") from error


def _shape_texts(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _numpy_type(dtype: str) -> np.dtype:
    return np.dtype(object if dtype == "string" else dtype)


def _random_arrays(
    shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str], seed: int, largest: int = 1
) -> NamedArrays:
    """Return random inputs. Floats are normally distributed.

    Other values are 0 to ``largest``. By default, they are 0 or 1, to serve as indices or texts.
    """
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, np.float32).astype(dtypes[name], copy=False)
        if dtypes[name].startswith("float")
        else generator.integers(0, largest + 1, shape, np.uint8).astype(_numpy_type(dtypes[name]), copy=False)
        for name, shape in shapes.items()
    }


def _same(output: np.ndarray, other: np.ndarray) -> bool:
    return output.shape == other.shape and np.array_equal(output, other, equal_nan=output.dtype.kind in "fc")


def _are_independent(
    network: ImportedNetwork,
    inputs: NamedArrays,
    outputs: NamedArrays,
    wide: Callable[[], NamedArrays],
    rows: int,
    tolerance: float,
) -> bool:
    """Return whether each row of a batch has the output of a run on this row alone.

    Besides ``inputs``, this is tested with equal rows, and with the inputs ``wide()``. If the network fails on these
    other inputs, they are not tested.
    """
    tests = [(inputs, outputs)]
    for other in ({name: np.repeat(array[:1], rows, axis=0) for name, array in inputs.items()}, wide()):
        with suppress(Exception):  # torch raises exceptions of many classes
            tests.append((other, network.run({name: array.copy() for name, array in other.items()})))
    return all(_computes_rows(network.run, *test, rows, tolerance) for test in tests)


def _computes_rows(
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    rows: int,
    tolerance: float,
) -> bool:
    """Return whether each row of ``outputs`` equals the output of a run on that input row alone.

    Differences may be up to ``tolerance``, relative to the largest output.
    """
    for row in range(rows):
        try:
            single = run({name: array[row : row + 1] for name, array in inputs.items()})
        except Exception:  # torch raises exceptions of many classes
            return False
        for name, output in outputs.items():
            if output.ndim < 1 or len(output) != rows or single[name].shape != (1, *output.shape[1:]):
                return False
            if output.dtype.kind not in "fc":
                if not np.array_equal(single[name][0], output[row]):
                    return False
                continue
            largest = float(np.abs(output[np.isfinite(output)]).max(initial=0))
            if not np.allclose(
                single[name][0], output[row], tolerance, tolerance * max(largest, 1e-30), equal_nan=True
            ):
                return False
    return True


def _peak_mib() -> float:
    """Return the peak memory of this process in MiB, since its start or since the last reset by ``clear_refs``."""
    with suppress(OSError):
        if match := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(match[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # a child process starts with its parent's peak
