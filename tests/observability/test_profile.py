"""The CPU profile by layer, computed from stacks in the format of py-spy."""

from __future__ import annotations

import pytest

from benchmarks.profile import layer, shares, table

START = "run (asyncio/runners.py:190);RequestResponseCycle.run_asgi (uvicorn/protocols/http/httptools_impl.py:409)"


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ("", "HTTP"),
        (";reported (app/observability/logs.py:180);observe (prometheus_client/metrics.py:700)", "telemetry"),
        (";ImageDecoder.decode (app/tasks/image_codecs.py:107);load (PIL/ImageFile.py:260)", "image files"),
        (";ImageDecoder._shrink (app/tasks/image_codecs.py:130);Image.resize (PIL/Image.py:2400)", "resizing images"),
        (";Conv2d.forward (torch/nn/modules/conv.py:548)", "forward"),
    ],
)
def test_a_stack_counts_for_its_innermost_known_call(calls: str, expected: str) -> None:
    assert layer(START + calls) == expected


def test_shares_and_table() -> None:
    lines = [f"{START} 2", "main (own (old)/x.py:1) 6"]
    lines += [
        "Runner.run (asyncio/runners.py:190) 1",
        "exit_if_hung.<locals>.watch (app/server/process.py:206) 4",
        "_worker (concurrent/futures/thread.py:81) 9",
    ]  # waiting
    figures = shares(lines)
    assert sum(figures.values()) == pytest.approx(100)
    assert (figures["HTTP"], figures["forward"], figures["other"]) == (25, 0, 75)
    assert shares([]) == {}
    made = table({"cnn": [1234.0, 0.4, *figures.values()]})
    assert made["rows"][0] == ["requests/s", 1234]
    assert made["rows"][1] == ["CPU ms per request", 0.4]
    assert made["rows"][-1] == ["other, %", 75]
