"""Text generation: continue many prompts at the same time. Each text has its own random numbers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.errors import BadValue, quote_value
from app.limits import Limits
from app.store import CARD, UNKNOWN_CHARACTER, StoreError
from app.store.version import Version
from app.tasks.job import Job
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import MIN_ROWS, batch_invariant, check_finite, pad
from app.tasks.predictor import TextPredictor
from app.tasks.token_sampling import LogProbs, OptionRows, Sampler, SamplingOptions, log_probabilities, record_log_probs

PREFILL_SECONDS = 0.002  # time of prefill (reading of prompts) in a step, short because other texts wait for it
PREFILL_ALONE_SECONDS = 0.01  # the same while no text is generated; later requests wait at most about this long
MAX_PREFILL = 256  # largest number of characters of a prompt that are read in a step
BLOCK_SIZES = (1, 2, 3, 5, 7, 12, 32)  # numbers of characters read at once that ``warm_up`` tries, and a larger one
LOGIT_ROWS = 32  # largest number of rows whose logits are computed at once, as in ``Packed``
VALUES_PER_LOG_PROB = 80  # encoding a character with its log-probabilities takes as long as encoding this many values
MAX_SEED = 2**53  # JSON parsers that use doubles represent all smaller integers exactly
WARM_UP_STEPS = 64  # more than the steps of one size that ``LatencyModel.measure`` takes


@dataclass(eq=False)
class Prompt:
    """A prompt. If several texts continue it, the network reads it only once.

    ``characters`` [T] are indices in the vocabulary. ``state`` is the network's state after the first ``read``
    characters. The last character is read in the first step of each text. ``log_probs`` records the log-probabilities
    of all characters except the first.
    """

    characters: np.ndarray
    state: Tensor
    read: int = 0
    log_probs: LogProbs | None = None

    @property
    def unread(self) -> int:
        return len(self.characters) - 1 - self.read


@dataclass(eq=False)
class Continuation:
    """A text that is being generated. ``uniforms`` are its random numbers, one for each character."""

    prompt: Prompt
    uniforms: np.ndarray
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int
    options: SamplingOptions | None = None
    text: str = ""
    finish_reason: str | None = None
    generated: int = 0  # number of characters generated so far, including those of a stop string
    stop_length: int = 0  # number of generated characters of the stop string that ended the text
    last: int = field(init=False)
    batch: DecodeBatch | None = None  # the batch that contains the text, from its first character to its last
    row: int = 0  # in ``batch``

    def __post_init__(self) -> None:
        self.last = int(self.prompt.characters[-1])

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def remaining(self) -> int:
        """The number of unread characters of the prompt, plus the largest number of characters to be generated."""
        return self.prompt.unread + len(self.uniforms) - self.generated

    @property
    def state(self) -> Tensor:
        """The network's state [layers, hidden] after all characters but the last."""
        return self.prompt.state if self.batch is None else self.batch.state[self.row]

    @property
    def streamable_text(self) -> str:
        """The part of the text that a stream may send. It excludes last characters that may begin a stop string."""
        if self.finished or not self.stop:
            return self.text
        text, held = self.text, 0
        for stop in self.stop:
            at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
            while at != -1 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            held = max(held, len(text) - at if at != -1 else 0)
        return text[: len(text) - held]

    def add(self, character: str) -> None:
        """Append a character. Finish the text before a stop string, or at its maximum length."""
        self.generated += 1
        text = self.text + character
        for stop in self.stop:
            if text.endswith(stop):
                self.text, self.finish_reason, self.stop_length = text[: -len(stop)], "stop", len(stop)
                return
        self.text = text
        if self.generated == len(self.uniforms):
            self.finish_reason = "length"


