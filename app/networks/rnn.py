"""Character RNNs: networks that read the indices of characters and return logits of the next character."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNKS, LONG_CHUNK = (32, 16, 8), 128  # numbers of rows that ``Packed`` computes at once
MIN_PACKED_WIDTH = 256  # time with packed weights: 2 times as long as without at width 128, 0.7 times at 512


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


class Packed:
    """A linear layer with an activation, act(x W^T + b), in one oneDNN call.

    The weight [out, in] is converted once to oneDNN's layout. For large weights and few rows, the call is faster than
    separate operations. Unlike other matrix products, the call nearly always rounds a row independently of the other
    rows. ``batch_invariant`` in ``app.tasks.precision`` checks this property.
    """

    def __init__(self, weight: Tensor, bias: Tensor, act: str = "tanh") -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias, self.act = bias, act
        sample = weight.repeat(-(-LONG_CHUNK // len(weight)), 1)[:LONG_CHUNK]
        parts = torch.cat([self._product(chunk) for chunk in sample.split(CHUNKS[0])])
        self.chunks = (LONG_CHUNK, *CHUNKS) if torch.equal(self._product(sample), parts) else CHUNKS

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the output [N, out] for x [N, in], which is the concatenation of ``parts`` [N, ...].

        Many rows are computed in chunks of 128, 32, 16 and 8 rows. oneDNN compiles and caches a kernel of 0.75 MiB for
        each number of rows and weight shape, and chunks limit the number of kernels. Chunks of 128 rows take about 0.8
        times as long as four chunks of 32 rows. They are used only if they give the same bits.
        """
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        sizes = _split(len(x), self.chunks)
        if len(sizes) == 1:
            return self._product(x)
        return torch.cat([self._product(chunk) for chunk in x.split(sizes)])

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, self.act, [], "")


@cache
def _split(rows: int, chunks: tuple[int, ...]) -> list[int]:
    """Split a number of rows into chunks of the given sizes, largest first, and the remainder."""
    sizes = []
    for size in chunks:
        sizes += [size] * (rows // size)
        rows %= size
    return sizes + [rows] * (rows > 0)


class Steps:
    """Computes ``CharacterRNN.forward`` for T = 1. Everything that does not depend on the texts is precomputed.

    A table holds the input of the first layer for each character: the embedding of the character times W_ih, plus both
    biases.
    """

    def __init__(self, network: CharacterRNN) -> None:
        (read, recurrent, bias, recurrent_bias), *rest = network.rnn.all_weights
        table = F.linear(network.embedding.weight, read, bias + recurrent_bias)  # [vocabulary, hidden]
        pack = packable(network.head.weight)
        self.first = torch.eye(len(table)) if pack else table
        self.layers = [_first_layer(table, recurrent, pack)]
        self.layers += [
            _layer(read, recurrent, bias + recurrent_bias, pack) for read, recurrent, bias, recurrent_bias in rest
        ]
        self.head = Packed(network.head.weight, network.head.bias, "none") if pack else network.head

    def read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read one character of each of N texts: characters [N], state [N, layers, hidden].

        Returns the hidden values [N, hidden], from which ``logits`` computes the logits, and the next state.
        """
        inputs, states = self.first[characters], []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            inputs = layer(inputs, before)
            states.append(inputs)
        return inputs, torch.stack(states, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, vocabulary] of the next character, given hidden values [N, hidden] from ``read``."""
        return self.head(hidden)


def merge_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] and a bias [out] that include the scale and shift of the preceding norm."""
    return weight * norm.weight, bias + weight @ norm.bias


def _first_layer(table: Tensor, recurrent: Tensor, pack: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the first layer. It reads rows of ``table`` [vocabulary, hidden], or one-hot rows if ``pack`` is true."""
    if pack:
        return Packed(torch.cat([table.t(), recurrent], dim=1), torch.zeros_like(table[0]))
    return partial(_after_table, recurrent.t())


def _layer(read: Tensor, recurrent: Tensor, bias: Tensor, pack: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a layer that reads the output of the layer below."""
    if pack:
        return Packed(torch.cat([read, recurrent], dim=1), bias)
    return partial(_after_layer, read.t(), recurrent.t(), bias)


def packable(weight: Tensor) -> bool:
    """Return whether packed weights are supported and faster, given the head's weight [vocabulary, hidden]."""
    supported = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return supported and weight.shape[1] >= MIN_PACKED_WIDTH


def _after_table(recurrent: Tensor, looked_up: Tensor, before: Tensor) -> Tensor:
    return torch.addmm(looked_up, before, recurrent).tanh_()


def _after_layer(read: Tensor, recurrent: Tensor, bias: Tensor, inputs: Tensor, before: Tensor) -> Tensor:
    return torch.addmm(bias, inputs, read).addmm_(before, recurrent).tanh_()
