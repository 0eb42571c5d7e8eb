"""Elman layers over a whole piece of text, several times faster to train than ``nn.RNN`` on the CPU.

``nn.RNN`` makes an autograd node for each small operation of each time step, and its weight gradient one product a
step. Here the time loop is two calls a step each way, everything that needs no order is one large product, and the
first layer's input is a look-up: embedding times W_ih, for each character of the vocabulary, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.rnn import CharacterRNN, StackedRNN


class Recurrence(torch.autograd.Function):
    """h[t] = tanh(x[t] + h[t-1] W^T) for inputs x [T, N, H], state [N, H] and weight W [H, H]; gives h [T, N, H]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        states = torch.empty_like(inputs)
        transposed = weight.t()
        previous = state
        for x, h in zip(inputs.unbind(), states.unbind(), strict=True):
            torch.addmm(x, previous, transposed, out=h).tanh_()
            previous = h
        ctx.save_for_backward(states, state, weight)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, state, weight = ctx.saved_tensors
        slope = torch.addcmul(torch.ones((), dtype=states.dtype, device=states.device), states, states, value=-1)
        before = torch.empty_like(states)  # gradient at what goes into each tanh
        torch.mul(gradient[-1], slope[-1], out=before[-1])
        for t in range(len(states) - 2, -1, -1):
            torch.addmm(gradient[t], before[t + 1], weight, out=before[t]).mul_(slope[t])
        previous = torch.cat([state.unsqueeze(0), states[:-1]])
        return before, before[0] @ weight, before.flatten(0, 1).t() @ previous.flatten(0, 1)


def forward(
    network: CharacterRNN | StackedRNN, characters: Tensor, state: Tensor, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same as ``network(characters, state)``: characters [N, T] and state [N, layers, hidden] -> logits
    [N, T, vocabulary] and the state after the last.

    ``dropout`` is the share left out at random; the recurrence itself stays whole.
    """
    if isinstance(network, StackedRNN):
        return _stacked(network, characters, state, dropout)
    weights: Any = network.rnn
    bias = weights.bias_ih_l0 + weights.bias_hh_l0
    embedding = F.dropout(network.embedding.weight, dropout)
    table = F.linear(embedding, weights.weight_ih_l0, bias)  # [V, H]
    inputs = F.embedding(characters.t(), table)  # [T, N, H]
    states = Recurrence.apply(inputs, state.squeeze(1), weights.weight_hh_l0)
    return network.head(F.dropout(states, dropout).transpose(0, 1)), states[-1].unsqueeze(1)


def _stacked(network: StackedRNN, characters: Tensor, state: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """A quarter of the dropout on the embedding, all of it on what each layer adds and on what is read at the end."""
    x, last = F.dropout(F.embedding(characters.t(), network.embedding.weight), dropout / 4), []  # [T, N, H]
    for norm, rnn, gain, before in zip(network.norms, network.rnns, network.gain, state.unbind(1), strict=True):
        weights: Any = rnn
        inputs = F.linear(norm(x), weights.weight_ih_l0, weights.bias_ih_l0 + weights.bias_hh_l0)
        states = Recurrence.apply(inputs, before, weights.weight_hh_l0)
        x = x + F.dropout(gain * states, dropout)
        last.append(states[-1])
    logits = network.head(F.dropout(network.norm(x), dropout))
    return logits.transpose(0, 1), torch.stack(last, dim=1)
