"""The recipe of the character-level language models: truncated backpropagation through time.

``batch`` streams read the text in parallel, ``bptt`` characters per step. Each stream keeps its state between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks import build
from app.networks.gated_rnn import GatedBlock, GatedRNN
from app.networks.rnn import CharacterRNN
from app.store.version import Version
from training import cards
from training.configs.text import RnnConfig
from training.data.datasets import DataError
from training.data.speakers import RenamedSpeakers
from training.data.texts import decode
from training.loops.fit import AveragedRecipe, autocast, fit
from training.options import Options
from training.publishing import read_run
from training.run import Budget, Run, derive_seed


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
        for folder in folders:
            card, network, _ = read_run(folder, "--teachers")
            if card.vocabulary != list(vocabulary):
                raise DataError(f"--teachers {folder}: {card.name} has another vocabulary")
            cards.reject_seen(card, f"--teachers {folder}", data)
            self.networks.append(network.to(device).eval().requires_grad_(False))
            self.ancestors += cards.ancestors(card, "teacher", f"{card.name}, seed {card.seed}")

    def zero_states(self, rows: int) -> list[Tensor]:
        """Return the initial state of each teacher for ``rows`` texts."""
        return [network.zero_state(rows) for network in self.networks]

    def predict(self, characters: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the mean probabilities [N, T, V] of the next characters, and the new state of each teacher.

        ``characters``: vocabulary indices [N, T]. ``states``: the state of each teacher, at first from ``zero_states``.
        """
        total, after = torch.zeros((), device=characters.device), []
        with torch.no_grad(), autocast(characters.device):
            for network, state in zip(self.networks, states, strict=True):
                logits, state = network(characters, state)
                total = total + logits.float().softmax(dim=-1)
                after.append(state)
        return total / len(self.networks), after


BETAS = {"character-rnn": (0.9, 0.999), "gated-rnn": (0.9, 0.99)}  # betas of AdamW


def new_network(config: RnnConfig, vocabulary_size: int) -> Any:
    """Return a network with random weights."""
    sizes = {"vocabulary": vocabulary_size, "hidden": config.hidden, "layers": config.layers}
    network = build(config.kind, sizes)
    for name, weight in network.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(weight)  # keeps gradients from vanishing over many steps (Henaff et al. 2016)
    return network


def transfer_weights(network: Any, vocabulary: Sequence[str], base: Version) -> Any:
    """Copy the weights of ``base`` into ``network``; return ``network``.

    Characters that are not in the vocabulary of ``base`` get the weights of ``<unk>``.
    """
    base_vocabulary = base.card.vocabulary or []
    index = {character: i for i, character in enumerate(base_vocabulary)}
    rows = torch.tensor([index.get(character, len(base_vocabulary) - 1) for character in vocabulary])
    weights = dict(base.network().state_dict())
    for key in ("embedding.weight", "head.weight", "head.bias"):
        weights[key] = weights[key][rows]
    network.load_state_dict(weights)
    return network


