"""OpenAI's completions and images endpoints, with the unmodified openai package."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from support.faults import Fault, Hold, raising, raising_after
from support.responses import metric_samples
from support.service import Serve, address


@pytest.fixture
def client(tiny: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address(tiny)}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = "abc", **options: Any) -> Any:
    return client.completions.create(**{"model": "tiny-rnn", "prompt": prompt, "max_tokens": 40, "seed": 5, **options})


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
    for prompts, options in (
        (["abc", "de"], {}),
        (["abc", "de"], {"stop": ["ab", "j"]}),
        (["abcdefghij" * 400, "de"], {"echo": True, "logprobs": 3}),
        (["abc", "de"], {"echo": True, "max_tokens": 0}),
    ):
        unstreamed = complete(client, prompts, n=2, **options)
        texts, finish_reasons, chunks = collect_stream(
            complete(client, prompts, n=2, stream=True, stream_options={"include_usage": True}, **options)
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
        rejected = ("model", "tiny-rnn"), ("reason", "queue_full"), ("version", "1")
        assert metric_samples(service)["quartet_rejected_requests_total", *rejected] == 1
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
