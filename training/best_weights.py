"""The weights with the lowest validation loss of a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BestWeights:
    """The weights with the lowest loss so far, and this loss. Small data are soon overfitted."""

    def __init__(self, network: nn.Module) -> None:
        self.loss = torch.tensor(torch.inf)
        self.weights = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, loss: float) -> None:
        """Copy the network's weights if their loss is the lowest so far."""
        if loss < self.loss:
            self.loss.fill_(loss)
            for key, tensor in network.state_dict().items():
                self.weights[key].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The loss and the weights, for a checkpoint."""
        return {"loss": self.loss, **{f"weights.{key}": tensor for key, tensor in self.weights.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the loss and the weights of a checkpoint."""
        self.loss.copy_(state["loss"])
        for key, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{key}"])
