"""Keep the weights that had the lowest validation loss during training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BestWeights:
    """Keeps the weights with the lowest validation loss so far, this loss, and the number of steps that led to it.

    A network soon overfits a small data set, so its last weights may be worse than its earlier weights.
    """

    def __init__(self, network: nn.Module) -> None:
        self.loss = torch.tensor(torch.inf)
        self.steps = torch.tensor(0)
        self.weights = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, loss: float, steps: int = 0) -> None:
        """Copy the network's weights after ``steps`` steps, if ``loss`` is the lowest so far."""
        if loss < self.loss:
            self.loss.fill_(loss)
            self.steps.fill_(steps)
            for key, tensor in network.state_dict().items():
                self.weights[key].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the loss, the number of steps and the weights, for a checkpoint."""
        return {
            "loss": self.loss,
            "steps": self.steps,
            **{f"weights.{key}": tensor for key, tensor in self.weights.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the loss, the number of steps and the weights from a checkpoint."""
        self.loss.copy_(state["loss"])
        self.steps.copy_(state["steps"])
        for key, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{key}"])
