"""Train a network that generates text.

    quartet train rnn                            # shakespeare-rnn: the workshop's RNN on tinyshakespeare
    quartet train rnn --preset gated             # shakespeare-rnn, with gated linear recurrences
    quartet train rnn --preset gated --from shakespeare-rnn@4 --epochs 0    # only calibrate a published network
    quartet train rnn --set validation=0.05    # hold out 5 % of the training part, to compare options
    quartet train rnn --text FILE --name novel   # preset own: your text, from one or more files

The gated network reads all characters of a prompt in parallel. docs/measurements.md and the model cards contain the
measured results.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from app import store
from app.networks import build
from app.store import UNKNOWN_CHARACTER
from app.store.version import Version
from app.tasks.text_generation import TextGenerator
from training import cards
from training.configs.numbers import Described
from training.configs.text import RNN_PRESETS, RnnConfig
from training.data import datasets, texts
from training.evaluation.calibration import divide_logits
from training.evaluation.language_model import (
    calibrate,
    draw_samples,
    measure,
    measure_held_out,
    window_losses,
)
from training.loops.fit import fit
from training.loops.language_model import Teachers, TextRecipe, new_network, train, transfer_weights
from training.options import Name, Options, Part, Refit, base_version, flags, parse_options
from training.run import Run, run_command

KINDS = ("character-rnn", "gated-rnn")
FINETUNE_FACTOR = 0.3  # factor of the learning rate with --from


class RnnOptions(Described):
    """The options for the user's texts. ``origin`` and ``teachers`` are also options of the other presets."""

    text: list[Path] = Field([])
    """text files and folders, joined in this order"""
    encoding: Name | None = None
    """encoding, such as cp1252 (default: UTF-8, UTF-16 or UTF-32)"""
    origin: Name = Field(Name("scratch"), alias="from")
    """model to fine-tune: NAME or NAME@VERSION; scratch: start from random weights. The new network has the kind and
    the sizes of this model, and the learning rate is multiplied by 0.3. All presets accept this option"""
    teachers: list[Path] = Field([])
    """folders of finished runs or published versions whose networks have the same vocabulary as the new network. The
    new network also learns from the mean of their predictions (distillation). All presets accept this option"""
    min_count: int = 5
    """replace characters that occur fewer than N times by <unk>"""
    refit: Refit = False


NAMES = {"workshop": "shakespeare-rnn", "gated": "shakespeare-rnn"}
TITLES = {
    "character-rnn": "The workshop's RNN: one Elman layer that continues a text in the manner of Shakespeare's plays",
    "gated-rnn": "Gated linear recurrences that continue a text in the manner of Shakespeare's plays",
}
PROMPTS = ("ROMEO:", "First Citizen:\n", "To be, ")  # prompts of the samples on the card


