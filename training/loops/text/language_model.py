"""Training loop of the character-level language models: truncated backpropagation through time.

``batch`` streams read the text in parallel, ``bptt`` characters per step. Each stream keeps its state between steps.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks import build
from app.networks.gated_rnn import GatedBlock, GatedRNN
from app.networks.rnn import CharacterRNN, StackedRNN
from app.store.version import Version
from app.tasks.precision import fast_bfloat16
from training.configs import RnnConfig
from training.data.texts import WINDOW, TrainingText
from training.evaluation.language_model import window_loss
from training.loops import distributed, time_budget
from training.loops.best_weights import BestWeights
from training.loops.text import elman_recurrence
from training.loops.text.distillation import Teachers
from training.run import Run, cosine_schedule, derive_seed, set_learning_rate

MIN_STEPS_PER_VALIDATION, MAX_VALIDATIONS = 50, 30  # limits of the validations with --minutes
BETAS = {"character-rnn": (0.9, 0.999), "stacked-rnn": (0.9, 0.99), "gated-rnn": (0.9, 0.99)}  # betas of AdamW


def new_network(config: RnnConfig, vocabulary_size: int) -> Any:
    """Return a network with random weights."""
    sizes = {"vocabulary": vocabulary_size, "hidden": config.hidden, "layers": config.layers}
    network = build(config.kind, sizes)
    for name, weight in network.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(weight)  # keeps gradients from vanishing over many steps (Henaff et al. 2016)
        elif config.kind == "stacked-rnn" and "weight_ih" in name:
            nn.init.xavier_uniform_(weight)
        elif config.kind == "stacked-rnn" and "bias" in name:
            nn.init.zeros_(weight)
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

    For a stack or a gated network, weight decay applies only to weight matrices. Recurrent matrices, gains and
    convolution kernels have no weight decay.
    """
    if config.kind == "character-rnn":
        return [{"params": list(network.parameters()), "weight_decay": config.weight_decay}]
    named = dict(network.named_parameters())
    decayed = [name for name, weight in named.items() if weight.ndim == 2 and not re.search("hh|gain|kernel", name)]
    return [
        {"params": [named[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [weight for name, weight in named.items() if name not in decayed], "weight_decay": 0.0},
    ]


class LossModule(nn.Module):
    """Computes the mean cross-entropy per character. It is a module, because DistributedDataParallel needs a module."""

    def __init__(self, network: CharacterRNN | StackedRNN | GatedRNN, config: RnnConfig) -> None:
        super().__init__()
        self.network, self.dropout, self.distillation_weight = network, config.dropout, config.distillation_weight
        if isinstance(network, GatedRNN):
            set_dropout(network, config.dropout)
        self.use_bfloat16 = bool(config.bfloat16) and fast_bfloat16(network.head.weight.device)

    def forward(
        self, inputs: Tensor, targets: Tensor, state: Tensor, teacher_probabilities: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the state after the last input.

        ``inputs``, ``targets``: characters [batch, T]. ``state`` [batch, layers, ...]: the state before the first
        input. ``teacher_probabilities`` [batch, T, V]: the mean probabilities of the teachers.
        """
        if isinstance(self.network, GatedRNN):
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.use_bfloat16):
                logits, state = self.network(inputs, state)
            logits = logits.float()
        else:
            logits, state = elman_recurrence.forward(self.network, inputs, state, self.dropout, self.use_bfloat16)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if teacher_probabilities is not None:
            distillation_loss = F.cross_entropy(logits.flatten(0, 1), teacher_probabilities.flatten(0, 1))
            loss = torch.lerp(loss, distillation_loss, self.distillation_weight)
        return loss, state


class Dropout(nn.Module):
    """Applies ``elman_recurrence.dropout``, which is faster than ``nn.Dropout`` on the CPU."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return elman_recurrence.dropout(x, self.probability, 0) if self.training else x


def set_dropout(network: GatedRNN, probability: float) -> None:
    """Set the dropout of a network to ``probability``, and the dropout of its embedding to a quarter of it."""
    for block in network.blocks:
        assert isinstance(block, GatedBlock)
        block.dropout = Dropout(probability)
    network.dropout = Dropout(probability)
    network.embedding_dropout = Dropout(probability / 4)


class Trainer:
    """Holds a network, its moving average, its optimizer and its teachers. Several processes can share each batch."""

    def __init__(self, network: Any, config: RnnConfig, device: str = "cpu", teachers: Teachers | None = None) -> None:
        self.config, self.teachers = config, teachers
        self.network = network.to(device)
        self.average: Any = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).eval()
        groups = parameter_groups(self.network, config)
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS[config.kind], fused=True)
        self.loss_module = distributed.data_parallel(LossModule(self.network, config))

    def update(
        self, characters: Tensor, state: Tensor, learning_rate: float, teacher_probabilities: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Train one step on characters [batch, bptt + 1]; return the loss and the new state.

        ``state`` [batch / processes, layers, ...] and ``teacher_probabilities`` [batch / processes, bptt, V] are for
        this process's share of the batch.
        """
        unknown = torch.rand(characters.shape[0], characters.shape[1] - 1) < self.config.unknown_share
        inputs = characters[:, :-1].masked_fill(unknown.to(characters.device), self.network.sizes.vocabulary - 1)
        loss, state = self.loss_module(
            distributed.shard(inputs), distributed.shard(characters[:, 1:]), state, teacher_probabilities
        )
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return loss, state.detach()


def fit(
    run: Run,
    config: RnnConfig,
    train: TrainingText,
    validation: list[Tensor],
    network: Any,
    keep_best: bool = False,
    window: int = WINDOW,
    timed_evaluation: Callable[[Any], float] | None = None,
    refit: bool = False,
    teachers: Teachers | None = None,
) -> tuple[Any, tuple[int, int]]:
    """Train a network. Return the averaged network, and a pair: its number of steps, and the number of all steps.

    Args:
        validation: the characters [N] of each part that is held out; ``window`` characters are evaluated at a time.
        keep_best: return the averaged weights with the lowest validation loss, because small texts are soon memorised.
        timed_evaluation: runs the final evaluation on an untrained network; ``--minutes`` needs its duration.
        refit: whether ``fit_again`` will follow, which takes as long as this training.
        teachers: networks from whose predictions the network learns as well.
    """
    device = run.options.device
    steps_per_epoch = count_steps(config, train.length)

    def start_dummy_run() -> Callable[[int], object]:
        trainer = Trainer(copy.deepcopy(network), config, device, teachers)
        characters = batch_at(train.characters(0), config, run.options.seed, 0, 0).to(device)
        return lambda step: _dummy_step(trainer, characters)

    def evaluate_untrained() -> float:
        return timed_evaluation(network) if timed_evaluation else 0.0

    budget = time_budget.plan(run, config.epochs * steps_per_epoch, start_dummy_run, evaluate_untrained, refit)
    total, validate_every = budget.steps, steps_per_epoch
    if run.options.minutes is not None:  # an epoch of a long text may take longer than the run
        validate_every = min(steps_per_epoch, max(MIN_STEPS_PER_VALIDATION, total // MAX_VALIDATIONS))
    if keep_best:
        config = _averaged(config, total)
    trainer = Trainer(network, config, device, teachers)
    _begin(run, trainer)
    best = BestWeights(trainer.average.module) if keep_best and config.validation else None
    tracked = {"network": trainer.network, "average": trainer.average, "optimizer": trainer.optimizer}
    run.track(**tracked, **({"best": best} if best else {}))
    for step in run.steps(budget):
        total = budget()
        loss = _train_step(run, trainer, train, step, total)
        if (step + 1) % validate_every == 0 or step + 1 == total:
            metrics = {}
            if config.validation:
                metrics["validation_loss"] = window_loss(trainer.average.module, *validation, window=window)
            if best:
                best.update(trainer.average.module, metrics["validation_loss"], step + 1)
            run.log(epoch=step // steps_per_epoch + 1, loss=loss.item(), **metrics)
    if best:
        if total and not best.loss.isfinite():
            raise SystemExit("the training diverged: no validation loss was finite; use a lower --learning-rate")
        trainer.average.module.load_state_dict(best.weights)
    # The refit of all processes must have the same number of steps, but rounding may change the validation losses.
    steps = distributed.from_rank_zero(lambda: int(best.steps)) if best else total
    return trainer.average.module, (steps, total)


def fit_again(
    run: Run,
    config: RnnConfig,
    text: TrainingText,
    network: Any,
    steps: int,
    total: int,
    teachers: Teachers | None = None,
) -> Any:
    """Train on the whole text and return the averaged network.

    The training ends after ``steps`` steps. Its learning rate falls as in a training with ``total`` steps.
    """
    trainer = Trainer(network, _averaged(config, total), run.options.device, teachers)
    run.begin_refit()
    _begin(run, trainer)
    run.track(network=trainer.network, average=trainer.average, optimizer=trainer.optimizer)
    for step in run.steps(steps):
        loss = _train_step(run, trainer, text, step, total)
        if (step + 1) % MIN_STEPS_PER_VALIDATION == 0 or step + 1 == steps:
            run.log(loss=loss.item())
    return trainer.average.module


def _begin(run: Run, trainer: Trainer) -> None:
    """Set the initial states of the network and of its teachers. These states are parts of the checkpoint."""
    rows = trainer.config.batch // distributed.world_size()
    run.tensors["state"] = trainer.network.zero_state(rows)
    states = trainer.teachers.zero_states(rows) if trainer.teachers else []
    run.tensors.update({_teacher_state(number): state for number, state in enumerate(states)})


def _teacher_state(number: int) -> str:
    return f"state of teacher {number}"


def _averaged(config: RnnConfig, steps: int) -> RnnConfig:
    """Return a copy of the config whose moving average of the weights covers at most 5 % of the steps."""
    return dataclasses.replace(config, ema_decay=max(0.0, min(config.ema_decay, 1 - 20 / max(steps, 1))))


def _train_step(run: Run, trainer: Trainer, train: TrainingText, step: int, total: int) -> Tensor:
    """Train one step with the states of the run, update them, and return the loss. ``total``: number of all steps."""
    config = trainer.config
    epoch, step_of_epoch = divmod(step, count_steps(config, train.length))
    characters = batch_at(train.characters(epoch), config, run.options.seed, epoch, step_of_epoch)
    characters = characters.to(run.options.device)
    reset = torch.rand(config.batch) < (1.0 if step_of_epoch == 0 else config.reset_state)
    for name, state in run.tensors.items():
        run.tensors[name] = state.clone()
        run.tensors[name][distributed.shard(reset).to(state.device)] = 0
    teacher_probabilities = None
    if trainer.teachers:
        names = [_teacher_state(number) for number in range(len(trainer.teachers.networks))]
        states = [run.tensors[name] for name in names]
        teacher_probabilities, states = trainer.teachers.predict(distributed.shard(characters[:, :-1]), states)
        run.tensors.update(zip(names, states, strict=True))
    learning_rate = config.learning_rate * cosine_schedule(step, total)
    loss, run.tensors["state"] = trainer.update(characters, run.tensors["state"], learning_rate, teacher_probabilities)
    return loss


def _dummy_step(trainer: Trainer, characters: Tensor) -> None:
    """Train one step from initial states. ``characters`` [batch, bptt + 1]."""
    config, teachers, probabilities = trainer.config, trainer.teachers, None
    rows = config.batch // distributed.world_size()
    if teachers:
        probabilities, _ = teachers.predict(distributed.shard(characters[:, :-1]), teachers.zero_states(rows))
    trainer.update(characters, trainer.network.zero_state(rows), config.learning_rate, probabilities)


def count_steps(config: RnnConfig, characters: int) -> int:
    """Return the number of steps per epoch. Exits with a message if the text is too short for one step."""
    stream_length = characters // config.batch
    if stream_length < 2:
        raise SystemExit(
            f"the training part has only {characters:,} characters, which is too short for --batch {config.batch}"
        )
    steps_per_epoch = (stream_length - 1) // config.bptt
    if steps_per_epoch < 1:
        raise SystemExit(
            f"--bptt {config.bptt} is too large: with --batch {config.batch} each stream has {stream_length:,} "
            f"characters, so at most {stream_length - 1:,} are possible"
        )
    return steps_per_epoch


def batch_at(train: Tensor, config: RnnConfig, seed: int, epoch: int, step: int) -> Tensor:
    """Return the characters [batch, bptt + 1] of a step. The streams start at different places in each epoch."""
    offset = derive_seed(seed, "offset", epoch) % len(train)
    starts = offset + torch.arange(config.batch).unsqueeze(1) * (len(train) // config.batch) + step * config.bptt
    return train[(starts + torch.arange(config.bptt + 1)) % len(train)].long()
