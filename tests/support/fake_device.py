"""A PyTorch device that stands in for a GPU in tests on machines without a GPU.

The tensors of the device are in the memory of the CPU, but PyTorch treats them as tensors of another device. As on a
GPU, an operator rejects a mixture of CPU tensors and device tensors, and NumPy cannot read device tensors. The device
is PyTorch's ``PrivateUse1`` backend, implemented in Python. Each device tensor holds a CPU tensor, and operators
compute with these CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "standin"
aten = torch.ops.aten
create_tensor = torch.tensor
COPIES = {aten._to_copy.default, aten.copy_.default}  # operators that copy between devices
# Operators with an argument of indices -> position of this argument
INDEXED = {aten.index.Tensor: 1, aten.index_put_.default: 1, aten.index_put.default: 1}


class DeviceTensor(Tensor):
    """A tensor of the device; ``data_on_cpu`` holds its values."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data_on_cpu: Tensor) -> DeviceTensor:
        result = Tensor._make_wrapper_subclass(
            cls,
            data_on_cpu.shape,
            strides=data_on_cpu.stride(),
            storage_offset=data_on_cpu.storage_offset(),
            dtype=data_on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        result.data_on_cpu = data_on_cpu
        return cast(DeviceTensor, result)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.data_on_cpu!r})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(create_tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(create_tensor(index) if isinstance(index, list) else index, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = self.detach().cpu(), self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Make modules replace these parameters as a whole, because ``param.data = ...`` ignores ``data_on_cpu``."""
        return ["data_on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], context: None, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(tensors["data_on_cpu"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        return fake_device.compute(operator, arguments, named or {})


class Backend(_DummyBackendModule):
    """The functions of a device module that torch calls. ``torch.autocast`` is allowed, and changes no type."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Return an empty state, because random numbers come from the CPU's generator."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Do nothing; see ``get_rng_state``."""


class FakeDevice:
    """The device.

    ``copies_to_cpu`` counts the tensors that were copied to the CPU, and the numbers that were read. A test replaces
    ``before_operator`` to make operators fail.
    """

    def __init__(self) -> None:
        self.copies_to_cpu = 0
        self.operators = 0
        self._library: torch.library.Library | None = None  # removes its operators when it is deleted

    def register(self) -> None:
        """Register the device in torch. Torch must know all devices before it computes the first gradient."""
        _setup_privateuseone_for_python_backend(NAME, Backend())
        self._library = torch.library.Library("_", "IMPL")
        self._library.fallback(self._create, "PrivateUse1")
        self._library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    @contextmanager
    def enabled(self) -> Iterator[torch.device]:
        """Yield the device. Its counts of operators and copies start at 0."""
        self.copies_to_cpu = self.operators = 0
        try:
            with patch.object(torch, "tensor", _tensor):
                yield torch.device(NAME, 0)
        finally:
            vars(self).pop("before_operator", None)

    def before_operator(self, operator: Any) -> None:
        """This method is called before each operator. A test may replace it."""

    def _create(self, operator: Any, *arguments: Any, **named: Any) -> Any:
        """Compute an operator that creates a tensor on the device, such as ``aten.empty``."""
        return self.compute(operator, arguments, named)

    def compute(self, operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Compute an operator on the device. Raises RuntimeError for tensors of several devices."""
        self.before_operator(operator)
        self.operators += 1
        own = [value for value in leaves((arguments, named)) if isinstance(value, DeviceTensor)]
        if own and operator not in COPIES:
            _check_devices(operator, arguments, named)
        to_cpu = torch.device(named["device"]).type == "cpu" if named.get("device") is not None else False
        on_cpu = OPERATORS.get(operator, operator)
        result = on_cpu(*map_leaves(_on_cpu, arguments), **map_leaves(_on_cpu, named))
        if torch.Tag.inplace_view in operator.tags:  # such as transpose_: also change the shape of the device tensor
            with no_dispatch():
                operator(*arguments, **named)
            return arguments[0]
        if operator is aten._local_scalar_dense.default or operator is aten.equal.default:
            self.copies_to_cpu += 1
        if operator is aten.copy_.default:
            self.copies_to_cpu += isinstance(arguments[1], DeviceTensor) and not isinstance(arguments[0], DeviceTensor)
            return arguments[0]
        if to_cpu:
            self.copies_to_cpu += bool(own)
            return result.clone() if any(result is value.data_on_cpu for value in own) else result
        known = {id(value.data_on_cpu): value for value in own}  # operators that return one of their arguments
        inference = torch.is_inference_mode_enabled()
        if operator.is_view:  # a view is an inference tensor only if its base is one
            inference = inference and all(value.is_inference() for value in own)

        def on_device(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) in known:
                return known.get(id(value), value)
            with torch.inference_mode(inference):
                return DeviceTensor(value)

        return map_leaves(on_device, result)


def _tensor(data: Any, *, device: Any = None, **named: Any) -> Tensor:
    """Replace ``torch.tensor``, which would write to the memory of the device without an operator."""
    result = create_tensor(data, **named)
    return result if device is None else result.to(device)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists, tuples and dictionaries. torch's functions for this are slower."""
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    else:
        yield value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Call ``function`` for the values in nested lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple)):
        return type(value)([map_leaves(function, each) for each in value])
    if isinstance(value, dict):
        return {key: map_leaves(function, each) for key, each in value.items()}
    return function(value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.data_on_cpu
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _check_devices(operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raise RuntimeError if an argument is a CPU tensor, as a GPU does. Numbers and indices may be on the CPU."""
    index = INDEXED.get(operator)
    checked = [value for position, value in enumerate(arguments) if position != index]
    scalars_allowed = torch.Tag.pointwise in operator.tags or index is not None
    for value in leaves((checked, named)):
        if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) and (value.dim() or not scalars_allowed):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
                f"({operator})"
            )


def _fused_lstm_cell(
    inputs: Tensor, hidden: Tensor, cell: Tensor, input_bias: Tensor | None, hidden_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``aten._thnn_fused_lstm_cell``, which only GPUs have.

    Return the new hidden state, the new cell state and the four gates.
    """
    gates = inputs + hidden
    if input_bias is not None and hidden_bias is not None:
        gates = gates + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * cell + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def _fused_lstm_cell_backward(
    of_hidden: Tensor | None, of_cell: Tensor | None, before: Tensor, after: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``_fused_lstm_cell`` with respect to the gates, the cell state and the biases."""
    i, f, g, o = gates.chunk(4, 1)
    of_hidden = torch.zeros_like(after) if of_hidden is None else of_hidden
    squashed = after.tanh()
    of_after = of_hidden * o * (1 - squashed**2) + (0 if of_cell is None else of_cell)
    parts = [
        of_after * g * i * (1 - i),
        of_after * before * f * (1 - f),
        of_after * i * (1 - g**2),
        of_hidden * squashed * o * (1 - o),
    ]
    of_gates = torch.cat(parts, 1)
    return of_gates, of_after * f, of_gates.sum(0) if has_bias else of_gates.new_zeros(0)


OPERATORS = {
    aten._thnn_fused_lstm_cell.default: _fused_lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _fused_lstm_cell_backward,
}
fake_device = FakeDevice()
fake_device.register()
