"""The character network: indices of characters in, logits of the next character out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class CharacterRNNSizes:
    """``vocabulary`` counts the characters and one ``<unk>``; ``hidden`` is also the width of the embedding."""

    vocabulary: int
    hidden: int = 128


class CharacterRNN(nn.Module):
    """The workshop's RNN: an embedding, one Elman layer (tanh), a linear layer; its memory is the state [N, hidden]."""

    def __init__(self, sizes: CharacterRNNSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.rnn = nn.RNN(sizes.hidden, sizes.hidden, batch_first=True)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def zero_state(self, rows: int) -> Tensor:
        """What a text begins from: state [rows, hidden]."""
        return self.head.weight.new_zeros(rows, self.sizes.hidden)

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """characters [N, T] and state [N, hidden] -> logits [N, T, vocabulary] and the state after the last one."""
        outputs, last = self.rnn(self.embedding(characters), state.unsqueeze(0))  # [N, T, hidden], [1, N, hidden]
        return self.head(outputs), last.squeeze(0)
