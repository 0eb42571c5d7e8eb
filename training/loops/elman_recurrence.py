"""Elman layers over a whole piece of text, several times faster to train than ``nn.RNN`` on the CPU.

``nn.RNN`` makes an autograd node for each small operation of each time step, and its weight gradient one product a
step. Here the time loop is two calls a step each way, everything that needs no order is one large product, and the
first layer's input is a look-up: embedding times W_ih, for each character of the vocabulary, once.

Of a stack, the products may be in bfloat16 (sums, weights and all between the products stay float32), which a CPU with
instructions for it does in half the time: what that rounds away is far less than what dropout leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.rnn import CharacterRNN, StackedRNN


class Recurrence(torch.autograd.Function):
    """h[t] = tanh(x[t] + h[t-1] W^T) for inputs x [T, N, H], state [N, H] and weight W [H, H]; gives h [T, N, H].

    Computed in the precision of x; the gradients of state and weight have the precision of these.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        states = torch.empty_like(inputs)
        ctx.types = state.dtype, weight.dtype
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
        before = torch.empty_like(states)  # gradient at what goes into each tanh
        torch.mul(gradient[-1], slope[-1], out=before[-1])
        for t in range(len(states) - 2, -1, -1):
            torch.addmm(gradient[t], before[t + 1], weight, out=before[t]).mul_(slope[t])
        previous = torch.cat([state.unsqueeze(0), states[:-1]])
        of_state, of_weight = before[0] @ weight, before.flatten(0, 1).t() @ previous.flatten(0, 1)
        return before, of_state.to(ctx.types[0]), of_weight.to(ctx.types[1])


def dropout(x: Tensor, share: float) -> Tensor:
    """``F.dropout``, with the share rounded to 1/256 and a byte of randomness for each number of x.

    On the CPU PyTorch draws a number of 64 bits for each; that took a quarter of a training step.
    """
    threshold = round(share * 256)
    if not threshold:
        return x
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
    return x * kept.to(x.dtype).mul_(256 / (256 - threshold))


def forward(
    network: CharacterRNN | StackedRNN, characters: Tensor, state: Tensor, share: float = 0.0, low: bool = False
) -> tuple[Tensor, Tensor]:
    """The same as ``network(characters, state)``: characters [N, T] and state [N, layers, hidden] -> logits
    [N, T, vocabulary] and the state after the last.

    ``share`` is left out at random (dropout); the recurrence itself stays whole. ``low``: a stack's products are in
    bfloat16.
    """
    if isinstance(network, StackedRNN):
        return _stacked(network, characters, state, share, low)
    weights: Any = network.rnn
    bias = weights.bias_ih_l0 + weights.bias_hh_l0
    embedding = F.dropout(network.embedding.weight, share)
    table = F.linear(embedding, weights.weight_ih_l0, bias)  # [V, H]
    inputs = F.embedding(characters.t(), table)  # [T, N, H]
    states = Recurrence.apply(inputs, state.squeeze(1), weights.weight_hh_l0)
    return network.head(F.dropout(states, share).transpose(0, 1)), states[-1].unsqueeze(1)


def _stacked(network: StackedRNN, characters: Tensor, state: Tensor, share: float, low: bool) -> tuple[Tensor, Tensor]:
    """A quarter of the dropout on the embedding, all of it on what each layer adds and on what is read at the end."""
    x, last = dropout(F.embedding(characters.t(), network.embedding.weight), share / 4), []  # [T, N, H]
    lowered = torch.autocast(x.device.type, torch.bfloat16, enabled=low)
    for norm, rnn, gain, before in zip(network.norms, network.rnns, network.gain, state.unbind(1), strict=True):
        weights: Any = rnn
        read = norm(x)
        with lowered:
            inputs = F.linear(read, weights.weight_ih_l0, weights.bias_ih_l0 + weights.bias_hh_l0)
        states = Recurrence.apply(inputs, before, weights.weight_hh_l0)
        x = x + dropout(gain * states, share)
        last.append(states[-1].to(x.dtype))
    read = dropout(network.norm(x), share)
    with lowered:
        logits = network.head(read)
    return logits.to(x.dtype).transpose(0, 1), torch.stack(last, dim=1)
