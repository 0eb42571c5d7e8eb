"""Several processes that train one network: ``torchrun --nproc-per-node 2 -m training.cnn --images ...``.

All processes draw the random numbers of the whole batch and take their share of it, gradients are averaged
(DistributedDataParallel), and batch norm takes its statistics over all of them: the result is that of one process with
the same batch, but for rounding. One process alone goes through the same functions, which then do nothing.
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


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is. The first, 0, writes, prints and publishes."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """How many of them run on this machine, and share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(device: str) -> str:
    """The device of this process: of several, each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and world_size() > 1 else device


def print_once(text: str) -> None:
    """Print once, not once for each process."""
    if rank() == 0:
        print(text, flush=True)


def initialize(device: str) -> None:
    """Meet the other processes, where there are any: over gloo, and NCCL between GPUs."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")


def exit_process() -> None:
    """Part from the other processes, when all is written: of several, this one ends here, with status 0.

    It does so without Python's clearing up, during which threads of the process group at times abort the process
    ("terminate called without an active exception"; 1 run in 3 on two cores).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def from_rank_zero(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    if world_size() == 1:
        return make()
    made: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    result: T = made[0]
    return result


def any_rank(claim: bool) -> bool:
    """Whether it is so in any process: all of them must ask at the same step."""
    if world_size() == 1:
        return claim
    claims = torch.tensor(int(claim))
    dist.all_reduce(claims, dist.ReduceOp.MAX)
    return bool(claims)


def shard(whole: Tensor) -> Tensor:
    """This process's part of the first dimension: every ``count``-th, which must come out even."""
    return whole[rank() :: world_size()]


def gather(part: Tensor) -> Tensor:
    """The whole of which each process has its ``share``."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def seed_per_rank() -> None:
    """From here on, until the next step, each process draws random numbers of its own."""
    if world_size() > 1:
        torch.manual_seed(torch.initial_seed() + 1 + rank())


def divisible_batch(batch: int) -> int:
    """The largest batch up to this one that all processes have the same share of."""
    return max(1, batch // world_size()) * world_size()


def data_parallel(network: nn.Module) -> nn.Module:
    """The network such that its gradients are means over all processes, and its batch norms' statistics too.

    The loss must be a mean over this process's share of the batch.
    """
    if world_size() == 1:
        return network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d  # the same tensors under the same names
    return DistributedDataParallel(network)


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum over all processes, without a gradient."""
    whole = part.detach().clone()
    if world_size() > 1:
        dist.all_reduce(whole)
    return whole


class NormalizeFunction(torch.autograd.Function):
    """x [N, C, H, W] of this process in units of the whole batch, by its mean and scale [1, C, 1, 1].

    Both depend on x as well, and what they do to other processes' losses is part of the gradient: one sum over all.
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
    """Batch norm over the batches of all processes. PyTorch's own (SyncBatchNorm) is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], this process's share -> the same, normalised over the shares of all."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        variance, mean = (own.double() for own in torch.var_mean(values.detach(), (0, 2, 3), correction=0))
        mean, square = sum_over_ranks(torch.stack([mean, variance + mean.square()])) / world_size()
        variance = square - mean.square()  # in double precision, for these may nearly be the same
        self._update_statistics(mean.float(), variance.float(), values[:, 0].numel() * world_size())
        scale = (variance + self.eps).rsqrt()
        normed: Tensor = NormalizeFunction.apply(values, *(own.float().view(1, -1, 1, 1) for own in (mean, scale)))
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
