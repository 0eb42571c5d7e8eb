"""Train a network that continues text.

    python -m training.rnn                     # the workshop's RNN on tinyshakespeare: shakespeare-rnn
    python -m training.rnn --preset strong     # a residual stack of Elman layers: the next version of it
    python -m training.rnn --validation 0.05   # with a part held out, to choose its numbers
    python -m training.rnn --text FILE --name novel   # your own text, or several

Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app import store
from app.networks import build
from app.networks.rnn import CharacterRNN, StackedRNN
from app.store import UNKNOWN_CHARACTER
from app.tasks.precision import fast_bfloat16
from app.tasks.text_generation import TextGenerator
from training.configs import RNN_PRESETS, RnnConfig
from training.data import datasets, texts
from training.evaluation.language_model import (
    draw_samples,
    measure,
    window_loss,
)
from training.loops import distributed, elman_recurrence, time_budget
from training.loops.best_weights import Best
from training.options import Options, options, origin
from training.run import Run, derive, schedule, set_learning_rate

TUNED = 0.3  # of the learning rate, where a network knows another text already
OPTIONS: dict[str, dict[str, Any]] = {
    "--text": {"metavar": "FILE", "type": Path, "nargs": "+", "help": "UTF-8, one or several"},
    "--from": {
        "metavar": "NAME",
        "dest": "origin",
        "default": "scratch",
        "help": "network to begin with",
    },
    "--rarest": {"metavar": "N", "type": int, "default": 5, "help": "how often a character must come up to be learnt"},
}
NAMES = {"workshop": "shakespeare-rnn", "strong": "shakespeare-rnn"}
TITLES = {
    "character-rnn": "The workshop's RNN: one Elman layer that continues a text in the manner of Shakespeare's plays",
    "stacked-rnn": "A residual stack of Elman layers that continues a text in the manner of Shakespeare's plays",
}
BETAS = {"character-rnn": (0.9, 0.999), "stacked-rnn": (0.9, 0.99)}


def evaluate(continuer: TextGenerator) -> dict[str, Any]:
    """The metrics of a published network, on the test part of its text."""
    return measure(continuer, getattr(datasets, next(iter(continuer.card.data)))())


def begun(config: RnnConfig, vocabulary: int) -> Any:
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


def groups(network: nn.Module, config: RnnConfig) -> list[dict[str, Any]]:
    """The parameters for the optimiser: of the stack, only matrices that read a layer decay, not the recurrent ones."""
    if config.kind == "character-rnn":
        return [{"params": list(network.parameters()), "weight_decay": config.weight_decay}]
    named = dict(network.named_parameters())
    decaying = [name for name, weight in named.items() if weight.ndim == 2 and "hh" not in name and name != "gain"]
    return [
        {"params": [named[name] for name in decaying], "weight_decay": config.weight_decay},
        {"params": [weight for name, weight in named.items() if name not in decaying], "weight_decay": 0.0},
    ]


class Lesson(nn.Module):
    """The loss of a network on a piece of text, a mean over its characters."""

    def __init__(self, network: CharacterRNN | StackedRNN, config: RnnConfig) -> None:
        super().__init__()
        self.network, self.dropout = network, config.dropout
        self.low = config.bfloat16 and fast_bfloat16(network.head.weight.device)

    def forward(self, read: Tensor, following: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What is read, and what follows each of it, [streams, T]; the state before -> the loss, the state after."""
        logits, state = elman_recurrence.forward(self.network, read, state, self.dropout, self.low)
        return F.cross_entropy(logits.flatten(0, 1), following.flatten()), state


