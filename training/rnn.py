"""Train a network that continues text.

    python -m training.rnn                     # the workshop's RNN on tinyshakespeare: shakespeare-rnn
    python -m training.rnn --preset strong     # a residual stack of Elman layers: the next version of it
    python -m training.rnn --validation 0.05   # with a part held out, to choose its numbers

Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks import build
from app.networks.rnn import CharacterRNN, StackedRNN
from app.predictors.rnn import TextContinuer
from app.store import UNKNOWN
from training import data, elman
from training.run import Run, derive, metric, options, schedule, set_learning_rate

WINDOW = 256  # characters, as in nanoGPT, so that the loss compares with published ones
PLACES = 10  # where characters are held out: the end of the text alone is one play, and not like the others


@dataclass(frozen=True)
class Config:
    kind: str
    hidden: int
    layers: int
    epochs: int
    streams: int  # places of the text that are read side by side, the state carried on
    piece: int  # characters between two updates, and how far back the gradient goes
    learning_rate: float
    weight_decay: float
    clip: float  # of the gradient's norm
    average: float  # of the weights over steps: the published ones
    dropout: float  # share left out at random, see training/elman.py
    cold: float  # share of streams whose state starts from zero at a piece, as texts do when served
    unknown: float  # share of characters read as <unk>, so that it means "some character"
    validation: float  # share of the training part that is held out, in ten places; 0 once all numbers are chosen
    bfloat16: bool  # whether products are computed in it, where that is faster; only of a stack


PRESETS = {
    "workshop": Config("character-rnn", 128, 1, 40, 64, 64, 4e-3, 1e-4, 1.0, 0.999, 0.05, 0.05, 0.002, 0.0, False),
    "strong": Config("stacked-rnn", 640, 3, 40, 64, 128, 1.6e-3, 0.1, 1.0, 0.999, 0.38, 0.03, 0.002, 0.02, True),
}
NAMES = {"workshop": "shakespeare-rnn", "strong": "shakespeare-rnn"}
TITLES = {
    "character-rnn": "The workshop's RNN: one Elman layer that continues a text in the manner of Shakespeare's plays",
    "stacked-rnn": "A residual stack of Elman layers that continues a text in the manner of Shakespeare's plays",
}
BETAS = {"character-rnn": (0.9, 0.999), "stacked-rnn": (0.9, 0.99)}


def vocabulary_of(text: str) -> list[str]:
    """The characters of a text, sorted, and ``<unk>`` for all others."""
    return [*sorted(set(text)), UNKNOWN]


def encode(text: str, vocabulary: Sequence[str]) -> Tensor:
    """A text -> the indices [len(text)] of its characters."""
    index = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([index.get(character, len(vocabulary) - 1) for character in text])


def held_apart(characters: Tensor, share: float) -> tuple[Tensor, list[Tensor]]:
    """Characters to learn from, and a share of them held out in places spread evenly over the text."""
    length, part = int(len(characters) * share / PLACES), len(characters) // PLACES
    if share and length <= WINDOW:
        raise SystemExit(
            f"--validation {share} holds out {length} characters in each of {PLACES} places; "
            f"it takes {WINDOW + 1} to measure a window"
        )
    parts = [characters[i * part : (i + 1) * part if i < PLACES - 1 else None] for i in range(PLACES)]
    middle = (part - length) // 2
    learn = torch.cat([piece for part in parts for piece in (part[:middle], part[middle + length :])])
    return learn, [part[middle : middle + length] for part in parts]


def window_loss(network: Any, *parts: Tensor) -> float:
    """Nats a character over all whole windows of 256 characters of each part, each window read from a zero state."""
    windows = torch.stack(
        [part[start : start + WINDOW + 1] for part in parts for start in range(0, len(part) - WINDOW, WINDOW)]
    )
    total = 0.0
    with torch.inference_mode():
        for part in windows.split(64):
            logits, _ = network(part[:, :-1], network.zero_state(len(part)))
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * WINDOW)


def stream_loss(network: Any, characters: Tensor) -> float:
    """Nats a character over one reading of the whole text, the state carried on."""
    total, state = 0.0, network.zero_state(1)
    with torch.inference_mode():
        for start in range(0, len(characters) - 1, 4096):
            part = characters[start : start + 4097]
            logits, state = network(part[None, :-1], state)
            total += F.cross_entropy(logits[0], part[1:], reduction="sum").item()
    return total / (len(characters) - 1)


def evaluate(continuer: TextContinuer) -> dict[str, Any]:
    """The metrics of a published network, on the test part of its text."""
    text: data.Text = getattr(data, next(iter(continuer.card.data)))()
    characters = encode(text.test, continuer.vocabulary).to(continuer.device)
    split = f"the last 10 % of the text, {len(text.test):,} characters"
    window = window_loss(continuer.network, characters)
    return {
        "nats_per_character": metric(window, f"{split}, in windows of {WINDOW} from a zero state"),
        "bits_per_character": metric(window / math.log(2), f"{split}, in windows of {WINDOW} from a zero state"),
        "nats_per_character_carried": metric(stream_loss(continuer.network, characters), f"{split}, read in one go"),
    }


def continued(continuer: TextContinuer, prompt: str, seed: int, characters: int = 400) -> str:
    """A prompt and its continuation, as the service gives it at temperature 0.8."""
    begun, _ = continuer.parse(prompt)
    text = continuer.begin(begun, characters, 0.8, None, None, (), seed)
    while not text.finished:
        continuer.step([text])
    return prompt + text.text


def draw_samples(path: Path, continuer: TextContinuer) -> Path:
    """Three continuations as a picture, and as text beside it."""
    from matplotlib.figure import Figure

    texts = [
        continued(continuer, prompt, seed) for seed, prompt in enumerate(("ROMEO:", "First Citizen:\n", "To be, "))
    ]
    path.with_suffix(".txt").write_text("\n\n----\n\n".join(texts), "utf-8")
    figure = Figure(figsize=(13, 4.5))
    for i, text in enumerate(texts):
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 52) or [""]]
        figure.text(0.02 + i * 0.33, 0.97, "\n".join(lines), family="monospace", fontsize=8, va="top", parse_math=False)
    figure.savefig(path, dpi=80)
    return path


def begun(config: Config, vocabulary: int) -> Any:
    """A network with fresh weights."""
    sizes = {"vocabulary": vocabulary, "hidden": config.hidden, "layers": config.layers}
    network = build(config.kind, sizes)
    for name, weight in network.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(weight)  # keeps gradients alive over many steps (Henaff et al. 2016)
        elif config.kind == "stacked-rnn" and "weight_ih" in name:
            nn.init.xavier_uniform_(weight)
        elif config.kind == "stacked-rnn" and "bias" in name:
            nn.init.zeros_(weight)
    return network


def groups(network: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The parameters for the optimiser: of the stack, only matrices that read a layer decay, not the recurrent ones."""
    if config.kind == "character-rnn":
        return [{"params": list(network.parameters()), "weight_decay": config.weight_decay}]
    named = dict(network.named_parameters())
    decaying = [name for name, weight in named.items() if weight.ndim == 2 and "hh" not in name and name != "gain"]
    return [
        {"params": [named[name] for name in decaying], "weight_decay": config.weight_decay},
        {"params": [weight for name, weight in named.items() if name not in decaying], "weight_decay": 0.0},
    ]


