"""The character network: indices of characters in, logits of the next character out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = 256  # width from which packed weights are faster (measured: at 128 twice as slow, at 512 0.7 of the time)


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


class Packed:
    """act(x W^T + b) with the weight [out, in] laid out once as oneDNN's kernels read it, and act in the same pass.

    Of large weights that is faster than separate operations, the more the fewer the rows; and unlike other matrix
    products it rounds each row alike whatever rows are beside it (nearly always: ``steady`` tries it).
    """

    def __init__(self, weight: Tensor, bias: Tensor, act: str = "tanh") -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias, self.act = bias, act

    def __call__(self, *parts: Tensor) -> Tensor:
        """x in parts [N, ...] that lie side by side -> [N, out]."""
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, self.act, [], "")


class Steps:
    """One character of each of many texts at a time: ``network.forward`` for T = 1, with all that never changes ready.

    What a character adds to the first layer is looked up: its embedding times W_ih, with both biases.
    """

    def __init__(self, network: CharacterRNN) -> None:
        (read, recurrent, bias, recurrent_bias), *rest = network.rnn.all_weights
        table = F.linear(network.embedding.weight, read, bias + recurrent_bias)  # [vocabulary, hidden]
        head = network.head
        self.layers: list[Callable[[Tensor, Tensor], Tensor]]
        self.head: Callable[[Tensor], Tensor]
        if _packable(head.weight):
            self.first = torch.eye(len(table))  # as weights of one-hot characters, the table is in the same product
            self.layers = [Packed(torch.cat([table.t(), recurrent], dim=1), torch.zeros_like(bias))]
            self.layers += [
                Packed(torch.cat([read, recurrent], dim=1), bias + recurrent_bias)
                for read, recurrent, bias, recurrent_bias in rest
            ]
            self.head = Packed(head.weight, head.bias, "none")
        else:
            self.first = table
            self.layers = [partial(_after_table, recurrent.t())]
            self.layers += [
                partial(_after_layer, read.t(), recurrent.t(), bias + recurrent_bias)
                for read, recurrent, bias, recurrent_bias in rest
            ]
            self.head = head

    def read(self, characters: Tensor, state: Tensor) -> Tensor:
        """characters [N] and state [N, layers, hidden] -> the next state."""
        below, states = self.first[characters], []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            below = layer(below, before)
            states.append(below)
        return torch.stack(states, dim=1)

    def logits(self, state: Tensor) -> Tensor:
        """state [N, layers, hidden] -> logits [N, vocabulary] of what comes next."""
        return self.head(state[:, -1].contiguous())


def _packable(weight: Tensor) -> bool:
    """Whether packed weights can be used for a network with such a head [vocabulary, hidden], and are faster."""
    fit = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return fit and weight.shape[1] >= PACKED


def _after_table(recurrent: Tensor, looked_up: Tensor, before: Tensor) -> Tensor:
    return torch.addmm(looked_up, before, recurrent).tanh_()


def _after_layer(read: Tensor, recurrent: Tensor, bias: Tensor, below: Tensor, before: Tensor) -> Tensor:
    return torch.addmm(bias, below, read).addmm_(before, recurrent).tanh_()
