"""The character network: indices of characters in, logits of the next character out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = 256  # width from which packed weights are faster (measured: 128 slower by a third, 512 faster by a sixth)


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
    """A linear layer whose weight [out, in] is laid out once as oneDNN's kernels read it, where that can be.

    Of large weights that is faster than the layer, the more the fewer the rows; and unlike other matrix products it
    rounds each row alike whatever rows are beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, pack: bool) -> None:
        packable = (
            weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight) if pack and packable else None
        self.weight, self.bias = weight.t(), bias

    def __call__(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """x [N, in] -> x W^T + b, plus ``more``, [N, out]."""
        if self.packed is None:
            return torch.addmm(self.bias if more is None else more, x, self.weight)
        if more is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, more, self.packed, self.bias, "add")


class Steps:
    """One character of each of many texts at a time: ``network.forward`` for T = 1, with all that never changes ready.

    What a character adds to the first layer is looked up: its embedding times W_ih, with both biases.
    """

    def __init__(self, network: CharacterRNN) -> None:
        (read, recurrent, bias, recurrent_bias), *rest = network.rnn.all_weights
        self.table = F.linear(network.embedding.weight, read, bias + recurrent_bias)  # [vocabulary, hidden]
        pack = network.sizes.hidden >= PACKED
        nothing = torch.zeros_like(bias)  # the recurrent weights' bias is in what is added to them
        self.recurrent = Packed(recurrent, nothing, pack)
        self.above = [
            (Packed(read, bias + recurrent_bias, pack), Packed(recurrent, nothing, pack))
            for read, recurrent, bias, recurrent_bias in rest
        ]
        self.head = Packed(network.head.weight, network.head.bias, pack)

    def read(self, characters: Tensor, state: Tensor) -> Tensor:
        """characters [N] and state [N, layers, hidden] -> the next state."""
        first, *rest = state.unbind(1)
        states = [self.recurrent(first.contiguous(), self.table[characters]).tanh_()]
        for (read, recurrent), before in zip(self.above, rest, strict=True):
            states.append(recurrent(before.contiguous(), read(states[-1])).tanh_())
        return torch.stack(states, dim=1)

    def logits(self, state: Tensor) -> Tensor:
        """state [N, layers, hidden] -> logits [N, vocabulary] of what comes next."""
        return self.head(state[:, -1].contiguous())
