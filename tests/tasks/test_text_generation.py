"""Text generation: prompts, sampling, stop strings and precision."""

from __future__ import annotations

import gc
import random
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import VOCABULARY, publish_network, publish_tiny

from app.errors import BadValue
from app.networks import build
from app.networks.gated_rnn import LinearRecurrence
from app.networks.linear import LONG_CHUNK, MIN_PACKED_WIDTH, Packed
from app.store import Store
from app.store.version import Version
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import MIN_ROWS, batch_invariant, pad
from app.tasks.text_generation import (
    PREFILL_ALONE_SECONDS,
    PREFILL_SECONDS,
    Continuation,
    ContinueJob,
    TextGenerator,
)
from app.tasks.token_sampling import LogProbs, Sampler, SamplingOptions, record_log_probs

PIECE = 40  # number of prompt characters that a step reads while a text is generated
ALONE = round(PIECE * PREFILL_ALONE_SECONDS / PREFILL_SECONDS)  # the same while no text is generated


@pytest.fixture
def continuer(tmp_path: Path) -> TextGenerator:
    continuer = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))
    continuer.latency = continuer.prefill_latency = LatencyModel(PREFILL_SECONDS / PIECE, 0.0)
    return continuer


def begin(
    continuer: TextGenerator, prompt: str, options: SamplingOptions | None = None, **settings: Any
) -> Continuation:
    settings = {"max_characters": 40, "temperature": 1.0, "seed": 1, **settings}
    (text,) = continuer.prepare(ContinueJob([prompt], **settings))
    text.options = options
    return text


