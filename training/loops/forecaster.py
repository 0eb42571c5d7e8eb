"""Train the forecaster: the loss, two trainers, and the loop that trains on M4 and synthetic series.

The forecaster is an ensemble. ``EnsembleTrainer`` trains each member on a separate thread. ``Trainer`` trains all
members together, in one or several processes. training/loops/series/ uses ``Trainer`` to train on your own series.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks.forecaster import MEDIAN, QUANTILES, Forecaster, Member
from app.networks.series_reader import ForecasterSizes, NetworkInputs, Reader
from app.tasks.precision import fast_bfloat16
from training.configs import ForecasterConfig, ForecasterFinetuneConfig
from training.data.series.sources import training_sources
from training.data.series.windows import Batch, WindowSampler
from training.evaluation.forecaster import PREFIXES
from training.loops import distributed
from training.run import Run, cosine_schedule, derive_seed, set_learning_rate

MAX_ERROR = 50  # largest difference of a target from the naive forecast, in MASE scales; larger ones are clipped
HIDDEN_SEASON_SHARE = 0.15  # share of the windows for which the network does not receive the season


def loss_sum(quantiles: Tensor, inputs: NetworkInputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return two sums: of the weighted pinball losses of scaled quantiles [N, horizon, QUANTILES], and of the weights.

    Unknown future values and constant series have weight 0. Errors are divided by the MASE scale of the past.
    """
    known = ~batch.future.isnan() & (inputs.scale > 0)
    scale = torch.where(inputs.scale > 0, inputs.scale, 1.0)
    target = ((batch.future - inputs.naive) / scale).nan_to_num(0.0).clamp(-MAX_ERROR, MAX_ERROR).float()
    errors = target.unsqueeze(2) - quantiles
    levels = torch.tensor(QUANTILES, device=errors.device)
    losses = torch.maximum(levels * errors, (levels - 1) * errors).mean(2)  # [N, horizon]
    weights = batch.weights * known
    return (losses * weights).sum(), weights.sum()


def member_loss(
    member: Member, reader: Reader, batch: Batch, dropout_mask: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor]:
    """Return the ``loss_sum`` of one member with the dropout mask [N, hidden].

    If ``bfloat16`` is true, all layers but the last compute in bfloat16. The last layer and the loss stay in float32.
    """
    inputs = reader(batch.values, batch.seasons)
    with torch.autocast(batch.values.device.type, torch.bfloat16, enabled=bfloat16):
        hidden = member.hidden(inputs.patches, inputs.ahead, dropout_mask)
    return loss_sum(member.quantiles(hidden.float(), inputs.candidates), inputs, batch)


class LossModule(nn.Module):
    """Computes the losses of all members in a single module, because DistributedDataParallel needs one module."""

    def __init__(self, network: Forecaster, bfloat16: bool) -> None:
        super().__init__()
        self.network, self.use_bfloat16 = network, bfloat16

    def forward(self, batches: list[Batch], dropout_masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums of the losses and the sums of the weights, both [members].

        Each member has its own batch and its own dropout mask [N, hidden].
        """
        losses = [
            member_loss(member, self.network.read, batch, mask, self.use_bfloat16)  # type: ignore[arg-type]
            for member, batch, mask in zip(self.network.members, batches, dropout_masks, strict=True)
        ]
        sums, weights = zip(*losses, strict=True)
        return torch.stack(sums), torch.stack(weights)


def sample_windows(
    sampler: WindowSampler,
    config: ForecasterConfig | ForecasterFinetuneConfig,
    hidden: int,
    generator: Generator,
    held_out: bool = False,
) -> tuple[Batch, Tensor]:
    """Return the windows that one member trains on in one step, and its dropout mask [batch, hidden].

    ``held_out``: whether the windows leave out the last horizon of each series.
    """
    batch = sampler.sample(config.batch, config.mixup, held_out, generator)
    keep = torch.rand(config.batch, hidden, generator=generator) >= config.dropout
    return batch, keep.float() / (1 - config.dropout)


def optimizer_and_average(
    network: Forecaster, config: ForecasterConfig | ForecasterFinetuneConfig
) -> tuple[torch.optim.Optimizer, Any]:
    """Return the AdamW optimizer and the exponential moving average of the weights."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    betas = (0.9, 0.99)
    return torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, betas=betas, fused=True), average


