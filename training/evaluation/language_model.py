"""Metrics and samples of a character-level language model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.tasks.text_generation import ContinueJob, TextGenerator
from training.data.datasets import Text
from training.data.texts import WINDOW, encode
from training.evaluation.calibration import divide_logits, fit_temperature
from training.run import metric, save_figure

MAX_TEST_CHARACTERS = 500_000  # largest number of characters that are evaluated
MAX_LOGITS = 2**24  # largest number of logits that are calibrated, so that they take at most 128 MiB in float64


def windows(parts: Sequence[Tensor], window: int = WINDOW) -> Tensor:
    """Return all complete windows [N, window + 1] of the parts. Each part has character indices [characters].

    Each window overlaps the next window of its part by one character, because the first character is not predicted.
    """
    return torch.cat([part.unfold(0, window + 1, window) for part in parts]).long()


def window_logits(network: Any, characters: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits [B, window, vocabulary] of batches of windows [N, window + 1], and the next characters.

    The next characters have the shape [B, window]. Each window starts from a zero state.
    """
    with torch.inference_mode():
        for batch in characters.split(64):
            logits, _ = network(batch[:, :-1], network.zero_state(len(batch)))
            yield logits, batch[:, 1:]


def window_losses(network: Any, *parts: Tensor, window: int = WINDOW) -> Tensor:
    """Return the mean loss [N] in nats per character of each complete window. Each window starts from a zero state.

    Each part has character indices. ``window`` is the length of a window in characters.
    """
    batches = window_logits(network, windows(parts, window))
    losses = [F.cross_entropy(logits.transpose(1, 2), following, reduction="none") for logits, following in batches]
    return torch.cat(losses).double().mean(dim=1)


def calibrate(network: Any, parts: Sequence[Tensor], window: int) -> float:
    """Divide the logits of a network by the temperature with the lowest loss on held-out text. Return the temperature.

    A network that was trained for many epochs on a short text is too sure of its predictions.

    Each part has character indices [N]. ``window`` is the length of an evaluation window in characters.
    """
    held_out = windows(parts, window)
    step = -(-len(held_out) * window * network.sizes.vocabulary // MAX_LOGITS)
    held_out = held_out[::step]
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in window_logits(network, held_out)])
    temperature = fit_temperature(logits, held_out[:, 1:].flatten())
    divide_logits(network, temperature)
    return temperature


def measure(generator: TextGenerator, text: Text, limit: int = MAX_TEST_CHARACTERS) -> dict[str, Any]:
    """Return the metrics of a published network for its card, from the first ``limit`` characters of the test part."""
    characters = encode(text.test[:limit], generator.vocabulary).to(generator.device)
    start = "the first characters of " if len(text.test) > limit else ""
    split = (
        f"{start}the last 10 % of the text, {len(characters):,} characters, in windows of {WINDOW} from a zero state"
    )
    losses = window_losses(generator.network, characters).cpu().numpy()
    return {
        "nats_per_character": metric(losses, split),
        "bits_per_character": metric(losses.mean() / math.log(2), split),
    }


def measure_held_out(network: Any, parts: Sequence[Tensor], window: int) -> dict[str, Any]:
    """Return the loss on the held-out parts as a metric for the card. Without parts, the result is empty.

    Each part has character indices [N].
    """
    if not parts or not len(parts[0]):
        return {}
    split = f"{sum(map(len, parts)):,} characters for validation, in windows of {window} from a zero state"
    return {"nats_per_character": metric(window_losses(network, *parts, window=window).cpu().numpy(), split)}


def generate(generator: TextGenerator, prompts: Sequence[str], characters: int = 400) -> list[str]:
    """Return each prompt with its continuation at temperature 0.8, computed by the serving code in one batch."""
    jobs = [ContinueJob([prompt], characters, 0.8, seed=seed) for seed, prompt in enumerate(prompts)]
    texts = [text for job in jobs for text in generator.prepare(job)]
    while unfinished := [text for text in texts if not text.finished]:
        generator.step(unfinished)
    return [prompt + text.text for prompt, text in zip(prompts, texts, strict=True)]


def draw_samples(path: Path, generator: TextGenerator, prompts: Sequence[str]) -> Path:
    """Save the prompts with their continuations as a picture at ``path``, and as a text file beside it."""
    from matplotlib.figure import Figure

    samples = generate(generator, prompts)
    path.with_suffix(".txt").write_text("\n\n----\n\n".join(samples), "utf-8")
    figure = Figure(figsize=(13, 4.5))
    for i, text in enumerate(samples):
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 52) or [""]]
        figure.text(0.02 + i * 0.33, 0.97, "\n".join(lines), family="monospace", fontsize=8, va="top", parse_math=False)
    return save_figure(figure, path)
