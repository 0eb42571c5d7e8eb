"""Schedules, averages, augmentation, calibration and metrics of trainings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.networks import build
from training import run as running
from training.configs.classifiers import CnnConfig
from training.evaluation import generation, language_model
from training.evaluation.calibration import fit_temperature
from training.loops.airbench import Lookahead
from training.loops.classifier import augment
from training.loops.fit import BestWeights
from training.loops.gan import recalibrate_batchnorm


def test_augmented_images_are_shifted_and_mirrored_images() -> None:
    config = CnnConfig(shift=2, flip=True, rotate=0.0)
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    cuts = [padded[0, :, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    candidates = [*cuts, *(cut.flip(2) for cut in cuts)]
    torch.manual_seed(0)
    indices = set()
    for augmented in augment(image.expand(400, -1, -1, -1), config):
        indices.add(next(i for i, candidate in enumerate(candidates) if torch.equal(candidate, augmented)))
    assert len(indices) == 50


def test_the_spread_of_the_frechet_floor_is_that_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    second = torch.randn(2000, 3, generator=generator)
    draws = [generation.frechet_with_error(torch.randn(1000, 3, generator=generator), second) for _ in range(40)]
    floors, spreads = (torch.tensor(values) for values in zip(*draws, strict=True))
    assert spreads.mean() == pytest.approx(floors.std().item(), rel=0.35)


@pytest.mark.parametrize("labels", [None, pytest.param(torch.tensor([0] * 80 + [3] * 20), marks=pytest.mark.slow)])
def test_recalibrated_batch_norms_have_the_statistics_of_their_inputs(labels: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    network: Any = build("conditional-generator", {"latent": 4})
    with torch.no_grad():
        network.linear.weight.mul_(10)
    recalibrate_batchnorm(network, 50, labels)
    classes = torch.arange(500) % 10 if labels is None else labels.repeat(5)
    inputs = network.linear(torch.cat([torch.randn(500, 4), torch.eye(10)[classes]], dim=1)).unflatten(1, (49, -1))
    norm = network.norms[0].norm
    assert torch.allclose(norm.running_mean, inputs.mean(dim=(0, 1)), atol=0.2)
    assert torch.allclose(norm.running_var, inputs.var(dim=(0, 1)), rtol=0.1)


def test_the_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [running.cosine_schedule((step + 1) / 100) for step in range(100)]
    assert max(factors) == 1
    assert factors[0] < 0.3
    assert factors[-1] < 1e-3
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_lookahead_returns_to_the_slow_weights_and_ends_with_them() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    slow = Lookahead(network)
    weights = []
    with torch.no_grad():
        for step in range(13):
            network.weight.add_(1)
            slow.update(network, step, (step + 1) / 13)
            weights.append(network.weight.item())
    first, second = (1 - 0.95**5 * (step_count / 13) ** 3 for step_count in (5, 10))
    assert weights[:4] == [1, 2, 3, 4]
    assert weights[4] == pytest.approx(5 * first)
    assert weights[9] == pytest.approx(weights[4] + 5 * second)
    assert weights[10:] == pytest.approx([weights[9] + 1, weights[9] + 2, weights[9]])


def test_the_fitted_temperature_equals_that_of_the_labels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10_000, 5) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1).squeeze(1)
    for temperature in (0.4, 1.0, 3.0):
        assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_the_loss_of_a_network_with_equal_logits_is_the_log_of_the_vocabulary_size() -> None:
    network: Any = build("character-rnn", {"vocabulary": 10, "hidden": 4})
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    characters = torch.randint(10, (2000,))
    assert language_model.window_losses(network, characters).numpy() == pytest.approx(2.302585, abs=1e-5)


def test_the_weights_with_the_lowest_validation_loss_are_kept() -> None:
    network = torch.nn.Linear(1, 1)
    best = BestWeights(network)
    for weight, loss in ((1.0, 3.0), (2.0, 1.0), (3.0, 2.0)):
        torch.nn.init.constant_(network.weight, weight)
        best.update(network, loss, 5)
    restored = BestWeights(network)
    restored.load_state_dict(best.state_dict())
    assert (restored.network.weight.item(), restored.loss.item()) == (2, 1)
