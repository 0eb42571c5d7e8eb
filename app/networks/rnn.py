"""Character RNNs: networks that read the indices of characters and return logits of the next character."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class CharacterRNNSizes:
    """Sizes of ``CharacterRNN``. ``vocabulary``: number of characters, including ``<unk>`` for all other characters.

    ``hidden``: width of the embedding and of each layer.
    """

    vocabulary: int
    hidden: int = 128
    layers: int = 1


class CharacterRNN(nn.Module):
    """An embedding, Elman layers (tanh) and a linear layer. The state is [N, layers, hidden].

    The network of the workshop (see ``app.networks``) has one layer of width 128.
    """

    def __init__(self, sizes: CharacterRNNSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.rnn = nn.RNN(sizes.hidden, sizes.hidden, sizes.layers, batch_first=True)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def zero_state(self, rows: int) -> Tensor:
        """Return the initial state [rows, layers, hidden]."""
        return self.head.weight.new_zeros(rows, self.sizes.layers, self.sizes.hidden)

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, T, vocabulary] and the final state, given characters [N, T] and the initial state."""
        outputs, last = self.rnn(self.embedding(characters), state.transpose(0, 1).contiguous())  # [N, T, hidden]
        return self.head(outputs), last.transpose(0, 1)

    def for_generation(self) -> Steps:
        """Return a faster form of the network. It reads one character of each text per call."""
        return Steps(self)


class Steps:
    """Computes ``CharacterRNN.forward`` for T = 1. Everything that does not depend on the texts is precomputed.

    A table holds the input of the first layer for each character: the embedding of the character times W_ih, plus both
    biases.
    """

    def __init__(self, network: CharacterRNN) -> None:
        (read, recurrent, bias, recurrent_bias), *rest = network.rnn.all_weights
        self.table = F.linear(network.embedding.weight, read, bias + recurrent_bias)  # [vocabulary, hidden]
        self.recurrent = recurrent.t()
        self.rest = [(read.t(), recurrent.t(), bias + recurrent_bias) for read, recurrent, bias, recurrent_bias in rest]
        self.head = network.head

    def read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read one character of each of N texts: characters [N], state [N, layers, hidden].

        Returns the hidden values [N, hidden], from which ``logits`` computes the logits, and the next state.
        """
        first, *before = state.unbind(1)
        states = [torch.addmm(self.table[characters], first, self.recurrent).tanh_()]
        for (read, recurrent, bias), own in zip(self.rest, before, strict=True):
            states.append(torch.addmm(bias, states[-1], read).addmm_(own, recurrent).tanh_())
        return states[-1], torch.stack(states, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, vocabulary] of the next character, given hidden values [N, hidden] from ``read``."""
        return self.head(hidden)
