"""The load generators of the benchmarks measure the right rates, and detect failed answers."""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks import restarts
from benchmarks.support import load, mix, report
from benchmarks.support.load import Answer, Load, Request

TEXT = b'data: {"index": 0, "text": "a"}\n\n'
ERROR = b'data: {"error": {"message": "the service is stopping"}}\n\n'
DONE = b"data: [DONE]\n\n"


def sequential(callers: int, cost: float, seconds: float) -> Load:
    """Return the load of a simulated server that answers one request after another, each in ``cost`` seconds."""
    waiting, free, answers = [0.0] * callers, 0.0, list[Answer]()
    begin = callers * cost
    while waiting:
        started = heapq.heappop(waiting)
        free = max(free, started) + cost
        answers.append(Answer(started, free, 200))
        if free < begin + seconds:
            heapq.heappush(waiting, free)
    return Load(answers, begin, begin + seconds)


@pytest.mark.parametrize(("callers", "cost"), [(1, 0.1), (32, 0.1), (64, 0.1), (16, 0.25), (32, 0.01)])
def test_the_rate_of_a_server_that_answers_one_request_after_another_is_exact(callers: int, cost: float) -> None:
    figures = load.summary(sequential(callers, cost, 4.0))
    assert figures["per_second"] == pytest.approx(1 / cost)
    assert figures["p50"] == pytest.approx(1000 * callers * cost)
    assert not figures["errors"]


def test_the_measurement_begins_after_the_first_answer_of_each_caller(shipped: httpx.Client) -> None:
    request = Request("/v1/images/sample", b'{"count": 1, "seed": 1}')
    result = asyncio.run(load.call(shipped.base_url.port or 0, [request], callers=4, seconds=0.05))
    assert {answer.status for answer in result.answers} == {200}
    assert len(result.answers) - len(result.measured) >= 4
    assert result.end - result.begin == pytest.approx(0.05)
    assert max(answer.started for answer in result.answers) < result.end


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_requests_without_an_answer_do_not_reduce_the_rate_of_wrk() -> None:
    """The server answers each connection once with 200 and once with 500, and then closes it without an answer."""
    answered = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            for status in (b"200", b"500"):
                await reader.readuntil(b"{}")
                writer.write(b"HTTP/1.1 %s x\r\nContent-Length: 0\r\n\r\n" % status)
                answered += 1
            await reader.readuntil(b"{}")
        writer.close()

    async def measure() -> load.Figures:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await load.wrk(server.sockets[0].getsockname()[1], [Request("/", b"{}")], 2, 1)

    figures = asyncio.run(measure())
    assert answered / 20 < figures["per_second"] < answered  # wrk runs for one second, or for longer if it is slow
    assert figures["errors"] == pytest.approx(answered, abs=6)  # some answers arrive after the end


def stream(body: bytes, status: int = 200) -> Answer:
    return Answer(0.0, 1.0, status, [(0.5, body)])


@pytest.mark.parametrize(
    ("status", "body", "end"),
    [
        (200, TEXT + DONE, "finished"),
        (200, TEXT + ERROR + DONE, "announced"),
        (200, TEXT, "cut off"),
        (200, b"", "cut off"),
        (502, b"<html>", "502"),
        (0, b"", "lost"),
    ],
)
def test_the_end_of_a_stream_is_classified(status: int, body: bytes, end: str) -> None:
    assert stream(body, status).stream_end == end


def test_streams_that_fail_are_errors_and_do_not_count_for_the_rate() -> None:
    answers = [stream(TEXT + DONE), stream(TEXT + ERROR + DONE), stream(TEXT), stream(b"", 503)]
    figures = load.stream_summary(Load(answers, 0.0, 1.0))
    assert (figures["per_second"], figures["characters"], figures["errors"]) == (1.0, 1.0, 3.0)
    assert load.summary(Load(answers[:2], 0.0, 1.0))["errors"] == 1.0


def test_a_stream_with_an_error_event_is_not_read_as_its_text() -> None:
    request = mix.MixRequest("stream", Request("/v1/text/continue", b"{}"))
    assert mix.read(request, stream(TEXT + DONE)) == "a"
    assert mix.read(request, stream(TEXT + ERROR + DONE)) == [0, "announced"]
    assert mix.read(request, stream(TEXT)) == [0, "cut off"]


def test_the_restart_test_counts_unexpected_outcomes() -> None:
    request = mix.MixRequest("stream", Request("/v1/text/continue", b"{}"))
    outcomes = restarts.Outcomes()
    for body, expected in ((TEXT + DONE, "a"), (TEXT + DONE, "b"), (TEXT + ERROR + DONE, "ab"), (TEXT, "a")):
        outcomes.sent[restarts.outcome(request, stream(body), expected)] += 1
    assert outcomes.sent == {"right": 1, "wrong": 1, "announced": 1, "cut off": 1}
    outcomes.streams.update(["finished", "lost"])
    assert (outcomes.unexpected(), outcomes.unexpected("lost")) == (3, 2)


def test_a_saved_run_has_its_command_and_rounded_figures(tmp_path: Path) -> None:
    table = report.table("speed", {"server": None, "requests/s": 0, "ratio": 2}, [["ours", 12.6, math.nan]])
    report.save(tmp_path / "serving.json", "python -m benchmarks serving", [table])
    saved = json.loads((tmp_path / "serving.json").read_text())
    assert saved["command"] == "python -m benchmarks serving"
    assert saved["machine"]
    assert saved["tables"][0]["rows"] == [["ours", 13, None]]
    assert "| ours | 13 | |" in report.show(saved["tables"][0])
