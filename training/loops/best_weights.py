"""The weights of a training that did best on what is held out from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BestWeights:
    """The weights that did best so far, and their loss: what is small is soon learnt by heart."""

    def __init__(self, network: nn.Module) -> None:
        self.loss = torch.tensor(torch.inf)
        self.weights = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, loss: float) -> None:
        """Take these weights over when they do better than any before."""
        if loss < self.loss:
            self.loss.fill_(loss)
            for key, tensor in network.state_dict().items():
                self.weights[key].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The loss and the weights."""
        return {"loss": self.loss, **{f"weights.{key}": tensor for key, tensor in self.weights.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what was saved."""
        self.loss.copy_(state["loss"])
        for key, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{key}"])
