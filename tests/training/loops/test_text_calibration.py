"""Text networks are calibrated with one temperature on held-out text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.evaluation import language_model as calibration
from training.evaluation.calibration import divide_logits
from training.evaluation.language_model import window_losses, windows

CHARACTERS, WINDOW = 10, 16


class Bigrams(nn.Module):
    """A network whose probabilities of the next character are a table [CHARACTERS, CHARACTERS]."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.sizes = SimpleNamespace(vocabulary=CHARACTERS)
        self.head = nn.Linear(CHARACTERS, CHARACTERS)
        with torch.no_grad():
            self.head.weight.copy_(probabilities.log().T)
            self.head.bias.fill_(1)

    def zero_state(self, rows: int) -> None: ...

    def forward(self, characters: Tensor, state: None) -> tuple[Tensor, None]:
        return self.head(F.one_hot(characters, CHARACTERS).float()), state


@pytest.fixture
def probabilities() -> Tensor:
    """Return the probabilities of the next character, for each character."""
    return torch.randn(CHARACTERS, CHARACTERS, generator=torch.Generator().manual_seed(0)).softmax(dim=1)


@pytest.fixture
def text(probabilities: Tensor) -> Tensor:
    """Return 5,000 random characters."""
    generator, characters = torch.Generator().manual_seed(1), [0]
    for _ in range(5000):
        characters.append(int(torch.multinomial(probabilities[characters[-1]], 1, generator=generator)))
    return torch.tensor(characters)


@pytest.fixture
def network(probabilities: Tensor) -> Bigrams:
    """Return a network whose logits are three times too large."""
    network = Bigrams(probabilities)
    divide_logits(network, 1 / 3)
    return network


def test_logits_that_are_too_large_are_divided(network: Bigrams, text: Tensor) -> None:
    parts = [text[:2000], text[2100:]]
    logits, _ = network(text[:50], None)
    temperature = calibration.calibrate(network, parts, WINDOW)
    assert temperature == pytest.approx(3, rel=0.05)
    assert torch.allclose(network(text[:50], None)[0], logits / temperature, atol=1e-5)
    loss = window_losses(network, *parts, window=WINDOW).mean()
    for other in (0.9, 1.1):
        divide_logits(network, other)
        assert window_losses(network, *parts, window=WINDOW).mean() > loss
        divide_logits(network, 1 / other)
    assert calibration.calibrate(network, parts, WINDOW) == pytest.approx(1, abs=1e-3)


def test_some_windows_are_enough_for_a_large_vocabulary(
    network: Bigrams, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of all windows could take gigabytes."""
    sizes: list[int] = []
    fit_temperature = calibration.fit_temperature

    def fit(logits: Tensor, labels: Tensor) -> float:
        sizes.append(logits.numel())
        return fit_temperature(logits, labels)

    monkeypatch.setattr(calibration, "fit_temperature", fit)
    monkeypatch.setattr(calibration, "MAX_LOGITS", 20_000)
    calibration.calibrate(network, [text], WINDOW)
    assert 10_000 < sizes[0] <= 20_000


def test_windows_overlap_by_one_character() -> None:
    parts = [torch.arange(10), torch.arange(20, 27)]
    assert windows(parts, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [20, 21, 22, 23], [23, 24, 25, 26]]