@dataclass
class ContinueJob(Job):
    """``n`` continuations of each prompt, which is a text or a list of character ids.

    Attributes:
        max_characters, stop: each text ends at this length, or before one of these strings.
        temperature, top_k, top_p: see ``Sampler``.
        seed: continuation i of a prompt uses the seed plus i, which determines all its random numbers.
        logit_bias, presence_penalty, frequency_penalty: see ``SamplingOptions``. The keys are character ids.
        log_probs: number of most likely characters whose log-probabilities are recorded at each position; -1 means all
            characters, but only at the first position.
        echo: whether the answer repeats the prompts.
        has_many: whether the protocol takes several prompts, which together have the limit of one prompt.
    """

    prompts: Sequence[str | Sequence[int]]
    max_characters: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    log_probs: int | None = None
    echo: bool = False
    has_many: bool = False

    @property
    def rows(self) -> int:
        return self.n

    @property
    def prompt_size(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def prepare_size(self) -> int:
        return self.prompt_size

    def answer_size(self, outputs: Sequence[Any]) -> int:
        characters = len(self.prompts) * self.n * self.max_characters + self.echo * self.n * self.prompt_size
        return characters if self.log_probs in (None, -1) else VALUES_PER_LOG_PROB * characters

    def check(self, limits: Limits) -> None:
        prompt, count, length = self.name("prompt"), len(self.prompts) * self.n, self.prompt_size
        self.check_at_most("max_characters", limits.max_characters)
        self.check_at_most("n", limits.max_texts)
        if count > limits.max_texts:
            texts = f"{len(self.prompts)} prompts with n {self.n} are {count} texts"
            raise BadValue(f"{texts}; the maximum is {limits.max_texts}", "n" if self.n > 1 else prompt)
        if length > (most := limits.max_prompt_characters):
            if not self.has_many:
                problem = f"{prompt} is {quote_value(self.prompts[0])}; it should have at most {most} characters"
                raise BadValue(problem, prompt)
            raise BadValue(f"{prompt} has {length:,} characters in all; the maximum is {most:,}", prompt)
        if self.echo and self.log_probs is not None and length * self.n > most:
            problem = f"{prompt} has {length:,} characters in all, echoed with logprobs {self.n} times"
            raise BadValue(f"{problem}; the maximum is {most:,}", "n")

    def memory_bytes(self, items: Sequence[Continuation]) -> int:
        """Return the bytes that the prompts, random numbers and log-probabilities of finished texts take."""
        total = sum(text.uniforms.nbytes for text in items)
        records = [(text.options.log_probs, len(text.uniforms)) for text in items if text.options]
        for prompt in {id(text.prompt): text.prompt for text in items}.values():
            total += prompt.characters.nbytes
            records.append((prompt.log_probs, len(prompt.characters)))
        return total + sum(log_probs.memory_bytes(tokens) for log_probs, tokens in records if log_probs)


@dataclass(frozen=True)
class ContinueAnswer:
    """The texts of each prompt, and the characters of the first prompt that the model does not know."""

    texts: Sequence[Continuation]
    prompts: Sequence[str]  # the prompt of each text
    unknown: Sequence[str]


class DecodeBatch:
    """The texts of a batch. Row i of each array belongs to text i. If a text joins or leaves, a new batch is made."""

    def __init__(self, texts: Sequence[Continuation], vocabulary: int, device: torch.device) -> None:
        self.state = torch.stack([text.state for text in texts])  # [N, layers, hidden]
        self.characters = torch.tensor([text.last for text in texts], device=device)  # [N]
        self.sampler = Sampler(
            np.array([text.temperature for text in texts]),
            np.array([text.top_k for text in texts]),
            np.array([text.top_p for text in texts]),
            vocabulary,
        )
        self.options = OptionRows(texts) if any(text.options for text in texts) else None
        for i, text in enumerate(texts):
            text.batch, text.row = self, i

    def matches(self, texts: Sequence[Continuation]) -> bool:
        """Return whether the batch consists of ``texts``."""
        are_rows = [text.batch is self and text.row == i for i, text in enumerate(texts)]
        return len(texts) == len(self.state) and all(are_rows)


class TextGenerator(TextPredictor):
    """Predictor for character RNNs.

    The same seed gives the same text at any load of the service. ``warm_up`` tests whether the processor's rounding
    depends on the batch size. If so, the network computes in float64, in which the differences are too small to change
    a sampled character.
    """

    def __init__(
        self,
        version: Version,
        device: torch.device,
        network: Any = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """A subclass may pass a ``network`` that is used instead of the network of the version."""
        card = version.card
        network = network or version.network()
        expected, path = network.sizes.vocabulary, version.path_of(CARD)
        if not card.vocabulary or card.vocabulary[-1] != UNKNOWN_CHARACTER or len(set(card.vocabulary)) != expected:
            raise StoreError(f"{path}: vocabulary must be {expected} distinct entries, {UNKNOWN_CHARACTER} last")
        if any(len(entry) != 1 for entry in card.vocabulary[:-1]):
            raise StoreError(f"{path}: vocabulary must be single characters, and {UNKNOWN_CHARACTER}")
        self.card = card
        self.vocabulary = card.vocabulary
        self.index = {character: index for index, character in enumerate(card.vocabulary[:-1])}
        self.unknown = len(card.vocabulary) - 1
        self.device, self.network = device, network.to(device)
        self.steps = self.network.for_generation()
        self.reads_many = hasattr(self.steps, "read_many")  # whether it reads many characters at once
        self.initial_state = self.network.zero_state(1)[0]  # [layers, hidden]
        self.min_rows = MIN_ROWS  # smaller batches are padded
        # Times of a step that generates texts, and of a step that only reads prompts. ``warm_up`` measures them.
        self.latency = self.prefill_latency = LatencyModel(PREFILL_SECONDS / MAX_PREFILL, 0.0)
        self.max_prompt_seconds = math.inf
        self._clock = clock
        self._prefill_lead = 0.0  # seconds that texts must be generated before the next prefill

    def prepare(self, job: ContinueJob) -> list[Continuation]:
        """Return the texts that a job asks for. An empty prompt becomes a line break.

        Raises BadValue for characters that the model does not have, and for prompts that take too long to read.
        """
        vocabulary, prompts, param = len(self.vocabulary), self.prompt_texts(job), job.name("prompt")
        bias, top_k, texts = self._bias(job), min(job.top_k or vocabulary, vocabulary), []
        for text in prompts:
            self.check_prompt(len(text), param=param)
            characters = [self.index.get(character, self.unknown) for character in text or "\n"]
            prompt = Prompt(np.array(characters, np.int64), self.initial_state)
            if job.echo and job.log_probs is not None and text:
                prompt.log_probs = LogProbs(job.log_probs)
            first_seed = secrets.randbelow(2**32) if job.seed is None else job.seed
            for seed in range(first_seed, first_seed + job.n):
                uniforms = np.random.Generator(np.random.Philox(seed % MAX_SEED)).random(job.max_characters)
                sampling = job.temperature, top_k, job.top_p or 1.0, tuple(job.stop), seed % MAX_SEED
                texts.append(Continuation(prompt, uniforms, *sampling, self._options(job, bias)))
        self.check_prompt(sum(len(text) or 1 for text in prompts), len(prompts), param)
        return texts

    def finish(
        self, job: ContinueJob, items: Sequence[Continuation], outputs: Sequence[Continuation]
    ) -> ContinueAnswer:
        """Return the answer. For a stream, its texts grow while they are generated."""
        prompts = self.prompt_texts(job)
        return ContinueAnswer(
            outputs,
            [prompt for prompt in prompts for _ in range(job.n)],
            sorted(set(prompts[0]) - self.index.keys()) if prompts else [],
        )

    def prompt_texts(self, job: ContinueJob) -> list[str]:
        """Return the prompts of a job as texts. Raises BadValue for an unknown character id."""
        return [prompt if isinstance(prompt, str) else self._text_of(prompt) for prompt in job.prompts]

    def _text_of(self, indices: Sequence[int]) -> str:
        for index in indices:
            if type(index) is not int or not 0 <= index < self.unknown:
                problem = f"out of vocabulary; ids are 0 to {self.unknown - 1}"
                raise BadValue(f"prompt has {quote_value(index)}: {problem}", "prompt")
        return "".join([self.vocabulary[index] for index in indices])

    def _bias(self, job: ContinueJob) -> np.ndarray | None:
        """Return the bias [V] of the logits, or None for a job without options. Raises BadValue for an unknown id."""
        if job.log_probs is None and not (job.logit_bias or job.presence_penalty or job.frequency_penalty):
            return None
        bias = np.zeros(len(self.vocabulary))
        for key, value in job.logit_bias.items():
            if not (len(key) < 10 and key.isdecimal() and key == str(int(key)) and int(key) < self.unknown):
                problem = f"out of vocabulary; ids are 0 to {self.unknown - 1}"
                raise BadValue(f"logit_bias has {quote_value(key)}: {problem}", "logit_bias")
            bias[int(key)] = value
        return bias

    def _options(self, job: ContinueJob, bias: np.ndarray | None) -> SamplingOptions | None:
        if bias is None:
            return None
        log_probs = None
        if job.log_probs is not None:
            log_probs = LogProbs(len(bias), max_tokens=1) if job.log_probs < 0 else LogProbs(job.log_probs)
        return SamplingOptions(bias, job.presence_penalty, job.frequency_penalty, log_probs)

    def check_prompt(self, size: int, prompts: int = 1, param: str = "prompt") -> None:
        """Raise BadValue if prompts of ``size`` characters take longer than ``max_prompt_seconds`` to read."""
        seconds_each = self.prefill_latency(prompts) / prompts  # one character of each prompt is read at a time
        if self.reads_many:
            count = min(self.prefill_latency.efficient_rows(PREFILL_SECONDS), MAX_PREFILL)
            seconds_each = self.prefill_latency(count) / count
        if (seconds := seconds_each * size) > self.max_prompt_seconds:
            raise BadValue(
                f"{param} has {size:,} characters, which {self.card.name} reads in {seconds:,.1f} s; "
                f"the maximum is {self.max_prompt_seconds:g} s, which is about "
                f"{int(self.max_prompt_seconds / seconds_each):,} characters",
                param,
            )

    def seconds(self, texts: Sequence[Continuation]) -> float:
        """Return the expected duration of a step in seconds."""
        alone = all(text.prompt.unread for text in texts)
        return PREFILL_ALONE_SECONDS if alone else self.latency(len(texts))

    def step(self, texts: Sequence[Continuation]) -> None:
        """Generate one character of each text whose prompt has been read, and read a part of the other prompts.

        Raises ArithmeticError for non-finite logits. The texts are then unchanged, and the step can be repeated.
        """
        prompts = list(dict.fromkeys(text.prompt for text in texts if text.prompt.unread))
        decoding = [text for text in texts if text.prompt not in prompts] if prompts else texts
        with torch.inference_mode():
            started_at = self._clock()
            if prompts and not (decoding and self._prefill_lead > 0):
                self._prefill(prompts, PREFILL_SECONDS if decoding else PREFILL_ALONE_SECONDS)
                self._prefill_lead = self._clock() - started_at  # reading and generating take equal shares of the time
                started_at = self._clock()
            if decoding:
                self._decode(decoding, [prompt for prompt in prompts if prompt.unread])
                self._prefill_lead -= self._clock() - started_at

    def _prefill(self, prompts: list[Prompt], seconds: float) -> None:
        """Read the same number of characters of each prompt, at most to the end of the shortest.

        This takes about ``seconds`` seconds, or longer if more characters at once are more efficient.
        """
        if self.reads_many:
            max_count = self.prefill_latency.efficient_rows(seconds) // len(prompts)
        else:
            # Log-probabilities need the logits, so a step takes as long as one that generates.
            latency = self.latency if any(prompt.log_probs for prompt in prompts) else self.prefill_latency
            max_count = int(seconds / latency(len(prompts)))
        count = min(max(1, min(max_count, MAX_PREFILL)), *(prompt.unread for prompt in prompts))
        block = np.stack([prompt.characters[prompt.read : prompt.read + count] for prompt in prompts])  # [N, count]
        state = torch.stack([prompt.state for prompt in prompts])
        hidden, state = self._read_block(torch.from_numpy(block).to(self.device), state)
        _advance(prompts, count, state, self._prompt_log_probs(prompts, hidden))

    def _read_block(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read characters [N, T]. Return the outputs [N, T, hidden] of ``steps.read``, and the last state."""
        if not self.reads_many:
            hidden = []
            for own in characters.unbind(1):
                output, state = self._read(own, state)
                hidden.append(output)
            return torch.stack(hidden, dim=1), state
        rows, min_rows = len(characters), -(-self.min_rows // characters.shape[1])
        block, state = self.steps.read_many(pad(characters, min_rows), pad(state, min_rows))
        return block[:rows], state[:rows]

    def _prompt_log_probs(self, prompts: Sequence[Prompt], hidden: Tensor) -> np.ndarray | None:
        """Return log-probabilities [M T, V] of the M prompts that record them, given hidden values [N, T, hidden]."""
        rows = [row for row, prompt in enumerate(prompts) if prompt.log_probs]
        parts = hidden[rows].flatten(0, 1).split(LOGIT_ROWS) if rows else ()
        return np.concatenate([log_probabilities(self._logits(part)) for part in parts]) if parts else None

    def _logits(self, hidden: Tensor) -> np.ndarray:
        """Return logits float64 [N, V] of the outputs of ``steps.read``. The logit of ``<unk>`` is -inf.

        Raises ArithmeticError if a logit is not finite.
        """
        logits = self.steps.logits(pad(hidden, self.min_rows))[: len(hidden)].cpu().numpy().astype(np.float64)
        check_finite(float(logits.sum()), "logits")
        logits[:, self.unknown] = -np.inf
        return logits

    def _read(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Call ``steps.read`` with characters [N] and state [N, layers, hidden], padded to ``min_rows``."""
        hidden, state = self.steps.read(pad(characters, self.min_rows), pad(state, self.min_rows))
        return hidden[: len(characters)], state[: len(characters)]

    def _decode(self, texts: Sequence[Continuation], prompts: list[Prompt]) -> None:
        """Generate one character of each text. Also read one character of each prompt, which takes little more time."""
        batch = texts[0].batch
        if batch is None or not batch.matches(texts):
            batch = DecodeBatch(texts, len(self.vocabulary), self.device)
        characters, state, count = batch.characters, batch.state, len(texts)
        if prompts:
            coming = torch.tensor([int(prompt.characters[prompt.read]) for prompt in prompts], device=self.device)
            characters = torch.cat([characters, coming])
            state = torch.cat([state, torch.stack([prompt.state for prompt in prompts])])
        hidden, state = self._read(characters, state)
        logits, options = self._logits(hidden[:count]), batch.options
        if options:
            log_probs = options.log_probabilities(logits)
            options.apply(logits)
        sampled = batch.sampler(logits, np.array([text.uniforms[text.generated] for text in texts]))
        prompt_log_probs = self._prompt_log_probs(prompts, hidden[count:].unsqueeze(1))
        # No text has changed up to here, so a step that fails before this line can be repeated.
        if options:
            options.record(sampled, log_probs)
        if prompts:
            _advance(prompts, 1, state[count:], prompt_log_probs)
        batch.state = state[:count]
        batch.characters = torch.from_numpy(sampled).to(self.device)
        for text, index in zip(texts, sampled.tolist(), strict=True):
            text.add(self.vocabulary[index])
            text.last, text.batch = index, (None if text.finished else batch)  # the batch has the states of all texts

    def dummy_texts(self, rows: int, characters: int) -> list[Continuation]:
        """Return ``rows`` dummy texts, each of which takes ``characters`` steps."""
        prompts = [Prompt(np.full(1, self.unknown), self.initial_state) for _ in range(rows)]
        return [Continuation(prompt, np.full(characters, 0.5), 1.0, 2, 0.9, (), 0) for prompt in prompts]

    def dummy_run(self, rows: int) -> None:
        """Compute one step of ``rows`` dummy texts."""
        self.step(self.dummy_texts(rows, 1))

    def warm_up(self, rows: int) -> None:
        """Choose the precision, and measure the duration of steps of 1 to ``rows`` texts. Delete ``network``."""
        generator = torch.Generator().manual_seed(0)
        characters = torch.randint(0, self.unknown, (rows,), generator=generator).to(self.device)
        states = torch.rand(rows, *self.initial_state.shape, generator=generator).to(self.device)

        def logits_and_state(state: Tensor) -> Tensor:
            hidden, state = self.steps.read(characters[: len(state)], state)
            return torch.cat([self.steps.logits(hidden), state.flatten(1)], dim=1)

        if batch_invariant(logits_and_state, states, 1) and self._block_invariant(1):
            self.min_rows = 1
        elif not (batch_invariant(logits_and_state, states, MIN_ROWS) and self._block_invariant(MIN_ROWS)):
            del self.steps  # some devices cannot convert weights of which views exist
            self.steps, self.min_rows = self.network.double().for_generation(), 1
            self.initial_state = self.initial_state.double()
        del self.network  # to free memory, because ``steps`` may hold a copy of its weights

        texts = cache(partial(self.dummy_texts, characters=WARM_UP_STEPS))
        self.latency = LatencyModel.measure(lambda count: self.step(texts(count)), rows)
        with torch.inference_mode():
            states = states.to(self.initial_state.dtype)
            if self.reads_many:
                block = characters.repeat(1, -(-MAX_PREFILL // rows))[:1]
                self.prefill_latency = LatencyModel.measure(
                    lambda count: self._read_block(block[:, :count], states[:1]), MAX_PREFILL
                )
            else:
                self.prefill_latency = LatencyModel.measure(
                    lambda count: self._read(characters[:count], states[:count]), rows
                )

    def _block_invariant(self, min_rows: int) -> bool:
        """Set ``min_rows``. Return whether reading many characters at once gives the same bits as one by one."""
        if not self.reads_many:
            return True
        self.min_rows = min_rows
        characters = torch.arange(MAX_PREFILL, device=self.device).view(2, -1) % max(self.unknown, 1)
        first = characters[:, : max(BLOCK_SIZES)]
        with torch.inference_mode():
            outputs = self._read_in_parts(characters, MAX_PREFILL // 2)[:, : max(BLOCK_SIZES)]
            return all(torch.equal(self._read_in_parts(first, size), outputs) for size in BLOCK_SIZES)

    def _read_in_parts(self, characters: Tensor, size: int) -> Tensor:
        """Read characters [N, T] in blocks of ``size``. Return the outputs [N, T, hidden] of ``steps.read_many``."""
        state, parts = self.initial_state.expand(len(characters), *self.initial_state.shape), []
        for part in characters.split(size, dim=1):
            hidden, state = self._read_block(part, state)
            parts.append(hidden)
        return torch.cat(parts, dim=1)


def _advance(prompts: Sequence[Prompt], count: int, state: Tensor, log_probs: np.ndarray | None) -> None:
    """Update N prompts after the network has read ``count`` more characters of each.

    ``state`` [N, layers, hidden] is the new state. ``log_probs`` is the result of ``_prompt_log_probs``.
    """
    if log_probs is not None:
        following = [own.characters[own.read + 1 : own.read + 1 + count] for own in prompts if own.log_probs]
        records = [own.log_probs for own in prompts if own.log_probs for _ in range(count)]
        record_log_probs(records, log_probs, np.concatenate(following))
    for prompt, own in zip(prompts, state.unbind(0), strict=True):
        prompt.state = own
        prompt.read += count
