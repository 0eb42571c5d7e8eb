"""A forward pass of the RNNs for training. On the CPU, it is several times faster than ``nn.RNN``.

``nn.RNN`` creates an autograd node for each operation of each time step, and computes the weight gradient with one
matrix product per step. In this module, a time step needs two operations in the forward pass and two in the backward
pass. All other matrix products cover all steps at once. A ``CharacterRNN`` reads its inputs from a table that holds the
product of embedding and W_ih for each character of the vocabulary.

A ``StackedRNN`` can compute its matrix products and recurrences in bfloat16. The weights, the layer norms and the
residual sums stay in float32. On a CPU with bfloat16 instructions, this takes half the time. The rounding error is far
smaller than the noise of dropout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.rnn import CharacterRNN, StackedRNN
from training.loops import distributed


class Recurrence(torch.autograd.Function):
    """Computes h[t] = tanh(x[t] + h[t-1] W^T) from inputs x [T, N, H], an initial state [N, H] and a weight W [H, H].

    Returns h [T, N, H] in the precision of x. The gradients of state and weight have the precision of state and weight.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        states = torch.empty_like(inputs)
        ctx.dtypes = state.dtype, weight.dtype
        weight = weight.to(inputs.dtype)
        transposed = weight.t()
        previous = state = state.to(inputs.dtype)
        for x, h in zip(inputs.unbind(), states.unbind(), strict=True):
            torch.addmm(x, previous, transposed, out=h).tanh_()
            previous = h
        ctx.save_for_backward(states, state, weight)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, state, weight = ctx.saved_tensors
        slope = torch.addcmul(torch.ones((), dtype=states.dtype, device=states.device), states, states, value=-1)
        before = torch.empty_like(states)  # gradient with respect to the input of each tanh
        torch.mul(gradient[-1], slope[-1], out=before[-1])
        for t in range(len(states) - 2, -1, -1):
            torch.addmm(gradient[t], before[t + 1], weight, out=before[t]).mul_(slope[t])
        previous = torch.cat([state.unsqueeze(0), states[:-1]])
        of_state, of_weight = before[0] @ weight, before.flatten(0, 1).t() @ previous.flatten(0, 1)
        return before, of_state.to(ctx.dtypes[0]), of_weight.to(ctx.dtypes[1])


def dropout(x: Tensor, probability: float, rows: int) -> Tensor:
    """Apply dropout with one random byte per element. The probability is rounded to a multiple of 1/256.

    ``F.dropout`` draws 64 bits per element on the CPU, which took a quarter of a training step. The dimension ``rows``
    of x contains the rows of the batch that this process trains on. Each process draws random bytes for the whole
    batch, and uses only the bytes of its own rows. So the result does not depend on the number of processes.
    """
    threshold = round(probability * 256)
    if not threshold:
        return x
    shape = [*x.shape[:rows], x.shape[rows] * distributed.world_size(), *x.shape[rows + 1 :]]
    random = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = distributed.shard(random.view(torch.uint8)[: math.prod(shape)].view(shape), rows) >= threshold
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


def forward(
    network: CharacterRNN | StackedRNN,
    characters: Tensor,
    state: Tensor,
    dropout_probability: float = 0.0,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the same as ``network(characters, state)``, but with dropout outside the recurrence.

    Takes characters [N, T] and a state [N, layers, hidden]. Returns logits [N, T, vocabulary] and the state after the
    last character. ``bfloat16``: whether a ``StackedRNN`` computes its matrix products in bfloat16.
    """
    if isinstance(network, StackedRNN):
        return _stacked(network, characters, state, dropout_probability, bfloat16)
    weights: Any = network.rnn
    bias = weights.bias_ih_l0 + weights.bias_hh_l0
    embedding = F.dropout(network.embedding.weight, dropout_probability)
    table = F.linear(embedding, weights.weight_ih_l0, bias)  # [V, H]
    inputs = F.embedding(characters.t(), table)  # [T, N, H]
    states = Recurrence.apply(inputs, state.squeeze(1), weights.weight_hh_l0)
    return network.head(dropout(states, dropout_probability, 1).transpose(0, 1)), states[-1].unsqueeze(1)


def _stacked(
    network: StackedRNN, characters: Tensor, state: Tensor, probability: float, bfloat16: bool
) -> tuple[Tensor, Tensor]:
    """Run a ``StackedRNN`` with dropout on the output of each layer and before the head.

    The dropout probability of the embedding is a quarter of ``probability``.
    """
    x, last = dropout(F.embedding(characters.t(), network.embedding.weight), probability / 4, 1), []  # [T, N, H]
    precision = torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16)
    for norm, rnn, gain, layer_state in zip(network.norms, network.rnns, network.gain, state.unbind(1), strict=True):
        weights: Any = rnn
        normed = norm(x)
        with precision:
            inputs = F.linear(normed, weights.weight_ih_l0, weights.bias_ih_l0 + weights.bias_hh_l0)
        states = Recurrence.apply(inputs, layer_state, weights.weight_hh_l0)
        x = x + dropout(gain * states, probability, 1)
        last.append(states[-1].to(x.dtype))
    normed = dropout(network.norm(x), probability, 1)
    with precision:
        logits = network.head(normed)
    return logits.to(x.dtype).transpose(0, 1), torch.stack(last, dim=1)
