"""Two recipes of the forecaster, which is an ensemble: for a new network, and for fine-tuning on a user's series."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Generator, Tensor, nn

from app.networks.forecaster import MEDIAN, QUANTILES, Forecaster, Member
from app.networks.series_reader import ForecasterSizes, NetworkInputs, Reader
from app.tasks.precision import fast_bfloat16
from training.configs.series import ForecasterConfig, ForecasterFinetuneConfig
from training.data.series.sources import training_sources
from training.data.series.windows import Batch, WindowSampler
from training.evaluation.forecaster import PREFIXES
from training.loops.best_weights import BestWeights
from training.loops.fit import averaged, fit
from training.options import Options
from training.run import Run, cosine_schedule, derive_seed, set_learning_rate

MAX_ERROR = 50  # largest difference of a target from the naive forecast, in MASE scales; larger ones are clipped
REPORTS = 25  # validations of the pretraining
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
    network: Forecaster, config: ForecasterConfig | ForecasterFinetuneConfig, short: bool = False
) -> tuple[torch.optim.Optimizer, Any]:
    """Return the AdamW optimizer and the exponential moving average of the weights. ``short``: see ``averaged``."""
    average = averaged(network, config.ema_decay, short)
    betas = (0.9, 0.99)
    return torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, betas=betas, fused=True), average


class PretrainingRecipe:
    """The recipe of a new forecaster; see ``training.loops.fit.Recipe``.

    Each member is trained on its own windows, on a separate thread. The matrix products are small, so one thread per
    member is faster than several threads per product. The first steps train without the last horizon of every series;
    ``config.held_out_share`` is their share of all steps. The remaining steps train on all values.
    """

    def __init__(self, network: Forecaster, sampler: WindowSampler, config: ForecasterConfig, options: Options) -> None:
        self.network, self.sampler, self.config, self.seed = network, sampler, config, options.seed
        self.optimizer, self.average = optimizer_and_average(network, config)
        self.bfloat16 = fast_bfloat16(next(network.parameters()).device)  # takes 0.6 of the time of float32
        self.pool = ThreadPoolExecutor(options.threads, initializer=_use_one_thread)
        self.held_out = True

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train all members for one step; return their mean loss."""
        share = self.config.held_out_share
        self.held_out = done <= share
        factor = cosine_schedule(done / share) if self.held_out else 0.5 * cosine_schedule((done - share) / (1 - share))
        set_learning_rate(self.optimizer, self.config.learning_rate * factor)
        self.optimizer.zero_grad()
        members = range(self.config.members)
        losses = list(self.pool.map(lambda number: self._backward(number, step), members))
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return {"loss": torch.stack(losses).mean()}

    def _backward(self, number: int, step: int) -> Tensor:
        """Compute and clip the gradient of one member; return its loss."""
        member: Any = self.network.members[number]
        device = member.head.weight.device
        generator = Generator().manual_seed(derive_seed(self.seed, "member", number, step))
        hidden = self.network.sizes.hidden
        batch, mask = sample_windows(self.sampler, self.config, hidden, generator, self.held_out)
        total, weight = member_loss(member, self.network.read, batch.to(device), mask.to(device), self.bfloat16)
        loss = total / weight.clamp(min=1)
        loss.backward()
        nn.utils.clip_grad_norm_(member.parameters(), self.config.clip)
        return loss.detach()

    def validate(self, steps: int) -> dict[str, float]:
        """Return the MASE on the last horizons of M4's series, until the network trains on these values."""
        return validation_mase(self.average.module, self.sampler) if self.held_out else {}

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer}


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class ForecasterRecipe:
    """The recipe for a user's series; see ``training.loops.fit.Recipe``. All members are trained together.

    ``validation`` returns the validation loss of a network. If it is given, ``best`` holds the averaged weights with
    the lowest loss.
    """

    def __init__(
        self,
        network: Forecaster,
        sampler: WindowSampler,
        config: ForecasterFinetuneConfig,
        options: Options,
        validation: Callable[[Any], float] | None = None,
    ) -> None:
        self.sampler, self.config, self.seed = sampler, config, options.seed
        self.device = torch.device(options.device)
        self.network = network.to(self.device).train().requires_grad_(True)
        self.optimizer, self.average = optimizer_and_average(self.network, config, short=True)
        self.use_bfloat16 = bool(config.bfloat16) and fast_bfloat16(self.device)
        self.validation, self.best = validation, BestWeights(self.average.module)

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step; return the mean loss of all members."""
        losses = [self._loss(member, number, step) for number, member in enumerate(self.network.members)]
        loss = torch.stack(losses).mean()
        set_learning_rate(self.optimizer, self.config.learning_rate * cosine_schedule(done))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return {"loss": loss}

    def _loss(self, member: Any, number: int, step: int) -> Tensor:
        """Return the loss of a member on its own windows."""
        generator = Generator().manual_seed(derive_seed(self.seed, "member", number, step))
        batch, mask = sample_windows(self.sampler, self.config, self.network.sizes.hidden, generator)
        batch, mask = batch.to(self.device), mask.to(self.device)
        total, weight = member_loss(member, self.network.read, batch, mask, self.use_bfloat16)
        return total / weight.clamp(min=1)

    def validate(self, steps: int) -> dict[str, float]:
        """Return the validation loss of the averaged weights, and keep the best weights."""
        if self.validation is None:
            return {}
        loss = self.validation(self.average.module)
        self.best.update(self.average.module, loss, steps)
        return {"validation_loss": loss}

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer, "best": self.best}


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
    recipe = PretrainingRecipe(Forecaster(sizes).to(run.options.device), sampler, config, run.options)
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
