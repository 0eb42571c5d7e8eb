"""A character RNN with gated linear recurrences. It can read many characters of a text at once.

The recurrence is that of minGRU (Feng et al. 2024, arXiv 2410.01201). Its gate depends on the input and not on the
state, so each matrix product is computed for all characters of a text at once. Only an elementwise loop runs over the
characters. As in Griffin (De et al. 2024, arXiv 2402.19427), a convolution precedes the recurrence, and a gate
multiplies its outputs. This gate is SiLU; that of Griffin is GELU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.linear import linear, merge_norm, packable

KERNEL = 4  # characters; width of the convolution
MAX_TIMESCALE = 128  # characters; longest timescale on which the initial gates forget


@dataclass(frozen=True)
class GatedRNNSizes:
    """Sizes of ``GatedRNN``. ``vocabulary``: number of characters, including ``<unk>`` for all other characters.

    ``expansion``: width of the feed-forward part of a block, divided by ``hidden``.
    """

    vocabulary: int
    hidden: int = 320
    layers: int = 4
    expansion: int = 2


class LinearRecurrence(torch.autograd.Function):
    """Computes h[t] = h[t-1] + z[t] (x[t] - h[t-1]) for inputs x [N, T, H], gates z [N, T, H] and h[-1] [N, H]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, gates: Tensor, state: Tensor) -> Tensor:
        states = recur(inputs, gates, state)
        ctx.save_for_backward(inputs, gates, state, states)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, gates, state, states = ctx.saved_tensors
        keep, of_states = 1 - gates, torch.empty_like(states)
        following = torch.zeros_like(state)
        for t in range(states.shape[1] - 1, -1, -1):
            torch.add(gradient[:, t], following, out=of_states[:, t])
            following = of_states[:, t] * keep[:, t]
        previous = torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1)
        return of_states * gates, of_states * (inputs - previous), following


def recur(inputs: Tensor, gates: Tensor, state: Tensor) -> Tensor:
    """Compute ``LinearRecurrence`` without gradients. Dividing a text into several calls gives the same bits."""
    states = []
    for new, gate in zip(inputs.unbind(1), gates.unbind(1), strict=True):
        state = torch.lerp(state, new, gate)  # without ``out``, which the import of exported programs rejects
        states.append(state)
    return torch.stack(states, dim=1)


class GatedBlock(nn.Module):
    """A block of a recurrent part and a feed-forward part, which are computed in parallel as in GPT-J.

    SiLU gates the outputs of both parts. The outputs are added to the input of the block. One matrix product computes
    the inputs of both parts, and another product computes their outputs. ``layers`` is the number of blocks of the
    network. With more blocks, the initial output weights are smaller. The sum of the outputs of all blocks is therefore
    at most as large as the input of the first block.
    """

    def __init__(self, width: int, expansion: int, layers: int) -> None:
        super().__init__()
        inner = (1 + expansion) * width
        self.split = (width, inner, inner)  # gates of the state; inputs of both parts (recurrent first); output gates
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, sum(self.split))
        self.kernel = nn.Parameter(torch.empty(KERNEL, width))  # oldest first
        nn.init.normal_(self.kernel, std=KERNEL**-0.5)
        self.write = nn.Linear(inner, width)
        self.dropout: nn.Module = nn.Dropout(0.0)  # set by the training
        if self.read.weight.is_meta:  # on the meta device, torch would import its compiler
            return
        with torch.no_grad():
            timescales = torch.logspace(0, torch.log2(torch.tensor(float(MAX_TIMESCALE))), width, base=2)
            self.read.bias[:width] = torch.logit(1 / (timescales + 1))
            self.write.weight *= layers**-0.5
            self.write.bias.zero_()

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [N, T, width] and the final state, given x [N, T, width] and state [N, KERNEL, width]."""
        width = x.shape[-1]
        gate, inputs, output_gates = self.read(self.norm(x)).split(self.split, dim=-1)
        extended = torch.cat([state[:, 1:], inputs[..., :width].to(x.dtype)], dim=1)
        recurrent = extended[:, : x.shape[1]] * self.kernel[0]  # a causal depthwise convolution
        for offset in range(1, KERNEL):
            recurrent = torch.addcmul(recurrent, extended[:, offset : offset + x.shape[1]], self.kernel[offset])
        states = LinearRecurrence.apply(recurrent, gate.to(x.dtype).sigmoid(), state[:, 0])
        outputs = torch.cat([states.to(inputs.dtype), inputs[..., width:]], dim=-1) * F.silu(output_gates)
        # The next state is the recurrent state, and the last inputs of the convolution.
        after = torch.cat([states[:, -1:], extended[:, 1 - KERNEL :]], dim=1)
        return x + self.dropout(self.write(outputs)), after


class GatedRNN(nn.Module):
    """An embedding, gated blocks, and a linear layer. The state is [N, layers, KERNEL, hidden]."""

    def __init__(self, sizes: GatedRNNSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.blocks = nn.ModuleList(
            [GatedBlock(sizes.hidden, sizes.expansion, sizes.layers) for _ in range(sizes.layers)]
        )
        self.norm = nn.LayerNorm(sizes.hidden)
        self.embedding_dropout: nn.Module = nn.Dropout(0.0)  # set by the training
        self.dropout: nn.Module = nn.Dropout(0.0)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def zero_state(self, rows: int) -> Tensor:
        """Return the initial state [rows, layers, KERNEL, hidden]."""
        return self.head.weight.new_zeros(rows, self.sizes.layers, KERNEL, self.sizes.hidden)

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, T, vocabulary] and the final state, given characters [N, T] and the initial state."""
        x, states = self.embedding_dropout(self.embedding(characters)), []  # [N, T, hidden]
        for block, before in zip(self.blocks, state.unbind(1), strict=True):
            x, after = block(x, before)
            states.append(after)
        return self.head(self.dropout(self.norm(x))), torch.stack(states, dim=1)

    def for_generation(self) -> GatedSteps:
        """Return the network in a form that generates text faster."""
        return GatedSteps(self)


