"""The character network: indices of characters in, logits of the next character out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class CharacterRNNSizes:
    """``vocabulary`` counts the characters and one ``<unk>``; ``hidden`` is also the width of the embedding."""

    vocabulary: int
    hidden: int = 128
    layers: int = 1


class CharacterRNN(nn.Module):
    """An embedding, Elman layers (tanh), a linear layer; its memory is the state [N, layers, hidden].

    The workshop's has one layer of 128.
    """

    def __init__(self, sizes: CharacterRNNSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.rnn = nn.RNN(sizes.hidden, sizes.hidden, sizes.layers, batch_first=True)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def zero_state(self, rows: int) -> Tensor:
        """What a text begins from: state [rows, layers, hidden]."""
        return self.head.weight.new_zeros(rows, self.sizes.layers, self.sizes.hidden)

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """characters [N, T] and state [N, layers, hidden] -> logits [N, T, vocabulary], the state after the last."""
        outputs, last = self.rnn(self.embedding(characters), state.transpose(0, 1).contiguous())  # [N, T, hidden]
        return self.head(outputs), last.transpose(0, 1)


class Steps:
    """One character of each of many texts at a time: ``network.forward`` for T = 1, with all that never changes ready.

    What a character adds to the first layer is looked up: its embedding times W_ih, with both biases.
    """

    def __init__(self, network: CharacterRNN) -> None:
        first, *rest = network.rnn.all_weights
        read, recurrent, bias, recurrent_bias = first
        self.table = F.linear(network.embedding.weight, read, bias + recurrent_bias)  # [vocabulary, hidden]
        self.recurrent = recurrent.t()
        self.above = [
            (read.t(), recurrent.t(), bias + recurrent_bias) for read, recurrent, bias, recurrent_bias in rest
        ]
        self.head = network.head

    def read(self, characters: Tensor, state: Tensor) -> Tensor:
        """characters [N] and state [N, layers, hidden] -> the next state."""
        first, *rest = state.unbind(1)
        states = [torch.addmm(self.table[characters], first, self.recurrent).tanh_()]
        for (read, recurrent, bias), before in zip(self.above, rest, strict=True):
            below = torch.addmm(bias, states[-1], read)
            states.append(below.addmm_(before, recurrent).tanh_())
        return torch.stack(states, dim=1)

    def logits(self, state: Tensor) -> Tensor:
        """state [N, layers, hidden] -> logits [N, vocabulary] of what comes next."""
        return self.head(state[:, -1])