class Learner:
    """A network, its average, and how they learn."""

    def __init__(self, network: Any, config: RnnConfig, device: str = "cpu") -> None:
        self.config = config
        self.network = network.to(device)
        self.average: Any = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        self.optimizer = torch.optim.AdamW(groups(self.network, config), betas=BETAS[config.kind], fused=True)
        self.lesson = distributed.together(Lesson(self.network, config))

    def update(self, piece: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step on a piece [streams, T + 1]; gives the loss and the state after this process's share of it.

        state [streams, layers, hidden]: that before the share.
        """
        hidden = torch.rand(piece.shape[0], piece.shape[1] - 1) < self.config.unknown
        read = piece[:, :-1].masked_fill(hidden.to(piece.device), self.network.sizes.vocabulary - 1)
        distributed.draw_apart()  # dropout
        loss, state = self.lesson(distributed.share(read), distributed.share(piece[:, 1:]), state)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return loss, state.detach()


def learn_from(run: Run, config: RnnConfig, learn: Tensor, validate: list[Tensor], network: Any) -> Any:
    """The whole training on characters [N]; gives the averaged network, of own texts as it was when it did best."""
    own, device = run.options.preset == "own", run.options.device
    per_epoch = (len(learn) // config.streams - 1) // config.piece
    if not per_epoch:
        raise SystemExit(f"--piece {config.piece} is longer than each of {config.streams} streams of the text")

    def trial() -> Callable[[int], object]:
        other = Learner(copy.deepcopy(network), config, device)
        piece = learn[: config.streams * (config.piece + 1)].view(config.streams, -1)
        state = other.network.zero_state(config.streams // distributed.count())
        return lambda step: other.update(piece, state, config.learning_rate)

    total = time_budget.epochs(run, per_epoch, config.epochs, trial) * per_epoch
    if own:  # an average that is not older than the training
        config = dataclasses.replace(config, average=max(0.0, min(config.average, 1 - 20 / total)))
    learner = Learner(network, config, device)
    run.tensors["state"] = learner.network.zero_state(config.streams // distributed.count())
    best = {"best": Best(learner.average.module)} if own and config.validation else {}
    run.track(network=learner.network, average=learner.average, optimizer=learner.optimizer, **best)
    for step in run.steps(total):
        epoch, place = divmod(step, per_epoch)
        piece = piece_at(run, config, learn, epoch, place)
        cold = torch.rand(config.streams, 1, 1) < (1.0 if place == 0 else config.cold)
        state = run.tensors["state"].masked_fill(distributed.share(cold).to(device), 0)
        loss, run.tensors["state"] = learner.update(piece, state, config.learning_rate * schedule(step, total))
        if place == per_epoch - 1:
            held = {"validation_loss": window_loss(learner.average.module, *validate)} if config.validation else {}
            for kept in best.values():
                kept.offer(learner.average.module, held["validation_loss"])
            run.log(epoch=epoch + 1, loss=loss.item(), **held)
    for kept in best.values():
        learner.average.module.load_state_dict(kept.weights)
    return learner.average.module


def piece_at(run: Run, config: RnnConfig, learn: Tensor, epoch: int, place: int) -> Tensor:
    """The piece [streams, piece + 1] that is read next; every epoch cuts the text elsewhere."""
    start = derive(run.options.seed, "offset", epoch) % len(learn)
    at = start + torch.arange(config.streams).unsqueeze(1) * (len(learn) // config.streams) + place * config.piece
    return learn[(at + torch.arange(config.piece + 1)) % len(learn)]


def arguments(argv: Sequence[str] | None) -> tuple[Options, RnnConfig]:
    """What a command line says."""
    return options("training.rnn", __doc__ or "", RNN_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if chosen.preset == "own":
        train_own(chosen, config, argv)
        return
    text = datasets.tinyshakespeare()
    vocabulary = texts.vocabulary_of(text.train)
    run = Run(chosen, config, argv)
    learn, validate = texts.hold_out(texts.encode(text.train, vocabulary).to(chosen.device), config.validation)
    network = learn_from(run, config, learn, validate, begun(config, len(vocabulary)))
    notes = (
        f"{config.validation:.0%} of the training part, in {texts.HELD_OUT_PLACES} places, was held out. "
        "Weights averaged over steps."
        if config.validation
        else "Hyperparameters were chosen with the last 5 % of the training part held out; then it was trained on all "
        "of it. Weights averaged over steps."
    )
    card = {"title": TITLES[config.kind], "kind": config.kind, "data": {"tinyshakespeare": text.sha256}, "notes": notes}
    publish(run, card, text, vocabulary, network, ("ROMEO:", "First Citizen:\n", "To be, "))


def train_own(chosen: Options, config: RnnConfig, argv: Sequence[str] | None) -> None:
    """The caller's own text: read, learn, measure, publish."""
    base = origin(chosen, ("character-rnn", "stacked-rnn"))
    text = texts.read(chosen.own["text"])
    vocabulary = texts.vocabulary_of(text.train, chosen.own["rarest"])
    texts.report(text, vocabulary)
    if base:
        texts.check_known(base, text.train)
    run = Run(chosen, config, argv, text.sha256)
    characters = texts.encode(text.train, vocabulary).to(chosen.device)
    places = max(1, min(texts.HELD_OUT_PLACES, int(len(characters) * config.validation) // (4 * texts.WINDOW)))
    learn, validate = texts.hold_out(characters, config.validation, places)
    streams = distributed.even(min(config.streams, len(learn) // (4 * config.piece)))
    config = dataclasses.replace(config, streams=streams)
    network: Any = begun(config, len(vocabulary))
    if base:
        config = dataclasses.replace(config, kind=base.card.kind, learning_rate=config.learning_rate * TUNED)
        network = build(base.card.kind, {**base.card.sizes, "vocabulary": len(vocabulary)})
        network = texts.transfer_weights(network, vocabulary, base)
    network = learn_from(run, config, learn, validate, network)
    if distributed.rank() == 0:
        publish(run, own_card(chosen, config, text, base), text, vocabulary, network, texts.prompts(text.test))
    distributed.leave()


def own_card(chosen: Options, config: RnnConfig, text: datasets.Text, base: store.Version | None) -> dict[str, Any]:
    """What the card says of a text of the caller's own."""
    names = " ".join(path.name for path in chosen.own["text"])
    begin = f"Begun with {base.card.name} {base.card.version}. " if base else ""
    watched = f"{config.validation:.0%} of the training part were not learnt but watched: the weights, averaged over "
    watched += "steps, are those that did best on them. "
    return {
        "title": f"Continues a text in the manner of {names}"[:200],
        "kind": config.kind,
        "data": {f"text:{names}": text.sha256}
        | ({f"{base.card.name}@{base.card.version}": base.card.weights_sha256} if base else {}),
        "notes": (
            f"{begin}{watched if config.validation else 'Weights averaged over steps. '}"
            f"Characters that come up less than {chosen.own['rarest']} times are {UNKNOWN_CHARACTER}."
        ),
    }


def publish(
    run: Run, card: dict[str, Any], text: datasets.Text, vocabulary: list[str], network: Any, prompts: Sequence[str]
) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    card = {
        "task": "continue",
        "sizes": asdict(network.sizes),
        "inputs": [{"name": "characters", "dtype": "int64", "shape": [-1, -1]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, -1, len(vocabulary)]}],
        "vocabulary": vocabulary,
        **card,
    }
    continuer = run.predictor(TextGenerator, card, network)
    card["metrics"] = measure(continuer, text)
    samples = draw_samples(run.folder / "samples.png", continuer, prompts)
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
