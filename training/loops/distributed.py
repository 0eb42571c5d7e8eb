"""Data-parallel training in several processes: ``torchrun --nproc-per-node 2 -m training.cnn --images ...``.

Each process draws the random numbers for the whole batch and trains on its shard of the batch. DistributedDataParallel
averages the gradients, and batch norms use the statistics of the whole batch. The result therefore equals the result of
a single process with the same batch, except for rounding. In a single process, these functions change nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
INTERRUPTED = 130  # exit status after Ctrl-C, 128 + SIGINT


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0. Process 0 writes files, prints and publishes."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(device: str) -> str:
    """Return the device of this process. If several processes use GPUs, each process has its own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and world_size() > 1 else device


def print_once(text: str) -> None:
    """Print ``text`` in the first process only. Bytes of file names that are not UTF-8 are printed as escapes."""
    if rank() == 0:
        print(text.encode(errors="backslashreplace").decode(), flush=True)


def initialize(device: str) -> None:
    """Connect to the other processes, if there are any, through gloo on CPUs and NCCL on GPUs."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")


def exit_process() -> None:
    """Exit with status 0 if there are several processes; otherwise return.

    Python's finalization is skipped, because threads of the process group may abort the process during the
    finalization. On two cores, this happened in 1 of 3 runs ("terminate called without an active exception"). Call this
    after all files are written.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run_command(main: Callable[[], None]) -> None:
    """Call ``main`` of a training command. Ctrl-C exits with status INTERRUPTED, and a message of the first process.

    If a network has returned values that are not finite, exit with a message.

    If there are several processes, Python's finalization is skipped, as in ``exit_process``. The process group is not
    destroyed, because that may wait for other processes.
    """
    try:
        main()
    except KeyboardInterrupt:
        if rank() == 0:
            print("\ninterrupted; the same command with --resume continues", file=sys.stderr)
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except ArithmeticError as error:
        if type(error) is not ArithmeticError:  # such as a division by zero, which is a defect of the code
            raise
        sys.exit(f"{error}: probably the training diverged; use a lower learning rate")


def from_rank_zero(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process and return its result in all processes."""
    if world_size() == 1:
        return make()
    objects: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(objects)
    result: T = objects[0]
    return result


def any_rank(claim: bool) -> bool:
    """Return whether ``claim`` is true in at least one process. All processes must call this at the same step."""
    if world_size() == 1:
        return claim
    claims = torch.tensor(int(claim))
    dist.all_reduce(claims, dist.ReduceOp.MAX)
    return bool(claims)


def shard(tensor: Tensor, dim: int = 0) -> Tensor:
    """Return this process's shard of a tensor: every ``world_size``-th entry along ``dim``.

    The length of the dimension must be divisible by the number of processes.
    """
    return tensor[(slice(None),) * dim + (slice(rank(), None, world_size()),)]


def gather(part: Tensor) -> Tensor:
    """Return the whole tensor, put together from the shards of all processes along the first dimension."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def divisible_batch(batch: int) -> int:
    """Return the largest batch size up to ``batch`` that is divisible by the number of processes.

    Each process gets at least one sample.
    """
    return max(1, batch // world_size()) * world_size()


def data_parallel(network: nn.Module) -> nn.Module:
    """Return a module that averages the gradients and batch norm statistics of a network over all processes.

    The loss must be a mean over this process's shard of the batch.
    """
    if world_size() == 1:
        return network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d  # keeps the tensors and their names
    return DistributedDataParallel(network)


def sum_over_ranks(part: Tensor) -> Tensor:
    """Return the sum of ``part`` over all processes, without gradient."""
    total = part.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


class NormalizeFunction(torch.autograd.Function):
    """Normalises a shard [N, C, H, W] with the mean and inverse deviation [1, C, 1, 1] of the whole batch.

    Mean and deviation depend on all shards, so each shard also affects the losses of the other processes. The backward
    pass therefore needs one sum over all processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        normed = (x - mean).mul_(scale)
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (normed, scale) = gradients, ctx.saved_tensors
        along = torch.stack([gradient.mean((0, 2, 3)), (gradient * normed).mean((0, 2, 3))])
        level, slope = (sum_over_ranks(along) / world_size()).view(2, 1, -1, 1, 1)
        return torch.addcmul(gradient - level, normed, slope, value=-1) * scale, None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the whole batch. It replaces PyTorch's SyncBatchNorm, which needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this process's shard [N, C, H, W] with the statistics of all shards."""
        if not self.training:
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        variance, mean = (own.double() for own in torch.var_mean(values.detach(), (0, 2, 3), correction=0))
        mean, square = sum_over_ranks(torch.stack([mean, variance + mean.square()])) / world_size()
        variance = square - mean.square()  # in double precision, because the terms may be nearly equal
        self._update_statistics(mean.to(values), variance.to(values), values[:, 0].numel() * world_size())
        scale = (variance + self.eps).rsqrt()
        normed: Tensor = NormalizeFunction.apply(values, *(own.to(values).view(1, -1, 1, 1) for own in (mean, scale)))
        if self.affine:
            normed = torch.addcmul(self.bias.view(1, -1, 1, 1), normed, self.weight.view(1, -1, 1, 1))
        return normed.to(x.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor, values: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * values / max(1, values - 1), momentum)