class GatedSteps:
    """A form of ``GatedRNN`` for generation. The scale and shift of each norm are merged into the following weights.

    The first matrix product depends on the character alone, so its results are precomputed in a table. The state of a
    block [N, KERNEL, hidden] has two parts. The first part is the recurrent state. The second part has, for each of the
    next KERNEL - 1 characters, the part of the convolution that depends on earlier characters.
    """

    def __init__(self, network: GatedRNN) -> None:
        self.width = network.sizes.hidden
        self.embedding = network.embedding.weight
        pack = packable(network.head.weight)
        self.blocks = []
        for block in network.blocks:
            assert isinstance(block, GatedBlock)
            self.split = block.split
            read = linear(*merge_norm(block.norm, block.read.weight, block.read.bias), pack)
            write = linear(block.write.weight, block.write.bias, pack)
            self.blocks.append((read, block.kernel.detach(), block.kernel.detach()[1:].flip(0), write))
        with torch.inference_mode():
            self.table = self.blocks[0][0](self._normalise(self.embedding))  # [vocabulary, (3 + 2 expansion) hidden]
        self.head = linear(*merge_norm(network.norm, network.head.weight, network.head.bias), pack)

    def read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read one character of each of N texts: characters [N], state [N, layers, KERNEL, hidden].

        Returns the hidden values [N, hidden], from which ``logits`` computes the logits, and the next state. The
        results are bit-identical to the results of ``read_many``, if ``Packed`` rounds each row independently. This
        method calls fewer operations, because with few texts the elementwise operations take as long as the matrix
        products.
        """
        x, after = self.embedding[characters], torch.empty_like(state)
        for i, (read, kernel, newest_first, write) in enumerate(self.blocks):
            parts = self.table[characters] if i == 0 else read(self._normalise(x))
            gates, inputs, output_gates = parts.split_with_sizes(self.split, 1)
            before, own, current = state[:, i], after[:, i], inputs[:, : self.width]
            torch.addcmul(before[:, 1:], current.unsqueeze(1), newest_first, out=own[:, :-1])
            torch.mul(current, kernel[0], out=own[:, -1])
            recurrent = own[:, 0]  # first the convolution, then the recurrent state
            torch.lerp(before[:, 0], recurrent, gates.sigmoid_(), out=recurrent)
            current.copy_(recurrent)
            x = x + write(inputs * F.silu(output_gates))
        return self._normalise(x), after

    def read_many(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read T characters of each of N texts: characters [N, T], state [N, layers, KERNEL, hidden].

        Returns the hidden values [N, T, hidden] and the final state. If ``Packed`` rounds each row independently of the
        other rows, the results are bit-identical, however a text is divided into several calls.
        """
        rows, count = characters.shape
        width, flat = self.width, characters.flatten()
        x, states = self.embedding[flat], []  # [N T, hidden]
        for i, ((read, kernel, _, write), before) in enumerate(zip(self.blocks, state.unbind(1), strict=True)):
            parts = self.table[flat] if i == 0 else read(self._normalise(x))
            gates, inputs, output_gates = parts.split_with_sizes(self.split, 1)
            current = inputs[:, :width].view(rows, count, width)
            convolved = current.new_zeros(rows, count + KERNEL - 1, width)
            convolved[:, : KERNEL - 1] = before[:, 1:]
            for distance in range(KERNEL - 1, -1, -1):
                convolved[:, distance : distance + count].addcmul_(current, kernel[KERNEL - 1 - distance])
            recurrent = recur(convolved[:, :count], gates.sigmoid().view(rows, count, width), before[:, 0])
            states.append(torch.cat([recurrent[:, -1:], convolved[:, count:]], dim=1))
            current.copy_(recurrent)
            x = x + write(inputs * F.silu(output_gates))
        return self._normalise(x).view(rows, count, width), torch.stack(states, dim=1)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, vocabulary] of the next character, given hidden values [N, hidden] from ``read``."""
        return self.head(hidden)
