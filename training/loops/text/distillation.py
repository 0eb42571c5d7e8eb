"""Distillation: a network learns from the text and from the predictions of other networks, the teachers.

The mean prediction of several networks is better than the prediction of any single one of these networks. A single
network can learn most of this improvement (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.tasks.precision import fast_bfloat16
from training import lineage
from training.data.datasets import DataError
from training.publishing import read_run


class Teachers:
    """Trained text networks, read from the folders of finished runs or of published versions.

    Args:
        folders: the folders, each with card and weights.
        vocabulary: the vocabulary of the network that learns. Each teacher must have the same vocabulary.
        device: device of the teachers.
        data: the SHA-256 of the text by its key in the field ``data`` of a card.

    Raises:
        DataError: a folder has no card or weights, or a teacher has another vocabulary or was trained on all of the
            text.
    """

    def __init__(self, folders: Sequence[Path], vocabulary: Sequence[str], device: str, data: dict[str, str]) -> None:
        self.ancestors: list[dict[str, Any]] = []  # for the card of the network that learns
        self.networks: list[Any] = []
        self._use_bfloat16 = fast_bfloat16(torch.device(device))
        for folder in folders:
            try:
                card, network, _ = read_run(folder, "--teachers")
            except ValueError as error:
                raise DataError(str(error)) from error
            if card.vocabulary != list(vocabulary):
                raise DataError(f"--teachers {folder}: {card.name} has another vocabulary")
            lineage.reject_seen(card, f"--teachers {folder}", data)
            self.networks.append(network.to(device).eval().requires_grad_(False))
            self.ancestors += lineage.ancestors(card, "teacher", f"{card.name}, seed {card.seed}")

    def zero_states(self, rows: int) -> list[Tensor]:
        """Return the initial state of each teacher for ``rows`` texts."""
        return [network.zero_state(rows) for network in self.networks]

    def predict(self, characters: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the mean probabilities [N, T, V] of the next characters, and the new state of each teacher.

        ``characters``: vocabulary indices [N, T]. ``states``: the state of each teacher, at first from ``zero_states``.
        """
        total, after = torch.zeros((), device=characters.device), []
        with torch.no_grad(), torch.autocast(characters.device.type, torch.bfloat16, enabled=self._use_bfloat16):
            for network, state in zip(self.networks, states, strict=True):
                logits, state = network(characters, state)
                total = total + logits.float().softmax(dim=-1)
                after.append(state)
        return total / len(self.networks), after