def parameter_groups(network: nn.Module, config: RnnConfig) -> list[dict[str, Any]]:
    """Return the parameter groups for the optimizer.

    For a gated network, weight decay applies only to weight matrices. Convolution kernels have no weight decay.
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in network.named_parameters():
        groups[config.kind == "character-rnn" or (weight.ndim == 2 and "kernel" not in name)].append(weight)
    return [{"params": own, "weight_decay": config.weight_decay * decayed} for decayed, own in groups.items()]


def dropout_of(network: CharacterRNN | GatedRNN, probability: float) -> nn.Module:
    """Set the dropout of a gated network. Return the dropout for the embedding and the outputs of a ``CharacterRNN``.

    The embedding of a gated network has a quarter of the dropout.
    """
    if isinstance(network, GatedRNN):
        for block in network.blocks:
            assert isinstance(block, GatedBlock)
            block.dropout = nn.Dropout(probability)
        network.dropout = nn.Dropout(probability)
        network.embedding_dropout = nn.Dropout(probability / 4)
    return nn.Dropout(probability)


class TextRecipe(AveragedRecipe):
    """The recipe of the text networks; see ``training.loops.fit.Recipe``.

    It trains with truncated backpropagation through time.

    Args:
        network: the network.
        config: the hyperparameters.
        options: the options of the command.
        text: the characters [N] to train on.
        vocabulary: the vocabulary.
        validation: function that returns the loss of a network on text that is held out.
        teachers: networks from whose predictions the network learns as well.
    """

    def __init__(
        self,
        network: Any,
        config: RnnConfig,
        options: Options,
        text: Tensor,
        vocabulary: Sequence[str],
        validation: Callable[[Any], float] | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        network, groups = network.to(options.device), parameter_groups(network, config)
        super().__init__(network, config, BETAS[config.kind], groups, options.preset == "own", validation)
        self.average.eval()
        self.seed, self.text, self.teachers = options.seed, text, teachers
        self.device = torch.device(options.device)
        self.dropout = dropout_of(self.network, config.dropout)
        self.speakers = (
            RenamedSpeakers(decode(text, vocabulary), vocabulary, config.renamed_share, options.seed)
            if config.renamed_share
            else None
        )
        self.steps_per_epoch = count_steps(config, len(text))
        self.states = nn.Module()  # the recurrent states of the network and its teachers, as buffers
        teacher_states = teachers.zero_states(config.batch) if teachers else []
        self._keep([self.network.zero_state(config.batch), *teacher_states])

    def _keep(self, states: Sequence[Tensor]) -> None:
        for number, state in enumerate(states):
            self.states.register_buffer(str(number), state)

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step; return the loss."""
        config, (epoch, position) = self.config, divmod(step, self.steps_per_epoch)
        text = self.speakers.characters(epoch) if self.speakers else self.text
        characters = batch_at(text, config, self.seed, epoch, position).to(self.device)
        reset = torch.rand(config.batch) < (1.0 if position == 0 else config.reset_state)
        for state in self.states.buffers():
            state[reset.to(state.device)] = 0
        unknown = torch.rand(config.batch, config.bptt) < config.unknown_share
        inputs = characters[:, :-1].masked_fill(unknown.to(self.device), self.network.sizes.vocabulary - 1)
        loss = self._loss(characters, inputs)
        self.descend(loss, done)
        return {"loss": loss}

    def _loss(self, characters: Tensor, inputs: Tensor) -> Tensor:
        """Return the mean loss per character on characters [batch, bptt + 1], and update the states.

        ``inputs`` [batch, bptt] are the characters that the network reads, some of which are unknown.
        """
        own_state, *states = self.states.buffers()
        logits, own_state = self._logits(inputs, own_state)
        loss = F.cross_entropy(logits.flatten(0, 1), characters[:, 1:].flatten())
        if self.teachers:
            probabilities, states = self.teachers.predict(characters[:, :-1], states)
            distillation_loss = F.cross_entropy(logits.flatten(0, 1), probabilities.flatten(0, 1))
            loss = torch.lerp(loss, distillation_loss, self.config.distillation_weight)
        self._keep([own_state.detach(), *states])
        return loss

    def _logits(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [batch, bptt, V] and the state after the last input."""
        network = self.network
        if isinstance(network, CharacterRNN):
            embedded = F.embedding(inputs, self.dropout(network.embedding.weight))
            outputs, last = network.rnn(embedded, state.transpose(0, 1).contiguous())
            return network.head(self.dropout(outputs)), last.transpose(0, 1)
        with autocast(self.device):
            logits, state = network(inputs, state)
        return logits.float(), state


def train(run: Run, recipe: TextRecipe, keep_best: bool, refit: bool) -> tuple[Any, Budget]:
    """Train a network. Return the averaged network, and the budget of a second training on the whole text.

    ``keep_best``: whether to return the averaged weights with the lowest validation loss, because small texts are soon
    memorised. ``refit``: whether the second training follows.
    """
    epochs = recipe.config.epochs
    fit(run, recipe, run.budget(epochs * recipe.steps_per_epoch, refit), epochs)
    best = recipe.best if keep_best else None
    if best is None:
        return recipe.average.module, Budget(run.step, total=run.step)
    if run.step and not best.steps:
        raise SystemExit("the training diverged: no validation loss was finite; use a lower learning_rate")
    return best.network, Budget(int(best.steps), total=run.step)


def count_steps(config: RnnConfig, characters: int) -> int:
    """Return the number of steps per epoch. Exits with a message if the text is too short for one step."""
    stream_length = characters // config.batch
    if stream_length < 2:
        raise SystemExit(
            f"the training part has only {characters:,} characters, which is too short for batch={config.batch}"
        )
    steps_per_epoch = (stream_length - 1) // config.bptt
    if steps_per_epoch < 1:
        raise SystemExit(
            f"bptt={config.bptt} is too large: with batch={config.batch} each stream has {stream_length:,} "
            f"characters, so at most {stream_length - 1:,} are possible"
        )
    return steps_per_epoch


def batch_at(train: Tensor, config: RnnConfig, seed: int, epoch: int, step: int) -> Tensor:
    """Return the characters [batch, bptt + 1] of a step. The streams start at different places in each epoch."""
    offset = derive_seed(seed, "offset", epoch) % len(train)
    starts = offset + torch.arange(config.batch).unsqueeze(1) * (len(train) // config.batch) + step * config.bptt
    return train[(starts + torch.arange(config.bptt + 1)) % len(train)].long()
