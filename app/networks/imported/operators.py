"""The operators that an imported program may call. All other operators are rejected.

The list leaves out operators that

- read or write files: ``aten.from_file``, ``aten.save``;
- return uninitialised memory, or do not check sizes in their arguments: ``aten.set_``, ``aten.resize_``,
  ``aten._fft_c2r``;
- have results whose size depends on values: ``aten.nonzero``, ``aten.item``;
- are custom, because their native code comes from outside PyTorch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.cnn import SMALL_BATCH, max_pool

POINTWISE = """__and__ __or__ __xor__ abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip
clone complex contiguous copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1 floor
floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh
heaviside hypot imag isclose isfinite isinf isnan le leaky_relu lerp less less_equal lgamma log log10 log1p log2
log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum
mish mul multiply nan_to_num ne neg negative not_equal polar positive pow prelu rad2deg real reciprocal relu relu6
remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit
special_expm1 special_log1p sqrt square sub subtract tan tanh threshold true_divide trunc view_as_complex
view_as_real where xlogy"""
REDUCTIONS = """all amax amin aminmax any argmax argmin count_nonzero cummax cummin cumprod cumsum linalg_norm
linalg_vector_norm log_softmax _log_softmax logcumsumexp logsumexp max mean median min nanmean nansum norm prod softmax
_softmax std std_mean sum var var_mean"""
SHAPES = """alias argsort atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to bucketize cat channel_shuffle
chunk column_stack concat concatenate copy copy_ detach detach_ diag_embed diagonal diff dstack expand expand_as fill
flatten flip fliplr flipud gather hsplit hstack index index_add index_copy index_fill index_put index_select lift_fresh
lift_fresh_copy masked_scatter meshgrid movedim moveaxis narrow numpy_T mT permute pixel_shuffle pixel_unshuffle
ravel repeat reshape reshape_as resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce searchsorted
select select_scatter slice slice_scatter sort split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim
tensor_split tile to _to_copy topk transpose tril triu type_as unbind unflatten unfold unsqueeze _unsafe_view view
view_as vsplit vstack zero_"""
CREATION = """arange eye full full_like hann_window linspace new_full new_ones new_zeros ones ones_like scalar_tensor
tril_indices triu_indices zeros zeros_like"""
LAYERS = """adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv affine_grid_generator alpha_dropout
avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bmm cdist col2im constant_pad_nd conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot dropout einsum embedding
feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_ifft fft_ifft2 fft_irfft fft_irfft2 fft_rfft fft_rfft2
grid_sampler grid_sampler_2d group_norm gru gru_cell im2col instance_norm layer_norm linalg_cross linear
lstm lstm_cell matmul max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices mm mv
native_layer_norm outer pad pairwise_distance reflection_pad1d
reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d rms_norm rnn_relu rnn_relu_cell
rnn_tanh rnn_tanh_cell scaled_dot_product_attention tensordot upsample_bicubic2d upsample_bilinear2d upsample_linear1d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d vdot"""
SYMBOLIC = ("sym_numel", "sym_size", "sym_stride", "sym_storage_offset")
ATEN = frozenset((*" ".join((POINTWISE, REDUCTIONS, SHAPES, CREATION, LAYERS)).split(), *SYMBOLIC))
INTEGER_LIMIT = 2**63  # a larger integer is not a valid size, and its powers would take all memory

ASSERT = "aten._assert_scalar.default"  # a condition on sizes, without a result

Operator = Callable[..., Any]


def _bounded(function: Operator) -> Operator:
    """Return ``function`` with checks that its arguments are numbers and its result is below INTEGER_LIMIT."""

    def compute(*values: float) -> float:
        if any(isinstance(value, Tensor) for value in values):
            raise ValueError("an operator for sizes got a tensor")
        result = function(*values)
        if abs(result) >= INTEGER_LIMIT:
            raise ValueError("a size has more than 63 bits")
        return result

    return compute


SIZES: dict[str, Operator] = {
    **{
        f"_operator.{name}": _bounded(getattr(operator, name))
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"_operator.{name}": _bounded(getattr(operator, name)) for name in ("and_", "or_", "not_")},
    **{f"math.{name}": _bounded(getattr(math, name)) for name in ("ceil", "floor", "trunc")},
    "torch.sym_max": _bounded(max),
    "torch.sym_min": _bounded(min),
    "torch.sym_not": _bounded(operator.not_),
    "torch.sym_int": _bounded(int),
    "torch.sym_float": _bounded(float),
}
SMALL_KERNEL = 4096  # values; for smaller kernels, matrix products are faster, see ``app.networks.cnn.conv2d``


def _max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Compute ``aten.max_pool2d``. For pooling by 2, use ``max_pool``, which is faster."""
    plain = padding in (0, [0], [0, 0]) and dilation in (1, [1], [1, 1]) and not ceil_mode
    if plain and x.dim() == 4 and kernel_size in ([2, 2], [2]) and (stride or kernel_size) in ([2, 2], [2]):
        return max_pool(x)
    return F.max_pool2d(x, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Compute ``aten.conv2d``. For few images and a small kernel, use matrix products."""
    small = input.shape[0] <= SMALL_BATCH and weight.numel() <= SMALL_KERNEL and input.dim() == 4
    if not small or groups != 1 or dilation not in (1, [1], [1, 1]) or not _runs_on_cpu(input):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return torch.ops.aten.thnn_conv2d(input, weight, weight.shape[2:], bias, _pair(stride), _pair(padding))


def _runs_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def _pair(size: Any) -> Any:
    return [size, size] if isinstance(size, int) else size if len(size) == 2 else [size[0], size[0]]


def _one_hot(indices: Tensor, classes: int = -1) -> Tensor:
    if classes < 0:
        raise ValueError("one_hot has no number of classes, so its size would depend on the values")
    return F.one_hot(indices, classes)


def _native_group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float) -> Any:
    """Compute ``aten.native_group_norm``, but check the sizes, which the original operator does not check."""
    return F.group_norm(x, groups, weight, bias, eps), x.new_zeros(0), x.new_zeros(0)


def _native_batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    """Compute batch norm in evaluation mode, but check the sizes, which the original operator does not check."""
    return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps), x.new_zeros(0), x.new_zeros(0)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``aten._weight_norm``, but check the size of ``g``, which the original operator does not check."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _safe_division(name: str, overload: str) -> Operator:
    """Return a division that checks for an overflow of integers, which would end the process."""
    function = getattr(getattr(torch.ops.aten, name), overload)._op

    def divide(x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Any:
        kind = torch.result_type(x, y)
        checked = rounding_mode == "trunc" and kind in (torch.int32, torch.int64) and not x.is_meta
        if checked and ((x == torch.iinfo(kind).min) & (y == -1)).any():
            raise ValueError(f"the smallest {str(kind).removeprefix('torch.')} was divided by -1")
        return function(x, y, rounding_mode=rounding_mode)

    return divide


def _assert_scalar(condition: Any, message: str) -> tuple[()]:
    """Raise ValueError if a condition on sizes is false."""
    if isinstance(condition, Tensor):
        raise ValueError("an operator for sizes got a tensor")
    if not condition:
        raise ValueError(f"the program does not allow these sizes: {message}")
    return ()


REPLACED: dict[str, Operator] = {
    ASSERT: _assert_scalar,
    "aten.conv2d.default": _conv2d,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.one_hot.default": _one_hot,
    "aten._weight_norm.default": _weight_norm,
    "aten.native_group_norm.default": _native_group_norm,
    "aten._native_batch_norm_legit_no_training.default": _native_batch_norm,
    **{
        f"aten.{name}.{overload}": _safe_division(name, overload)
        for name in ("div", "div_", "divide", "divide_")
        for overload in ("Tensor_mode", "Scalar_mode")
    },
    "aten.empty.memory_format": torch.zeros,  # never uninitialised memory
    "aten.empty_like.default": torch.zeros_like,
}

CREATING = frozenset(  # operators that make a tensor from numbers, on the device in their arguments
    f"aten.{name}.{overload}"
    for name in [
        "arange",
        "empty",
        "eye",
        "full",
        "hann_window",
        "linspace",
        "ones",
        "scalar_tensor",
        "tril_indices",
        "triu_indices",
        "zeros",
    ]
    for overload in getattr(torch.ops.aten, name).overloads()
)


def find_operator(target: str) -> Operator:
    """Return the operator named ``target``, such as ``aten.add.Tensor``. Raises ValueError if it is not allowed."""
    if function := REPLACED.get(target) or SIZES.get(target):
        return function
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or not {name, name.removesuffix("_")} & ATEN or "out" in overload:
        raise ValueError(f"operator {target!r} is not allowed")
    resolved: Any = getattr(getattr(torch.ops.aten, name, None), overload, None)
    is_overload = isinstance(resolved, torch._ops.OpOverload)
    results = {str(result.type) for result in resolved._schema.returns} if is_overload else set()
    known = results and results <= {"Tensor", "List[Tensor]"}  # other overloads are for TorchScript's lists and texts
    if not is_overload or not (known or name in SYMBOLIC):
        raise ValueError(f"operator {target!r} is not known")
    return resolved if name in SYMBOLIC else resolved._op  # the operator in C++, without a Python function around it