def read_prompt(continuer: TextGenerator, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a whole prompt in one pass; return logits [1, T, vocabulary] and the final state."""
    characters = torch.from_numpy(begin(continuer, prompt).prompt.characters)
    with torch.inference_mode():
        return continuer.network(characters.unsqueeze(0), continuer.network.zero_state(1))


def fail_once(continuer: TextGenerator, text: Continuation) -> None:
    """Let the sampling of the next character fail."""
    assert text.batch
    sampler: Any = text.batch.sampler
    text.batch.sampler = lambda *_: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        continuer.step([text])
    text.batch.sampler = sampler


def finish(continuer: TextGenerator, text: Continuation) -> Continuation:
    while not text.finished:
        continuer.step([text])
    return text


def test_a_prompt_read_in_blocks_gives_the_state_of_one_pass(continuer: TextGenerator) -> None:
    """The blocks are short, because the network soon forgets what it has read."""
    continuer.prefill_latency = LatencyModel(PREFILL_ALONE_SECONDS / 3, 0.0)
    prompt = "abcdefghij"
    text = begin(continuer, prompt)
    for read in (3, 6, 9):
        continuer.step([text])
        assert text.prompt.read == read
        _, state = read_prompt(continuer, prompt[:read])
        assert torch.allclose(text.prompt.state, state[0], atol=1e-6)
    assert text.text == ""


@dataclass
class Clock:
    """A clock. A prefill takes ``prefill``, and the generation of a character takes ``decode``."""

    now: float = 0
    prefill: float = 2000
    decode: float = 1000


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TimedSteps:
    """The steps of a network on a fake clock."""

    def __init__(self, steps: Any, clock: Clock) -> None:
        self.steps, self.clock = steps, clock

    def read(self, characters: torch.Tensor, state: torch.Tensor) -> Any:
        self.clock.now += self.clock.prefill / PIECE
        return self.steps.read(characters, state)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.clock.decode - self.clock.prefill / PIECE
        logits: torch.Tensor = self.steps.logits(hidden)
        return logits


@pytest.fixture
def timed(continuer: TextGenerator, tmp_path: Path, clock: Clock) -> TextGenerator:
    version = Store(tmp_path).read("tiny-rnn", 1)
    timed = TextGenerator(version, torch.device("cpu"), clock=lambda: clock.now)
    timed.latency, timed.prefill_latency = continuer.latency, continuer.prefill_latency
    timed.steps = TimedSteps(timed.steps, clock)
    return timed


def test_prompts_are_read_together_and_generation_starts_when_one_is_read(timed: TextGenerator) -> None:
    texts = [begin(timed, "a" * length) for length in (10_000, 2 * PIECE + 5, 500)]
    generating = begin(timed, "a")
    read = []
    for _ in range(4):  # each step generates a character, and reads a character of each prompt
        timed.step([*texts, generating])
        read.append(9_999 - texts[0].prompt.unread)
    assert read == [PIECE + 1, PIECE + 2, 2 * PIECE + 3, 2 * PIECE + 4]  # two steps take as long as a prefill
    assert [text.prompt.unread for text in texts] == [9_999 - read[-1], 0, 499 - read[-1]]
    assert [len(text.text) for text in (*texts, generating)] == [0, 0, 0, 4]
    timed.step([*texts, generating])
    assert [len(text.text) for text in (*texts, generating)] == [0, 1, 0, 5]
    unread = texts[0].prompt.unread
    timed.step(texts[:1])  # without other texts, each step reads a longer part of the prompt
    timed.step(texts[:1])
    assert texts[0].prompt.unread == unread - 2 * ALONE


def test_a_step_that_only_reads_prompts_takes_longer(continuer: TextGenerator) -> None:
    texts = [begin(continuer, "a" * length) for length in (2, 1_000)]
    assert continuer.seconds(texts) == PREFILL_ALONE_SECONDS
    continuer.step(texts)
    assert continuer.seconds(texts) == continuer.latency(2) < PREFILL_ALONE_SECONDS


@pytest.mark.parametrize(("prefill", "steps"), [(500, 1), (3000, 3)])
def test_reading_prompts_takes_as_long_as_generating_texts(
    timed: TextGenerator, clock: Clock, prefill: float, steps: int
) -> None:
    """If a prefill takes longer than expected, more characters are generated before the next prefill."""
    clock.prefill = prefill
    prompt, generating = begin(timed, "a" * 5_000), begin(timed, "a")
    for _ in range(2 * steps):
        timed.step([prompt, generating])
    assert 4_999 - prompt.prompt.unread == 2 * (PIECE + steps)
    assert len(generating.text) == 2 * steps


@pytest.mark.parametrize("kind", ["character-rnn", "gated-rnn"])
@pytest.mark.parametrize(("layers", "hidden", "dtype"), [(3, 16, "float64"), (2, MIN_PACKED_WIDTH, "float32")])
def test_the_fast_steps_equal_the_network(kind: str, layers: int, hidden: int, dtype: str) -> None:
    torch.manual_seed(0)
    precision = {"float64": 1e-12, "float32": 2e-5}[dtype]
    network: Any = build(kind, {"vocabulary": 11, "hidden": hidden, "layers": layers})
    for parameter in network.parameters():  # avoid the initial values 0 and 1
        torch.nn.init.normal_(parameter, std=0.1)
    network = network.to(getattr(torch, dtype)).requires_grad_(False)
    characters, steps = torch.randint(11, (5, 12)), network.for_generation()
    state = own_state = network.zero_state(5)  # the two states may hold different values
    for part in characters.split(7, dim=1):
        logits, state = network(part, state)
        for t in range(part.shape[1]):
            outputs, own_state = steps.read(part[:, t], own_state)
            assert torch.allclose(steps.logits(outputs), logits[:, t], atol=precision)


@pytest.fixture
def gated_version(tmp_path: Path) -> Version:
    """Return a version whose network reads many characters at once."""
    sizes = {"vocabulary": len(VOCABULARY), "hidden": 32, "layers": 2}
    return publish_network(tmp_path, "gated", "gated-rnn", sizes, 0, vocabulary=VOCABULARY)


@pytest.fixture
def gated(gated_version: Version) -> TextGenerator:
    generator = TextGenerator(gated_version, torch.device("cpu"))
    generator.warm_up(8)
    return generator


@pytest.mark.parametrize("piece", [96, 200])
def test_a_prompt_read_at_once_gives_the_text_and_log_probabilities_of_single_steps(
    gated: TextGenerator, piece: int
) -> None:
    prompt = "abcdefghij \n" * 12
    results = []
    for parallel in (False, True):
        gated.reads_many = parallel
        gated.prefill_latency = gated.latency = LatencyModel(1e-6, PREFILL_SECONDS / piece)
        texts = [begin(gated, prompt[start:], max_characters=20) for start in (0, 30, 50)]
        records = [LogProbs(0), LogProbs(3)]
        texts[0].prompt.log_probs, texts[2].prompt.log_probs = records
        while unfinished := [text for text in texts if not text.finished]:
            gated.step(unfinished)
        results.append(([text.text for text in texts], records))
    (single_texts, single), (block_texts, block) = results
    assert block_texts == single_texts
    for record, other, length in zip(block, single, (len(prompt), len(prompt) - 50), strict=True):
        assert len(record.tokens) == length - 1
        assert record.top_indices == other.top_indices
        assert np.allclose(record.tokens, other.tokens, atol=1e-4)
        assert np.allclose(record.top_values, other.top_values, atol=1e-4)


class RoundedSteps:
    """Steps that compute each row alone. If ``wrong(characters)``, they round differently, but not in float64."""

    def __init__(self, steps: Any, wrong: Callable[[torch.Tensor], bool]) -> None:
        self.steps, self.wrong = steps, wrong

    def alone(self, characters: torch.Tensor, state: torch.Tensor) -> Any:
        rows = [self.steps.read(*row) for row in zip(characters.split(1), state.split(1), strict=True)]
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def read(self, characters: torch.Tensor, state: torch.Tensor) -> Any:
        hidden, state = self.alone(characters, state)
        return self.rounded(characters, hidden), state

    def read_many(self, characters: torch.Tensor, state: torch.Tensor) -> Any:
        outputs = []
        for own in characters.unbind(1):
            hidden, state = self.alone(own, state)
            outputs.append(hidden)
        return self.rounded(characters, torch.stack(outputs, dim=1)), state

    def rounded(self, characters: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 1e-6 * (hidden.dtype == torch.float32 and self.wrong(characters)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.steps.logits(row) for row in hidden.split(1)])


@pytest.mark.parametrize(
    ("wrong", "min_rows", "dtype"),
    [
        (lambda characters: False, 1, torch.float32),
        (lambda characters: characters.dim() == 1 and len(characters) > 5, 1, torch.float64),
        (lambda characters: characters.dim() == 2 and characters.shape[1] >= 64, 1, torch.float64),
        (lambda characters: characters.numel() < MIN_ROWS, MIN_ROWS, torch.float32),
    ],
)
def test_padding_and_float64_are_used_if_rounding_depends_on_the_batch_or_block(
    gated_version: Version, wrong: Callable[[torch.Tensor], bool], min_rows: int, dtype: torch.dtype
) -> None:
    network = gated_version.network()
    steps = network.for_generation
    network.for_generation = lambda: RoundedSteps(steps(), wrong)
    generator = TextGenerator(gated_version, torch.device("cpu"), network)
    generator.warm_up(8)
    assert (generator.min_rows, generator.initial_state.dtype) == (min_rows, dtype)


def test_gradients_of_the_linear_recurrence_are_right() -> None:
    torch.manual_seed(0)
    shapes = ((2, 5, 3), (2, 5, 3), (2, 3))
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(LinearRecurrence.apply, inputs)


@torch.inference_mode()
def test_packed_weights_are_batch_invariant() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, MIN_PACKED_WIDTH), torch.randn(70), torch.randn(LONG_CHUNK + 33, MIN_PACKED_WIDTH)
    packed = Packed(weight, bias)
    full_batch = packed(x)
    assert torch.allclose(full_batch, x @ weight.T + bias, atol=1e-4)
    for rows in (*range(1, 40), LONG_CHUNK, LONG_CHUNK + 1):
        assert torch.allclose(packed(pad(x[:rows], 1))[:rows], full_batch[:rows], atol=1e-6)


def test_batch_invariant_detects_rounding_that_depends_on_the_batch() -> None:
    rows = torch.rand(9, 3)
    assert batch_invariant(lambda rows: rows * 2, rows)
    assert not batch_invariant(lambda rows: rows * len(rows), rows)
    assert batch_invariant(lambda rows: rows * (1 if len(rows) > 3 else 2), rows)
    assert not batch_invariant(lambda rows: rows * (1 if len(rows) > 3 else 2), rows, 1)
    assert torch.equal(pad(rows)[:9], rows)
    assert [len(pad(rows[:count], 1)) for count in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert pad(rows[:1]).tolist() == [rows[0].tolist(), *[[0.0] * 3] * (MIN_ROWS - 1)]


def test_prompts_that_take_too_long_to_read_are_rejected(continuer: TextGenerator) -> None:
    continuer.prefill_latency, continuer.max_prompt_seconds = LatencyModel(0.01, 0.005), 0.25
    problem = (
        r"^prompt has {} characters, which tiny-rnn reads in 0\.3 s; "
        r"the maximum is 0\.25 s, which is about {} characters$"
    )
    for prompts, message in ((["a" * 30, "b"], problem.format(30, 25)), (["a" * 20, "b" * 20], problem.format(40, 33))):
        with pytest.raises(BadValue, match=message):
            continuer.prepare(ContinueJob(prompts=prompts))
    for prompts in (["a" * 25], ["a" * 15, "b" * 15]):  # two prompts are read together, in 0.015 s per character
        assert len(continuer.prepare(ContinueJob(prompts=prompts))) == len(prompts)


def test_the_unknown_character_is_never_generated(continuer: TextGenerator) -> None:
    with torch.inference_mode():
        continuer.network.head.bias[-1] = 100.0  # the network prefers the unknown character
    assert "<unk>" not in finish(continuer, begin(continuer, "a", max_characters=200)).text


def test_a_text_ends_at_the_first_stop_string_or_its_length(continuer: TextGenerator) -> None:
    full = finish(continuer, begin(continuer, "a"))
    assert (len(full.text), full.finish_reason) == (40, "length")
    stop = full.text[10:12]
    cut = finish(continuer, begin(continuer, "a", stop=("never there", stop)))
    assert (cut.text, cut.finish_reason) == (full.text[: full.text.index(stop)], "stop")
    assert (full.generated, cut.generated) == (40, len(cut.text) + len(stop))


def sample(logits: list[float], uniforms: Sequence[float], **options: Any) -> list[int]:
    """Return the sampled index for each uniform number."""
    count = len(uniforms)
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": len(logits), "top_p": 1.0, **options}
    arrays = {name: np.array([value] * count) for name, value in settings.items()}
    return Sampler(**arrays, vocabulary=len(logits))(np.array([logits] * count), np.array(uniforms)).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 3, "top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9, 0]),
    ],
)
def test_samples_follow_the_distribution(options: dict[str, Any], expected: list[float]) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0], dtype=torch.float64)
    uniforms = [0.0, *((i + 0.5) / 1000 for i in range(1000)), 1 - 1e-16]
    shares = np.bincount(sample(probabilities.log().tolist(), uniforms, **options), minlength=5) / 1000
    assert shares == pytest.approx(expected, abs=3e-3)
    assert (shares[np.array(expected) == 0] == 0).all()


def test_stop_strings_withhold_the_same_text_as_the_naive_rule(continuer: TextGenerator) -> None:
    generator = random.Random(0)
    text = begin(continuer, "a")
    for _ in range(1000):
        text.stop = tuple(
            "".join(generator.choices("ab", k=generator.randint(1, 5))) for _ in range(generator.randint(1, 3))
        )
        text.text = "".join(generator.choices("ab", k=generator.randint(0, 9)))
        withheld_sizes = (
            size for stop in text.stop for size in range(len(stop) - 1, 0, -1) if text.text.endswith(stop[:size])
        )
        assert text.streamable_text == text.text[: len(text.text) - max(withheld_sizes, default=0)]


def with_options(continuer: TextGenerator, **options: Any) -> SamplingOptions:
    bias = np.zeros(len(continuer.vocabulary))
    for index, value in options.pop("bias", {}).items():
        bias[index] = value
    return SamplingOptions(bias, **options)


def test_penalties_and_bias_change_the_logits_as_defined(continuer: TextGenerator) -> None:
    sampling = with_options(continuer, bias={2: 0.7}, presence=0.9, frequency=0.4, log_probs=LogProbs(2))
    text = finish(continuer, begin(continuer, "abc", options=sampling, max_characters=128))
    written, read = "", "abc"
    for position, uniform in enumerate(text.uniforms):
        logits = read_prompt(continuer, read)[0][0, -1, :-1].double()
        assert sampling.log_probs
        assert sampling.log_probs.tokens[position] == pytest.approx(
            float(logits.log_softmax(0)[VOCABULARY.index(text.text[position])]), abs=1e-5
        )
        best, second = logits.log_softmax(0).topk(2).indices.tolist()
        assert [index for index, _ in list(sampling.log_probs.likeliest())[position]] == [best, second]
        logits[2] += 0.7
        for index, character in enumerate(VOCABULARY[:-1]):
            logits[index] -= 0.4 * written.count(character) + 0.9 * (character in written)
        index = sample(logits.tolist(), [float(uniform)])[0]
        written, read = written + VOCABULARY[index], read + VOCABULARY[index]
    assert text.text == written


def test_log_probs_of_a_prompt_equal_those_of_one_pass(continuer: TextGenerator) -> None:
    prompt = "abcdefghij \n" * 20
    texts = continuer.prepare(ContinueJob([prompt], 3, 1.0, seed=1, n=2))
    parsed = texts[0].prompt
    parsed.log_probs = LogProbs(1)
    beside = begin(continuer, "a", max_characters=30)  # the prompt is read beside this text, then alone
    while not all(text.finished for text in (*texts, beside)):
        continuer.step([text for text in (*texts, beside) if not text.finished])
    logits = read_prompt(continuer, prompt)[0][0, :-1, :-1].double().log_softmax(1)
    expected = [float(logs[VOCABULARY.index(character)]) for logs, character in zip(logits, prompt[1:], strict=True)]
    assert list(parsed.log_probs.tokens) == pytest.approx(expected, abs=1e-5)
    assert [best[0][0] for best in parsed.log_probs.likeliest()] == logits.argmax(1).tolist()


def test_recorded_positions_can_be_read_while_another_is_added() -> None:
    """A stream reads the log-probabilities on another thread than the one that generates the text."""
    record, read = LogProbs(1), list[Any]()

    class ReadArray(array):  # type: ignore[type-arg]
        def append(self, value: float) -> None:
            super().append(value)
            read.append(list(record.likeliest()))

        def extend(self, values: Any) -> None:
            super().extend(values)
            read.append(list(record.likeliest()))

    record.tokens, record.top_indices, record.top_values = ReadArray("d"), ReadArray("i"), ReadArray("d")
    for row in ([-1.0, -2.0], [-4.0, -3.0]):
        record_log_probs([record], np.array([row]), np.array([0]))
    first, second = [(0, -1.0)], [(1, -3.0)]
    assert read == [[], [], [first], [first], [first], [first, second]]


def test_a_failed_step_counts_and_records_nothing(continuer: TextGenerator) -> None:
    def text() -> Continuation:
        return begin(continuer, "ab", options=with_options(continuer, frequency=0.5, log_probs=LogProbs(1)))

    undisturbed, broken = finish(continuer, text()), text()
    for _ in range(5):
        continuer.step([broken])
    fail_once(continuer, broken)
    finish(continuer, broken)
    assert broken.text == undisturbed.text
    assert broken.options
    assert undisturbed.options
    assert broken.options.counts.tolist() == undisturbed.options.counts.tolist()
    assert broken.options.counts.sum() == len(broken.text) == len(broken.options.log_probs.tokens)  # type: ignore[union-attr]


def test_a_finished_text_leaves_no_reference_cycle(continuer: TextGenerator) -> None:
    """A reference cycle kept 47 KB of tensors for each text, because the garbage collector only counts objects."""
    texts = [begin(continuer, "abc", max_characters=length) for length in (2, 5)]
    first = weakref.ref(texts[0])
    gc.collect()
    gc.disable()
    try:
        while not texts[-1].finished:
            batch = weakref.ref(texts[1].batch) if texts[1].batch else None
            continuer.step([text for text in texts if not text.finished])
        texts.clear()
        assert first() is None
        assert batch
        assert batch() is None
    finally:
        gc.enable()


def test_a_finished_text_does_not_keep_the_states_of_its_batch(continuer: TextGenerator) -> None:
    """Finished texts stay in memory until the last text of their request is finished."""
    texts = [begin(continuer, "a", max_characters=length) for length in (1, 2, 3)]
    for finished in range(1, 4):
        continuer.step([text for text in texts if not text.finished])
        assert [text.batch is None for text in texts] == [True] * finished + [False] * (3 - finished)


def test_the_memory_of_a_text_is_known_before_it_is_generated(continuer: TextGenerator) -> None:
    texts = continuer.prepare(ContinueJob(["abc" * 200], 300, 1.0, 10, seed=0, n=2, log_probs=2, echo=True))
    prompt, expected = texts[0].prompt, ContinueJob([]).memory_bytes(texts)
    for text in texts:
        finish(continuer, text)
    records = [prompt.log_probs, *(text.options.log_probs for text in texts if text.options)]
    arrays = [[each.tokens, each.top_indices, each.top_values] for each in records if each]
    total = sum(len(values) * values.itemsize for each in arrays for values in each)
    total += sum(values.nbytes for values in (prompt.characters, *(text.uniforms for text in texts)))
    assert expected - 100 < total <= expected
