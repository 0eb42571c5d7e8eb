"""OpenAI's completions and images endpoints, with the unmodified openai package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from support.faults import Fault, Hold, raising, raising_after
from support.networks import SECOND_NETWORKS, TINY, VOCABULARY
from support.service import Serve, address

KNOWN = VOCABULARY[:-1]


@pytest.fixture
def client(tiny: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address(tiny)}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = "abc", **options: Any) -> Any:
    return client.completions.create(**{"model": "tiny-rnn", "prompt": prompt, "max_tokens": 40, "seed": 5, **options})


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == sorted([*TINY, *SECOND_NETWORKS])
    assert {model.object for model in models} == {"model"}
    assert client.models.retrieve("tiny-rnn").created == models[-1].created > 0
    with pytest.raises(openai.NotFoundError) as rejection:
        client.models.retrieve("gpt")
    assert rejection.value.code == "model_not_found"


def test_a_completion_equals_the_native_text(client: openai.OpenAI, tiny: httpx.Client) -> None:
    for options, native in (
        ({}, {"temperature": 1.0}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0}, {"temperature": 0.0}),
        ({"stop": ["ab", "j"]}, {"temperature": 1.0, "stop": ["ab", "j"]}),
        ({"extra_body": {"top_k": 2}}, {"temperature": 1.0, "top_k": 2}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": 2, "logit_bias": {}}, {"temperature": 1.0}),
    ):
        answer = complete(client, n=2, **options)
        body = {"prompt": "abc", "max_characters": 40, "seed": 5, "n": 2, "model": "tiny-rnn", **native}
        results = tiny.post("/v1/text/continue", json=body).json()["results"]
        assert [choice.text for choice in answer.choices] == [result["text"] for result in results]
        assert [choice.finish_reason for choice in answer.choices] == [result["finish_reason"] for result in results]
        assert answer.usage.completion_tokens == sum(len(choice.text) for choice in answer.choices)
    assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", "tiny-rnn", "tiny-rnn@1")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 80, 83)


def test_max_tokens_is_16_by_default(client: openai.OpenAI) -> None:
    for prompt in (None, "", "abc"):
        assert len(client.completions.create(model="tiny-rnn", prompt=prompt).choices[0].text) == 16


def test_prompts_may_be_a_list_of_texts_or_of_token_ids(client: openai.OpenAI) -> None:
    several = complete(client, ["abc", "de"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    alone = [choice.text for prompt in ("abc", "de") for choice in complete(client, prompt, n=2).choices]
    assert [choice.text for choice in several.choices] == alone
    ids = [[KNOWN.index(character) for character in prompt] for prompt in ("abc", "de")]
    assert [choice.text for choice in complete(client, ids, n=2).choices] == alone
    assert [choice.text for choice in complete(client, ids[0], n=2).choices] == alone[:2]
    assert several.usage.prompt_tokens == 5


def collect_stream(stream: Any) -> tuple[list[str], list[Any], list[Any]]:
    """Return the texts, the finish reasons and all chunks of a stream."""
    texts: dict[int, str] = {}
    finish_reasons: dict[int, str] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in finish_reasons
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                finish_reasons[choice.index] = choice.finish_reason
    return (
        [texts[index] for index in sorted(texts)],
        [finish_reasons[index] for index in sorted(finish_reasons)],
        chunks,
    )


def test_a_stream_equals_the_unstreamed_answer(client: openai.OpenAI) -> None:
    for options in ({}, {"stop": ["ab", "j"]}, {"echo": True, "logprobs": 3}, {"echo": True, "max_tokens": 0}):
        unstreamed = complete(client, ["abc", "de"], n=2, **options)
        texts, finish_reasons, chunks = collect_stream(
            complete(client, ["abc", "de"], n=2, stream=True, stream_options={"include_usage": True}, **options)
        )
        assert texts == [choice.text for choice in unstreamed.choices]
        assert finish_reasons == [choice.finish_reason for choice in unstreamed.choices]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert chunks[-1].choices == []
        assert chunks[-1].usage == unstreamed.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
        if "logprobs" in options:
            for choice in unstreamed.choices:
                parts = [each.logprobs for chunk in chunks for each in chunk.choices if each.index == choice.index]
                for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    assert [value for part in parts for value in getattr(part, field)] == getattr(
                        choice.logprobs, field
                    )
    _, _, chunks = collect_stream(complete(client, stream=True))
    assert chunks[-1].choices


def test_log_probabilities_equal_those_of_the_network(client: openai.OpenAI, tiny: httpx.Client) -> None:
    (choice,) = complete(client, "abc", echo=True, logprobs=5, max_tokens=6).choices
    logprobs = choice.logprobs
    assert choice.text[:3] == "abc"
    assert logprobs.tokens == list(choice.text)
    assert logprobs.text_offset == list(range(9))
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    for position in range(1, 9):
        body = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [choice.text[:position]]}],
                "outputs": [{"name": "log_probabilities"}]}  # fmt: skip
        (output,) = tiny.post("/v2/models/tiny-rnn/infer", json=body).json()["outputs"]
        assert sum(math.exp(value) for value in output["data"]) == pytest.approx(1)
        assert output["data"][-1] == -9999.0
        assert logprobs.token_logprobs[position] == pytest.approx(
            output["data"][KNOWN.index(choice.text[position])], abs=1e-6
        )
        best = sorted(output["data"], reverse=True)[:5]
        likeliest = sorted(logprobs.top_logprobs[position].values(), reverse=True)
        assert likeliest[:5] == pytest.approx(best, abs=1e-6)
        assert logprobs.top_logprobs[position][choice.text[position]] == logprobs.token_logprobs[position]


def test_a_prompt_is_scored_without_generating_a_text(client: openai.OpenAI) -> None:
    (scored,) = complete(client, "abcé", echo=True, logprobs=0, max_tokens=0).choices
    assert (scored.text, scored.finish_reason) == ("abcé", "length")
    (with_stop,) = complete(client, "abcé", echo=True, max_tokens=0, stop=KNOWN).choices
    assert (with_stop.text, with_stop.finish_reason) == ("abcé", "length")
    assert scored.logprobs.tokens == list("abcé")
    assert scored.logprobs.token_logprobs[-1] == -9999.0  # the network never generates this token
    (with_text,) = complete(client, "abcé", echo=True, logprobs=0).choices
    assert with_text.logprobs.token_logprobs[:4] == scored.logprobs.token_logprobs
    (long,) = complete(client, "abcdefghij" * 60, echo=True, logprobs=1, max_tokens=0).choices
    assert len(long.logprobs.token_logprobs) == 600
    assert complete(client, "", echo=True, logprobs=1, max_tokens=2).choices[0].logprobs.text_offset == [0, 1]


def test_a_streamed_score_of_a_long_prompt_equals_the_unstreamed_one(client: openai.OpenAI, tiny: httpx.Client) -> None:
    options = {"echo": True, "logprobs": 2, "max_tokens": 3, "n": 2}
    unstreamed = complete(client, "abcdefghij" * 400, **options)
    streamed: list[Any] = [[], []]
    for chunk in complete(client, "abcdefghij" * 400, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
    for choice, pairs in zip(unstreamed.choices, streamed, strict=True):
        assert pairs == list(zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True))
        assert len(pairs) == 4003


def test_logit_bias_and_penalties_change_the_text(client: openai.OpenAI) -> None:
    token = KNOWN.index("h")
    assert complete(client, logit_bias={str(token): 100}).choices[0].text == "h" * 40
    assert "h" not in complete(client, logit_bias={str(token): -100}, temperature=2).choices[0].text
    greedy = complete(client, temperature=0, logit_bias={str(token): 1.5}).choices[0].text
    for penalty in ("presence_penalty", "frequency_penalty"):
        varied = complete(client, temperature=0, logit_bias={str(token): 1.5}, **{penalty: 2}).choices[0].text
        assert len(set(varied)) > len(set(greedy))
        repeated = complete(client, temperature=0, **{penalty: -2}).choices[0].text
        assert len(set(repeated[1:])) == 1


def test_the_client_retries_when_the_queue_is_full(serve: Serve, faults: dict[str, Fault]) -> None:
    faults["continue"] = hold = Hold()
    requests: list[httpx.Request] = []

    def release_at_the_third(request: httpx.Request) -> None:
        requests.append(request)
        if len(requests) == 3:
            hold.release.set()
            first.result()

    with (
        serve(queue_rows=1, max_running_texts=1, inline_seconds=0) as service,
        httpx.Client(event_hooks={"request": [release_at_the_third]}) as http,
        openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="none", http_client=http, max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        hold.armed.set()
        first = pool.submit(service.post, "/v1/text/continue", json={"n": 2}, timeout=60)
        assert hold.entered.wait(30)
        with pytest.raises(openai.RateLimitError) as full:
            complete(client)
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert full.value.code == "queue_full"
        assert len(complete(client.with_options(max_retries=2)).choices[0].text) == 40
    assert len(requests) == 3


def test_a_failed_generation_is_raised_and_not_retried(serve: Serve, faults: dict[str, Fault]) -> None:
    requests: list[httpx.Request] = []
    with (
        serve() as service,
        httpx.Client(event_hooks={"request": [requests.append]}) as http,
        openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="none", http_client=http) as client,
    ):
        faults["continue"] = raising(RuntimeError("secret"))
        with pytest.raises(openai.InternalServerError, match="failed on this text"):
            complete(client)
        assert len(requests) == 1
        faults["continue"] = raising_after(5, RuntimeError("secret"))
        chunks = []
        with pytest.raises(openai.APIError, match="failed on this text") as failure:
            chunks.extend(complete(client, stream=True))
        assert failure.value.code == "inference_failed"


def test_a_request_whose_deadline_has_passed_is_not_retried(serve: Serve) -> None:
    requests: list[httpx.Request] = []
    with (
        serve(request_seconds=0.05) as service,
        httpx.Client(event_hooks={"request": [requests.append]}) as http,
        openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="-", http_client=http) as client,
    ):
        for headers in ({}, {"x-request-timeout": "0.02"}):
            with pytest.raises(openai.InternalServerError) as late:
                complete(client, max_tokens=4000, n=16, extra_headers=headers)
            assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    assert len(requests) == 2