def update(
    network: CharacterRNN | StackedRNN,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    piece: Tensor,
    state: Tensor,
    config: Config,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """One step on a piece [streams, T + 1] and the state [streams, layers, hidden] before it; gives loss and state."""
    low = config.bfloat16 and elman.fast_bfloat16(piece.device)
    hidden = torch.rand(piece.shape[0], piece.shape[1] - 1) < config.unknown
    read = piece[:, :-1].masked_fill(hidden.to(piece.device), network.sizes.vocabulary - 1)
    logits, state = elman.forward(network, read, state, config.dropout, low)
    loss = F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    optimizer.step()
    average.update_parameters(network)
    return loss, state.detach()


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = options(__doc__ or "", PRESETS, NAMES, argv)
    run = Run(chosen, config, argv)

    text = data.tinyshakespeare()
    vocabulary = vocabulary_of(text.train)
    characters = encode(text.train, vocabulary).to(chosen.device)
    learn, validate = held_apart(characters, config.validation)

    network = begun(config, len(vocabulary)).to(chosen.device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    optimizer = torch.optim.AdamW(groups(network, config), betas=BETAS[config.kind], fused=True)
    run.tensors["state"] = network.zero_state(config.streams)
    run.track(network=network, average=average, optimizer=optimizer)

    length = len(learn) // config.streams  # of one stream
    per_epoch = (length - 1) // config.piece
    total = config.epochs * per_epoch
    for step in run.steps(total):
        epoch, place = divmod(step, per_epoch)
        state = run.tensors["state"]
        start = derive(chosen.seed, "offset", epoch) % len(learn)  # every epoch cuts the text elsewhere
        at = start + torch.arange(config.streams).unsqueeze(1) * length + place * config.piece
        piece = learn[(at + torch.arange(config.piece + 1)) % len(learn)]  # [streams, piece + 1]
        cold = torch.rand(config.streams, 1, 1) < (1.0 if place == 0 else config.cold)
        state = state.masked_fill(cold.to(state.device), 0)
        rate = config.learning_rate * schedule(step, total)
        loss, run.tensors["state"] = update(network, average, optimizer, piece, state, config, rate)
        if place == per_epoch - 1:
            held = {"validation_loss": window_loss(average.module, *validate)} if config.validation else {}
            run.log(epoch=epoch + 1, loss=loss.item(), **held)

    publish(run, config, text, vocabulary, average.module)


def publish(run: Run, config: Config, text: data.Text, vocabulary: list[str], network: Any) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    card = {
        "task": "continue",
        "title": TITLES[config.kind],
        "kind": config.kind,
        "sizes": asdict(network.sizes),
        "inputs": [{"name": "characters", "dtype": "int64", "shape": [-1, -1]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, -1, len(vocabulary)]}],
        "vocabulary": vocabulary,
        "data": {"tinyshakespeare": text.sha256},
        "notes": (
            f"{config.validation:.0%} of the training part, in {PLACES} places, were not learnt but watched. "
            "Weights averaged over steps."
            if config.validation
            else "Its numbers were chosen with the last 5 % of the training part held out; then it learnt from all. "
            "Weights averaged over steps."
        ),
    }
    continuer = run.predictor(TextContinuer, card, network)
    card["metrics"] = evaluate(continuer)
    samples = draw_samples(run.folder / "samples.png", continuer)
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