def main(argv: Sequence[str] | None = None) -> None:
    """Train a network on tinyshakespeare or on the user's texts, measure it, and publish it.

    A network for the user's texts is trained again on all texts before it is published, unless an option prevents this.
    """
    options, config = arguments(argv)
    is_own = options.preset == "own"
    if is_own:
        text = read_own(options, config)
        data = {f"text:{texts.name_of(path)}": text.sha256 for path in options.text}
        vocabulary = texts.own_vocabulary(text.train, options.min_count)
        texts.report(text, vocabulary)
        if options.preview:
            return
    else:
        text = datasets.tinyshakespeare()
        data, vocabulary = {"tinyshakespeare": text.sha256}, texts.vocabulary_of(text.train)
    base = read_base(options, config, data)
    if is_own and base:
        texts.check_known(base, text.train)
    teachers = Teachers(options.teachers, vocabulary, options.device, data) if options.teachers else None
    run = Run(options, config, argv, text.sha256 if is_own else None)
    characters = texts.encode(text.train, vocabulary)
    kept, validation, window = texts.hold_out(characters, config.validation, config.validation_parts, limited=is_own)
    validation = [part.to(options.device) for part in validation]
    if is_own:
        config = config.model_copy(update={"batch": min(config.batch, len(kept) // (4 * config.bptt))})
    config, network = initial_network(config, base, vocabulary)
    refits, initial = is_own and options.refits and config.epochs > 0, copy.deepcopy(network)

    def loss(network: Any) -> float:
        return window_losses(network, *validation, window=window).mean().item()

    recipe = TextRecipe(network, config, options, kept, vocabulary, loss if validation else None, teachers)
    network, budget = train(run, recipe, is_own, refits)
    temperature = calibrate(network, validation, window) if validation else None
    ancestors = (cards.ancestors(base.card, "base") if base else []) + (teachers.ancestors if teachers else [])
    card = {
        **cards.fields(config.kind, network, vocabulary=vocabulary),
        "title": TITLES[config.kind],
        "data": data,
        "ancestors": ancestors or None,
        "notes": notes(options, config, temperature),
    }
    if is_own:
        card["title"] = " ".join(["Continues a text in the manner of", *(key[len("text:") :] for key in data)])[:200]

    def evaluate(tested: TextGenerator, part: Part) -> dict[str, Any]:
        return measure(tested, text) if part == "test" else measure_held_out(tested.network, validation, window)

    card, _ = run.measure(card, network, evaluate, examples=[texts.chunks(text.train)])
    if refits:
        characters = texts.encode(text.train + text.test, vocabulary)
        recipe = TextRecipe(initial, config, options, characters, vocabulary, teachers=teachers)
        run.begin_refit()
        fit(run, recipe, budget, config.epochs)
        network, card = divide_logits(recipe.average.module, temperature or 1.0), cards.after_refit(card, budget.steps)
    prompts = texts.prompts(text.test if options.part == "test" else text.train) if is_own else PROMPTS
    generator = run.predictor(card, network)
    run.finish(card, network, draw_samples(run.folder / "samples.png", generator, prompts))


def read_own(options: Options, config: RnnConfig, card: store.Card | None = None) -> datasets.Text:
    """Read the user's text."""
    return texts.read(options.text, options.encoding)


measure_own = measure


def notes(options: Options, config: RnnConfig, temperature: float | None) -> str:
    """Return the notes for the card: what is evident neither from the command nor from other fields."""
    is_own, sentences = options.preset == "own", []
    if config.validation:
        sentences.append(f"About {config.validation:.0%} of the training part was held out for validation.")
    if config.epochs:
        kept = ", and those with the lowest validation loss were kept" if is_own and config.validation else ""
        sentences.append(f"The weights were averaged over steps{kept}.")
    if is_own:
        sentences.append(f"Characters that occur less than {options.min_count} times are {UNKNOWN_CHARACTER}.")
    if config.epochs and config.renamed_share:
        sentences.append(f"In each epoch, {config.renamed_share:.0%} of the speakers had invented names.")
    if temperature is not None:
        best = "which gives the lowest loss on the held-out characters"
        sentences.append(f"The logits were divided by {temperature:.3g}, {best}.")
    return " ".join(sentences)


def arguments(argv: Sequence[str] | None) -> tuple[Options, RnnConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides.

    Exits with a message if ``--epochs`` is too small, or there are too many layers for the kind of network.
    """
    options, config = parse_options("training.rnn", __doc__ or "", RNN_PRESETS, NAMES, argv, flags(RnnOptions))
    if not config.epochs and options.origin == "scratch":
        raise SystemExit("--epochs is 0; it should be at least 1, or 0 with --from")
    if config.kind == "character-rnn" and config.layers > 1:
        raise SystemExit(f"layers is {config.layers}; the preset {options.preset} has one layer")
    return options, config


def evaluate(generator: TextGenerator) -> dict[str, Any]:
    """Return the metrics of a published network on the test part of its text."""
    return measure(generator, getattr(datasets, next(iter(generator.card.data)))())


def initial_network(config: RnnConfig, base: Version | None, vocabulary: Sequence[str]) -> tuple[RnnConfig, Any]:
    """Return the config, with the kind and the learning rate that fit the network, and the network to train.

    The network starts from the weights of ``base`` or, without ``base``, from random weights.
    """
    if not base:
        return config, new_network(config, len(vocabulary))
    config = config.model_copy(update={"kind": base.card.kind, "learning_rate": config.learning_rate * FINETUNE_FACTOR})
    network = build(base.card.kind, {**base.card.sizes, "vocabulary": len(vocabulary)})
    return config, transfer_weights(network, vocabulary, base)


def read_base(options: Options, config: RnnConfig, data: dict[str, str]) -> Version | None:
    """Return the version given by ``--from``, or None for ``--from scratch``.

    Exits with a message if ``hidden`` or ``layers`` was changed to another value than the version has.

    Args:
        options: the options of the command.
        config: the preset's config with all overrides.
        data: the SHA-256 of the text by its key in the field ``data`` of a card.

    Raises:
        DataError: the version cannot be used, or it was trained on all of the text.
    """
    base = base_version(options, KINDS)
    if base:
        preset = RNN_PRESETS[options.preset]
        cards.reject_seen(base.card, f"--from {base.label}", data)
        for name in ("hidden", "layers"):
            value, size = getattr(config, name), base.card.sizes.get(name, 1)
            if value not in (getattr(preset, name), size):
                raise SystemExit(f"{name} is {value}, but the network in --from {base.label} has {size}; omit it")
    return base


if __name__ == "__main__":
    run_command(main)