class EnsembleTrainer:
    """Trains each member on its own windows, on a separate thread.

    The matrix products are small, so one thread per member is faster than several threads per product.
    """

    def __init__(
        self, network: Forecaster, sampler: WindowSampler, config: ForecasterConfig, seed: int, threads: int
    ) -> None:
        self.network, self.sampler, self.config, self.seed = network, sampler, config, seed
        self.optimizer, self.average = optimizer_and_average(network, config)
        self.bfloat16 = fast_bfloat16(next(network.parameters()).device)  # takes 0.6 of the time of float32
        self.pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)

    def update(self, step: int, learning_rate: float, held_out: bool) -> float:
        """Train all members for one step; return their mean loss.

        ``held_out``: whether to leave out the last horizon of each series.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        members = range(self.config.members)
        loss = sum(self.pool.map(lambda number: self._backward(number, step, held_out), members)) / len(members)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return loss

    def _backward(self, number: int, step: int, held_out: bool) -> float:
        """Compute and clip the gradient of one member; return its loss."""
        member: Any = self.network.members[number]
        device = member.head.weight.device
        generator = Generator().manual_seed(derive_seed(self.seed, "member", number, step))
        hidden = self.network.sizes.hidden
        batch, mask = sample_windows(self.sampler, self.config, hidden, generator, held_out)
        total, weight = member_loss(member, self.network.read, batch.to(device), mask.to(device), self.bfloat16)
        loss = total / weight.clamp(min=1)
        loss.backward()
        nn.utils.clip_grad_norm_(member.parameters(), self.config.clip)
        return loss.item()


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class Trainer:
    """Trains all members together, each on its own windows. Each process trains on a part of every batch."""

    def __init__(
        self, network: Forecaster, sampler: WindowSampler, config: ForecasterFinetuneConfig, seed: int, device: str
    ) -> None:
        self.sampler, self.config, self.seed = sampler, config, seed
        self.device = torch.device(device)
        self.network = network.to(device).train().requires_grad_(True)
        self.optimizer, self.average = optimizer_and_average(self.network, config)
        bfloat16 = bool(config.bfloat16) and fast_bfloat16(self.device)
        self.loss_module = distributed.data_parallel(LossModule(self.network, bfloat16))

    def update(self, step: int, learning_rate: float) -> float:
        """Train for one step; return the mean loss of all members over all processes."""
        samples = [self._sample(number, step) for number in range(len(self.network.members))]
        sums, weights = self.loss_module([batch for batch, _ in samples], [mask for _, mask in samples])
        total_weights = distributed.sum_over_ranks(weights.detach()).clamp(min=1)
        # DistributedDataParallel averages the gradients. Their sum is needed, so multiply by the number of processes.
        loss = (sums / total_weights).mean() * distributed.world_size()
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return float(distributed.sum_over_ranks(loss.detach())) / distributed.world_size()

    def _sample(self, number: int, step: int) -> tuple[Batch, Tensor]:
        """Return this process's part of the windows of a member, and the same part of the member's dropout mask."""
        generator = Generator().manual_seed(derive_seed(self.seed, "member", number, step))
        batch, mask = sample_windows(self.sampler, self.config, self.network.sizes.hidden, generator)
        share = Batch(*(distributed.shard(part) for part in batch)).to(self.device)
        return share, distributed.shard(mask).to(self.device)


def pretrain(run: Run, config: ForecasterConfig) -> Any:
    """Train an ensemble from scratch; return the network with averaged weights.

    The first steps train without the last horizon of every series; ``config.held_out_share`` is their share of all
    steps. The remaining steps train on all values.
    """
    sizes = ForecasterSizes(
        hidden=config.hidden,
        layers=config.layers,
        members=config.members,
        smoothings=config.smoothings,
        lag_forecasts=True,
    )
    sources = training_sources(config, run.options.seed)
    sampler = WindowSampler(sources, sizes.context, sizes.horizon, HIDDEN_SEASON_SHARE)
    network = Forecaster(sizes).to(run.options.device)
    trainer = EnsembleTrainer(network, sampler, config, run.options.seed, run.options.threads)
    run.track(network=network, average=trainer.average, optimizer=trainer.optimizer)

    first = round(config.steps * config.held_out_share)
    for step in run.steps(config.steps):
        held_out = step < first
        factor = cosine_schedule(step, first) if held_out else 0.5 * cosine_schedule(step - first, config.steps - first)
        loss = trainer.update(step, config.learning_rate * factor, held_out)
        if (step + 1) % max(config.steps // 25, 1) == 0:
            run.log(loss=loss, **(validation_mase(trainer.average.module, sampler) if held_out else {}))
    return trainer.average.module


@torch.inference_mode()
def validation_mase(network: Any, sampler: WindowSampler) -> dict[str, float]:
    """Return the MASE of the median forecasts on the last horizons of M4's series, for each collection.

    The MASE scale is computed from the context that the network reads.
    """
    result = {}
    for source, prefix in enumerate(PREFIXES.values()):
        batch = sampler.last_horizons(source).to(network.widening.device)
        inputs = network.read(batch.values, batch.seasons)
        errors = (network(batch.values, batch.seasons)[..., MEDIAN] - batch.future).abs() / inputs.scale
        result[f"{prefix}_mase"] = float(errors[:, : sampler.horizons[source]].mean())
    return result
