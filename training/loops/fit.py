"""The training loop of all networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.tasks.precision import fast_bfloat16
from training.run import Budget, Run, cosine_schedule, permutation, set_learning_rate

REPORTS = 10  # a training with a time limit has this number of reports, and one more for each minute


class Recipe(Protocol):
    """What a training does in each step. A recipe holds the networks, their optimisers, and the data.

    A resumed run restores all attributes that have the methods ``state_dict`` and ``load_state_dict``.
    """

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step, and return the losses by name.

        ``step`` counts from 0. ``done`` is the share of the training that is done after this step; it determines the
        learning rate.
        """

    def validate(self, steps: int) -> dict[str, float]:
        """Return metrics on held-out data after ``steps`` steps. The result is empty if no data are held out."""


def fit(run: Run, recipe: Recipe, budget: Budget, reports: int) -> None:
    """Train until the budget is used. Log losses and validation metrics ``reports`` times, evenly spread.

    With a time limit, the number of reports depends on the time, so that they do not take most of it.
    """
    run.track(**{name: own for name, own in vars(recipe).items() if hasattr(own, "state_dict")})
    reports = reports if budget.seconds is None else REPORTS + round(budget.seconds / 60)
    for step in run.steps(budget):
        losses = recipe.update(step, run.done)
        if run.is_due(reports):
            values = {name: loss.item() for name, loss in losses.items()}
            run.log(progress=round(run.done, 4), **values, **recipe.validate(step + 1))


def autocast(device: torch.device) -> torch.autocast:
    """Return a context in which convolutions and matrix products compute in bfloat16, where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step of an optimizer with the gradient of ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Batches:
    """Divides samples into batches, in another random order in each epoch. Incomplete batches are left out.

    ``indices`` [N]: the indices of the samples. ``key``: the random order depends on it and on ``seed``.
    """

    def __init__(self, indices: Tensor, batch: int, seed: int, key: str = "epoch") -> None:
        self.indices, self.batch, self.seed, self.key = indices, min(batch, len(indices)), seed, key
        self.per_epoch = len(indices) // self.batch
        self._epoch, self._order = -1, indices

    def __call__(self, step: int) -> Tensor:
        """Return the indices [batch] of the samples of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.indices[permutation(len(self.indices), self.seed, self.key, epoch)]
        return self._order[position * self.batch : (position + 1) * self.batch]


def averaged(network: nn.Module, decay: float, short: bool = False, use_buffers: bool = False) -> Any:
    """Return a module that holds an exponential moving average of a network's weights.

    ``short``: whether the average covers at most the last twentieth of the steps so far, for trainings that may have
    few steps.
    """

    def average(old: Any, new: Any, count: Any) -> None:
        limit = max(0.0, 1 - 20 / (float(count) + 1)) if short else 1.0
        get_ema_multi_avg_fn(min(decay, limit))(old, new, count)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=use_buffers)


class AveragedRecipe:
    """A recipe with AdamW and a cosine schedule, whose weights are averaged over steps.

    Attributes:
        network: the network.
        average: holds the moving average of its weights; see ``averaged``.
        config: has the numbers ``learning_rate``, ``weight_decay``, ``clip`` and ``ema_decay``.
        optimizer: AdamW with ``betas``. ``groups`` are its parameter groups, by default one with all weights.
        best: the averaged weights with the lowest loss so far, if ``validation`` returns the loss of a network.
    """

    def __init__(
        self,
        network: Any,
        config: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        groups: Any = None,
        short: bool = False,
        validation: Callable[[Any], float] | None = None,
    ) -> None:
        self.network, self.config, self.validation = network, config, validation
        self.average: Any = averaged(network, config.ema_decay, short)
        weights = groups or network.parameters()
        self.optimizer = torch.optim.AdamW(weights, weight_decay=config.weight_decay, betas=betas, fused=True)
        self.best: Any = BestWeights(self.average.module) if validation else None

    def descend(self, loss: Tensor, done: float) -> None:
        """Make one step with the clipped gradient of ``loss``, and update the average."""
        set_learning_rate(self.optimizer, self.config.learning_rate * cosine_schedule(done))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)

    def validate(self, steps: int) -> dict[str, float]:
        """Return the validation loss of the averaged weights, and keep the best weights."""
        if self.validation is None:
            return {}
        loss = self.validation(self.average.module)
        self.best.update(self.average.module, loss, steps)
        return {"validation_loss": loss}


class BestWeights(nn.Module):
    """Keeps a copy of the network with the lowest validation loss so far, this loss, and the number of steps before it.

    A network soon overfits a small data set, so its last weights may be worse than its earlier weights.
    """

    loss: Tensor
    steps: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.register_buffer("loss", torch.tensor(torch.finfo().max))
        self.register_buffer("steps", torch.tensor(0))

    def update(self, network: nn.Module, loss: float, steps: int) -> None:
        """Copy the network's weights after ``steps`` steps, if ``loss`` is the lowest so far."""
        if loss < self.loss:
            self.loss.fill_(loss)
            self.steps.fill_(steps)
            self.network.load_state_dict(network.state_dict())
