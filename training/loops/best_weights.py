"""The weights with the lowest validation loss of a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BestWeights:
    """The weights with the lowest loss so far, this loss, and the number of steps after which they were reached.

    Small data are soon overfitted.
    """

    def __init__(self, network: nn.Module) -> None:
        self.loss = torch.tensor(torch.inf)
        self.steps = torch.tensor(0)
        self.weights = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, loss: float, steps: int = 0) -> None:
        """Copy the network's weights after ``steps`` steps if their loss is the lowest so far."""
        if loss < self.loss:
            self.loss.fill_(loss)
            self.steps.fill_(steps)
            for key, tensor in network.state_dict().items():
                self.weights[key].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The loss, the steps and the weights, for a checkpoint."""
        return {
            "loss": self.loss,
            "steps": self.steps,
            **{f"weights.{key}": tensor for key, tensor in self.weights.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the loss and the weights of a checkpoint."""
        self.loss.copy_(state["loss"])
        self.steps.copy_(state["steps"])
        for key, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{key}"])
