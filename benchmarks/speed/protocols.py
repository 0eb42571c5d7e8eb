"""Measure how much slower each protocol is than the native endpoint for the same work.

    python -m benchmarks.speed.protocols                                 # about three minutes
    python -m benchmarks.speed.protocols --only forecast --callers 32    # one workload

The service runs with the settings of ``make serve``. Each round measures every protocol once, in rotating order. The
load is generated as in ``benchmarks.speed.serving``. The column "time / native" shows the time of a request under full
load, relative to the native endpoint: the request rate of the native endpoint divided by the rate of the protocol.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from PIL import Image

from benchmarks.speed.serving import comma_separated, progress, rotated
from benchmarks.support import load, servers
from benchmarks.support.load import Request
from benchmarks.support.report import Results, number, ratio
from benchmarks.support.servers import ROOT, Server

NATIVE = "native"
CNN, RNN, LSTM, GAN = "cifar10-lenet", "shakespeare-rnn@1", "sine-lstm", "mnist-gan"
CHARACTERS, HORIZON, DIGITS = 60, 48, 16
LONG = ("text", "stream")  # measured without wrk, because wrk ignores unfinished answers

ProtocolRequests = dict[str, Request]  # protocol -> the request of the workload in that protocol


def post(path: str, **body: Any) -> Request:
    return Request(path, json.dumps(body).encode())


def tensor(model: str, name: str, datatype: str, values: np.ndarray, binary: bool, **parameters: Any) -> Request:
    """Return an Open Inference Protocol request with one tensor. Its answer has the same encoding, JSON or binary."""
    head: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
    content = values.tobytes() if binary else b""
    if binary:
        head["parameters"] = {"binary_data_size": len(content)}
    else:
        head["data"] = values.ravel().tolist()
    text = json.dumps({"inputs": [head], "parameters": {**parameters, "binary_data_output": binary}}).encode()
    path = f"/v2/models/{model}/infer"
    return Request(path, text + content, "application/octet-stream", len(text)) if binary else Request(path, text)


def tensors(model: str, name: str, datatype: str, values: np.ndarray, **parameters: Any) -> ProtocolRequests:
    encodings = {"OIP, JSON": False, "OIP, binary": True}
    return {
        protocol: tensor(model, name, datatype, values, binary, **parameters) for protocol, binary in encodings.items()
    }


def workloads() -> dict[str, ProtocolRequests]:
    """Return the workloads by name.

    Each workload has a request for every protocol that supports it. The native request is the first.
    """
    picture = (ROOT / "tests/images/cifar10/0013-horse.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).transpose(2, 0, 1)[None]
    values = json.loads((ROOT / "docs/sine.json").read_text())["values"]
    latents = np.random.default_rng(0).standard_normal((DIGITS, 100), dtype=np.float32)
    name, number = RNN.split("@")
    base = f"/v2/models/{name}/versions/{number}"
    requested = {"prompt": "ROMEO:", "temperature": 0.8, "seed": 2}
    written = {"text_input": "ROMEO:", "temperature": 0.8, "seed": 2, "max_characters": CHARACTERS}
    series = {"type": "univariate_time_series", "series": values, "frequency": "H"}
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["ROMEO:"]}
    options = {"max_characters": CHARACTERS, "temperature": 0.8, "seed": 2}
    own = {**requested, "model": RNN, "max_characters": CHARACTERS}
    openai = {**requested, "model": RNN, "max_tokens": CHARACTERS}
    return {
        "image": {
            NATIVE: Request(f"/v1/images/classify?model={CNN}", picture, "image/png"),
            **tensors(CNN, "image", "UINT8", pixels),
        },
        "forecast": {
            NATIVE: post("/v1/series/forecast", values=values, model=LSTM, horizon=HORIZON, levels=[80]),
            **tensors(LSTM, "values", "FP64", np.array([values]), horizon=HORIZON, levels="80"),
            "KServe series": post(
                "/v1/timeseries/forecast",
                model=LSTM,
                inputs=[series],
                options={"horizon": HORIZON, "quantiles": [0.1, 0.5, 0.9]},
            ),
        },
        "digits": {
            NATIVE: post("/v1/images/sample", count=DIGITS, model=GAN),
            **tensors(GAN, "latents", "FP32", latents),
        },
        "text": {
            NATIVE: post("/v1/text/continue", **own),
            "OpenAI": post("/v1/completions", **openai),
            "OIP, generate": post(f"{base}/generate", **written),
            "OIP, JSON": post(f"{base}/infer", inputs=[prompt], parameters=options, outputs=[{"name": "text"}]),
        },
        "stream": {
            NATIVE: post("/v1/text/continue", **own, stream=True),
            "OpenAI": post("/v1/completions", **openai, stream=True),
            "OIP, generate": post(f"{base}/generate_stream", **written),
        },
    }


async def measure(
    server: Server, results: Results, options: argparse.Namespace, workload: str, round_index: int
) -> None:
    """Measure one workload with every protocol in one round."""
    for protocol, request in rotated(list(workloads()[workload].items()), round_index):
        answer = await load.send(server.port, request)
        if answer.status != 200:
            raise SystemExit(f"{workload}, {protocol}: status {answer.status}: {answer.body[:300]!r}")
        progress(f"{workload}, round {round_index + 1} of {options.rounds}: {protocol}")
        generator = load.measure if workload in LONG or not load.has_wrk() else load.wrk
        await load.call(server.port, [request], options.callers, 0.5)
        cpu, started = server.cpu_seconds(), time.perf_counter()
        figures = await generator(server.port, [request], options.callers, options.seconds)
        figures["cpu"] = (server.cpu_seconds() - cpu) / (time.perf_counter() - started)
        results.add(workload, protocol, options.callers, figures)


def table(results: Results, callers: int) -> str:
    lines = ["| workload | protocol | requests/s | min–max | time / native | p50 ms | p99 ms | errors | CPU s/s |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for workload, protocols in results.cells.items():
        native = results.median(workload, NATIVE, callers, "per_second")
        for protocol in sorted(protocols, key=list(workloads()[workload]).index):
            values = results.values(workload, protocol, callers, "per_second")
            rate = results.median(workload, protocol, callers, "per_second")
            cells = [number(rate, 0), f"{min(values):,.0f}–{max(values):,.0f}", number(ratio(native, rate), 2)]
            cells += [number(results.median(workload, protocol, callers, key), 1) for key in ("p50", "p99")]
            cells.append(number(sum(results.values(workload, protocol, callers, "errors")), 0))
            cells.append(number(results.median(workload, protocol, callers, "cpu"), 2))
            lines.append(f"| {workload} | {protocol} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def bench(options: argparse.Namespace, server: Server) -> None:
    results = Results()
    for workload in options.only:
        for round_index in range(options.rounds):
            await measure(server, results, options, workload, round_index)
    print(table(results, options.callers), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Send the same work through each protocol and through the native endpoint, and compare the speed."
    )
    parser.add_argument(
        "--only",
        type=comma_separated(tuple(workloads())),
        default=list(workloads()),
        help=f"workloads among {','.join(workloads())}",
    )
    parser.add_argument("--callers", type=int, default=32, help="number of callers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each protocol (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name:
        server = servers.ours(Path(name), ROOT / "models_store")
        with server.running():
            uvloop.run(bench(options, server))


if __name__ == "__main__":
    main()
