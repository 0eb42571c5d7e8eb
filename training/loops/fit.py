"""The training loop of all networks."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.run import Budget, Run, permutation

REPORTS = 10  # a training with a time limit has this number of reports, and one more for each minute


class Recipe(Protocol):
    """What a training does in each step. A recipe holds the networks, their optimisers, and the data."""

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step, and return the losses by name.

        ``step`` counts from 0. ``done`` is the share of the training that is done after this step; it determines the
        learning rate.
        """

    def validate(self, steps: int) -> dict[str, float]:
        """Return metrics on held-out data after ``steps`` steps. The result is empty if no data are held out."""

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name. Each has ``state_dict`` and ``load_state_dict``."""


def fit(run: Run, recipe: Recipe, budget: Budget, reports: int) -> None:
    """Train until the budget is used. Log losses and validation metrics ``reports`` times, evenly spread.

    With a time limit, the number of reports depends on the time, so that they do not take most of it.
    """
    run.track(**recipe.state())
    reports = reports if budget.seconds is None else REPORTS + round(budget.seconds / 60)
    for step in run.steps(budget):
        losses = recipe.update(step, run.done)
        if run.is_due(reports):
            values = {name: loss.item() for name, loss in losses.items()}
            run.log(progress=round(run.done, 4), **values, **recipe.validate(step + 1))


class Batches:
    """Divides ``count`` samples into batches, in another random order in each epoch. Incomplete batches are left out.

    ``indices`` [count]: the indices of the samples, by default 0 to ``count`` - 1.
    """

    def __init__(self, indices: Tensor, batch: int, seed: int) -> None:
        self.indices, self.batch, self.seed = indices, min(batch, len(indices)), seed
        self.per_epoch = len(indices) // self.batch
        self._epoch, self._order = -1, indices

    def __call__(self, step: int) -> Tensor:
        """Return the indices [batch] of the samples of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.indices[permutation(len(self.indices), self.seed, "epoch", epoch)]
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
