"""Two recipes of the forecaster, which is an ensemble: for a new network, and for fine-tuning on a user's series."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Generator, Tensor, nn

from app.networks.forecaster import MEDIAN, QUANTILES, Forecaster
from app.networks.series_reader import ForecasterSizes, NetworkInputs
from training.configs.series import ForecasterConfig
from training.data.series.sources import training_sources
from training.data.series.windows import Batch, WindowSampler
from training.evaluation.forecaster import PREFIXES
from training.loops.fit import AveragedRecipe, autocast, fit
from training.options import Options
from training.run import Run, cosine_schedule, derive_seed, set_learning_rate

BETAS = (0.9, 0.99)  # of AdamW
MAX_ERROR = 50  # largest difference of a target from the naive forecast, in MASE scales; larger ones are clipped
REPORTS = 25  # validations of the pretraining
HIDDEN_SEASON_SHARE = 0.15  # share of the windows for which the network does not receive the season


def pinball_loss(quantiles: Tensor, inputs: NetworkInputs, batch: Batch) -> Tensor:
    """Return the weighted mean of the pinball losses of scaled quantiles [N, horizon, QUANTILES].

    Unknown future values and constant series have weight 0. Errors are divided by the MASE scale of the past.
    """
    known = ~batch.future.isnan() & (inputs.scale > 0)
    scale = torch.where(inputs.scale > 0, inputs.scale, 1.0)
    target = ((batch.future - inputs.naive) / scale).nan_to_num(0.0).clamp(-MAX_ERROR, MAX_ERROR).float()
    errors = target.unsqueeze(2) - quantiles
    levels = torch.tensor(QUANTILES, device=errors.device)
    losses = torch.maximum(levels * errors, (levels - 1) * errors).mean(2)  # [N, horizon]
    weights = batch.weights * known
    return (losses * weights).sum() / weights.sum().clamp(min=1)


class ForecasterRecipe(AveragedRecipe):
    """What both recipes of a forecaster share: each member of the ensemble has its own random windows."""

    def __init__(
        self, network: Forecaster, sampler: WindowSampler, config: Any, options: Options, **others: Any
    ) -> None:
        """``others``: further arguments of ``AveragedRecipe``."""
        super().__init__(network.to(options.device), config, BETAS, **others)
        self.sampler, self.seed, self.device = sampler, options.seed, torch.device(options.device)
        autocast(self.device)  # finds out before the threads start whether bfloat16 is faster

    def loss(self, number: int, step: int, held_out: bool = False) -> Tensor:
        """Return the loss of a member of the network on its windows of a step.

        All layers but the last may compute in bfloat16. ``held_out``: whether the windows leave out the last horizon of
        each series.
        """
        config, member = self.config, self.network.members[number]
        generator = Generator().manual_seed(derive_seed(self.seed, "member", number, step))
        batch = self.sampler.sample(config.batch, config.mixup, held_out, generator).to(self.device)
        keep = torch.rand(config.batch, self.network.sizes.hidden, generator=generator) >= config.dropout
        dropout_mask = (keep.float() / (1 - config.dropout)).to(self.device)
        inputs = self.network.read(batch.values, batch.seasons)
        with autocast(self.device):  # takes 0.6 of the time of float32
            hidden = member.hidden(inputs.patches, inputs.ahead, dropout_mask)
        return pinball_loss(member.quantiles(hidden.float(), inputs.candidates), inputs, batch)


class PretrainingRecipe(ForecasterRecipe):
    """The recipe of a new forecaster; see ``training.loops.fit.Recipe``.

    Each member is trained on a separate thread. The matrix products are small, so one thread per member is faster than
    several threads per product. The first steps train without the last horizon of every series;
    ``config.held_out_share`` is their share of all steps. The remaining steps train on all values.
    """

    def __init__(self, network: Forecaster, sampler: WindowSampler, config: ForecasterConfig, options: Options) -> None:
        super().__init__(network, sampler, config, options)
        self.pool = ThreadPoolExecutor(options.threads, initializer=_use_one_thread)
        self.held_out = True

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train all members for one step; return their mean loss."""
        share = self.config.held_out_share
        self.held_out = done <= share
        factor = cosine_schedule(done / share) if self.held_out else 0.5 * cosine_schedule((done - share) / (1 - share))
        set_learning_rate(self.optimizer, self.config.learning_rate * factor)
        self.optimizer.zero_grad()
        losses = list(self.pool.map(lambda number: self._backward(number, step), range(self.config.members)))
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return {"loss": torch.stack(losses).mean()}

    def _backward(self, number: int, step: int) -> Tensor:
        """Compute and clip the gradient of one member; return its loss."""
        loss = self.loss(number, step, self.held_out)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.members[number].parameters(), self.config.clip)
        return loss.detach()

    def validate(self, steps: int) -> dict[str, float]:
        """Return the MASE on the last horizons of M4's series, until the network trains on these values."""
        return validation_mase(self.average.module, self.sampler) if self.held_out else {}


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class FinetuneRecipe(ForecasterRecipe):
    """The recipe for a user's series; see ``training.loops.fit.Recipe``. All members are trained together."""

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step; return the mean loss of all members."""
        loss = torch.stack([self.loss(number, step) for number in range(len(self.network.members))]).mean()
        self.descend(loss, done)
        return {"loss": loss}


def pretrain(run: Run, config: ForecasterConfig) -> Any:
    """Train an ensemble from scratch; return the network with averaged weights."""
    sizes = ForecasterSizes(
        hidden=config.hidden,
        layers=config.layers,
        members=config.members,
        smoothings=config.smoothings,
        lag_forecasts=True,
    )
    sources = training_sources(config, run.options.seed)
    sampler = WindowSampler(sources, sizes.context, sizes.horizon, HIDDEN_SEASON_SHARE)
    recipe = PretrainingRecipe(Forecaster(sizes), sampler, config, run.options)
    fit(run, recipe, run.budget(config.steps), REPORTS)
    return recipe.average.module


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
