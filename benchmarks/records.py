"""Records test: capture, feedback, a shadow and batch jobs under mixed load, while workers are killed.

    python -m benchmarks records                           # 30 minutes
    python -m benchmarks records --minutes 2 --kill-seconds 10

First, the cost: two services answer the same images in turn, one without records, the other with capture of all
requests and a shadow for 20 % of them. Then callers send requests of all kinds (``mix``) to one service with two
workers. One caller gives feedback on images, and another runs batch jobs. One worker is killed every minute.

The test fails if an answer or a line of a batch job is wrong, if a line is missing or has two answers, if accepted
feedback is missing from the figures, or if a request failed that was not on a connection of a killed worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from shutil import copytree
from statistics import median
from typing import Any

import httpx

from app.store import Store
from benchmarks.restarts import connections, outcome
from benchmarks.support import load, mix, report, servers
from benchmarks.support.load import Answer, Request
from benchmarks.support.servers import ROOT, Server

CALLERS = 8
DIFFERENT_REQUESTS = 200  # number of different requests, sent repeatedly
SHADOWED, LABEL = "cifar10-whitened", "horse"
CAPTURED = f"{SHADOWED},series-lstm,shakespeare-rnn"
LINES = 100  # of a batch job
ENDPOINTS = {"/v1/text/continue": "continue", "/v1/series/forecast": "forecast"}  # of batch jobs, with kinds of ``mix``
FEEDBACK_SECONDS = 1.5  # time from an answer to its feedback; storing a captured request takes up to a second
FINISH_SECONDS = 180.0  # longest time until the last batch job ends; a lease of a killed worker takes 30 s
COST_ROUNDS, COST_SECONDS, COST_CALLERS = 5, 5, 64
IMAGE = Request("/v1/images/classify", (ROOT / "tests/images/cifar10/0013-horse.png").read_bytes(), "image/png")


@dataclass
class Outcomes:
    """Counts of outcomes: of requests as in ``restarts``, of feedback (statuses) and of batch jobs."""

    sent: Counter[str] = field(default_factory=Counter)
    feedback: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    kills: int = 0
    connections: int = 0  # of the killed workers


async def ask(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """Send a request again until it has an answer. Raises HTTPStatusError for the status of an error but 404."""
    while True:
        try:
            response = await client.request(method, path, **options)
        except httpx.TransportError:  # the worker was killed
            await asyncio.sleep(0.1)
        else:
            return response if response.status_code == 404 else response.raise_for_status()


async def give_feedback(client: httpx.AsyncClient, outcomes: Outcomes, stop: asyncio.Event) -> None:
    """Send an image again and again, each time with feedback. Wait before each feedback until it is stored."""
    for number in count():
        if stop.is_set():
            return
        head = {"x-request-id": f"feedback-{number}", "content-type": IMAGE.kind}
        await ask(client, "POST", IMAGE.path, content=IMAGE.body, headers=head)
        await asyncio.sleep(FEEDBACK_SECONDS)
        body = {"request_id": f"feedback-{number}", "label": LABEL}
        outcomes.feedback[str((await ask(client, "POST", "/v1/feedback", json=body)).status_code)] += 1


async def run_batches(
    client: httpx.AsyncClient,
    requests: list[mix.MixRequest],
    expected: list[Any],
    outcomes: Outcomes,
    stop: asyncio.Event,
) -> None:
    """Run batch jobs one after the other, and compare each line of their outputs."""
    while not stop.is_set():
        for endpoint, kind in ENDPOINTS.items():
            own = [i for i, each in enumerate(requests) if each.kind == kind]
            indices = (own * LINES)[:LINES]
            lines = [
                {"custom_id": f"{n}", "method": "POST", "url": endpoint, "body": json.loads(requests[i].request.body)}
                for n, i in enumerate(indices)
            ]
            content = "\n".join(map(json.dumps, lines)).encode()
            files = {"file": ("lines.jsonl", content)}
            file = (await ask(client, "POST", "/v1/files", files=files, data={"purpose": "batch"})).json()["id"]
            body = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
            job, ends = (await ask(client, "POST", "/v1/batches", json=body)).json(), time.monotonic() + FINISH_SECONDS
            while job["status"] in ("validating", "in_progress", "finalizing") and time.monotonic() < ends:
                await asyncio.sleep(1)
                job = (await ask(client, "GET", f"/v1/batches/{job['id']}")).json()
            outcomes.jobs[job["status"]] += 1
            if job["status"] != "completed":
                outcomes.problems.append(f"batch job: {job}"[:500])
                continue
            output = (await ask(client, "GET", f"/v1/files/{job['output_file_id']}/content")).text.splitlines()
            answers = [json.loads(line) for line in output]
            if [answer["custom_id"] for answer in answers] != [line["custom_id"] for line in lines]:
                outcomes.problems.append(f"batch job {job['id']} has {len(answers)} lines, or in another order")
                continue
            for i, answer in zip(indices, answers, strict=True):
                result = [answer["response"]["status_code"], answer["response"]["body"]]
                content = json.dumps(result[1]).encode()
                read = mix.read(requests[i], Answer(0.0, 0.0, result[0], [(0.0, content)]))
                if not mix.same(kind, read, expected[i]):
                    outcomes.problems.append(f"line of {job['id']}: {str(read)[:200]} for {str(expected[i])[:200]}")


async def kill_workers(server: Server, seconds: float, outcomes: Outcomes, stop: asyncio.Event) -> None:
    """Kill one worker every ``seconds``."""
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            workers = [each.pid for each in server.processes() if server.process and each.pid != server.process.pid]
            victim = max(workers, key=lambda pid: connections(pid, server.port))
            outcomes.connections += connections(victim, server.port)
            outcomes.kills += 1
            os.kill(victim, signal.SIGKILL)


async def mixed_load(server: Server, options: argparse.Namespace) -> tuple[Outcomes, dict[str, int]]:
    """Run all callers. Return the outcomes, and the count of each figure of the active version."""
    outcomes, stop, requests = Outcomes(), asyncio.Event(), mix.requests(DIFFERENT_REQUESTS, 0)
    expected = await mix.expected_answers(server.port, requests)

    def report_answer(index: int, answer: Answer) -> None:
        result = outcome(requests[index], answer, expected[index])
        outcomes.sent[result] += 1
        if result == "wrong":
            outcomes.problems.append(f"{requests[index].kind}: {answer.body[:200]!r}")

    # A new connection for each request goes to the least busy worker.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60, limits=limits) as client:
        work = [mix.repeat(server.port, requests, seed, stop, report_answer) for seed in range(CALLERS)]
        tasks = [
            asyncio.ensure_future(each)
            for each in (
                *work,
                give_feedback(client, outcomes, stop),
                run_batches(client, requests, expected, outcomes, stop),
                kill_workers(server, options.kill_seconds, outcomes, stop),
            )
        ]
        await asyncio.sleep(60 * options.minutes)
        stop.set()
        await asyncio.gather(*tasks)
        await asyncio.sleep(10)  # the figures are at most a few seconds old
        rows = (await ask(client, "GET", "/v1/feedback")).json()["data"]
    active = Store(Path(server.environment["QUARTET_STORE"])).active(SHADOWED)
    return outcomes, {row["name"]: row["count"] for row in rows if (row["model"], row["version"]) == (SHADOWED, active)}


async def cost(off: Server, on: Server) -> tuple[float, float]:
    """Return the ratios of the throughput and of the p99 of images with records to those without."""
    figures: dict[str, list[load.Figures]] = {"off": [], "on": []}
    for round_ in range(COST_ROUNDS):
        order = [("off", off, on), ("on", on, off)]
        for name, server, other in order[:: 1 if round_ % 2 else -1]:
            other.pause()
            figures[name].append(load.summary(await load.call(server.port, [IMAGE], COST_CALLERS, COST_SECONDS)))
            other.resume()
    pairs = list(zip(figures["on"], figures["off"], strict=True))
    return median(a["per_second"] / b["per_second"] for a, b in pairs), median(a["p99"] / b["p99"] for a, b in pairs)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30, help="duration of the mixed load (default: %(default)s)")
    parser.add_argument("--kill-seconds", type=float, default=60, help="time between two kills (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    copytree(ROOT / "models_store", folder / "store")
    store = Store(folder / "store")
    version = store.read(SHADOWED, store.active(SHADOWED))
    card = version.card.model_dump(exclude={"version", "weights_sha256"})
    shadow = store.publish(card, version.tensors, activate=False).card.version
    store.shadow(SHADOWED, shadow, 20)
    records = {"capture": CAPTURED, "records_folder": folder / "records"}
    off = servers.ours(folder, store.folder, layout="2x1")
    with servers.ours(folder, store.folder, layout="2x1", **records).running() as on:
        with off.running():
            throughput, p99 = asyncio.run(cost(off, on))
        outcomes, counts = asyncio.run(mixed_load(on, options))
    sent, stored = outcomes.sent, outcomes.feedback["200"]
    table = report.figures(
        (f"throughput of images with capture of all and a shadow for 20 %, {COST_CALLERS} callers, relative to without",
         round(throughput, 2), ""),
        ("p99 of these images, relative to without", round(p99, 2), ""),
        (f"requests of {CALLERS} callers, while a worker was killed every {options.kill_seconds:g} s", sent.total(),
         "requests"),
        ("wrong answers", sent["wrong"], "answers"),
        (f"lost requests on the connections of {outcomes.kills} killed workers", sent["lost"], "requests"),
        ("accepted feedback", stored, "requests"),
        ("of these in the figures", counts.get("accuracy", 0), "requests"),
        ("feedback on requests that were not captured", outcomes.feedback["404"], "requests"),
        ("comparisons with the shadow", counts.get("seconds", 0), "requests"),
        (f"batch jobs of {LINES} lines, each line exactly once", outcomes.jobs["completed"], "jobs"),
    )  # fmt: skip
    unexpected = sum(number for word, number in sent.items() if word not in ("right", "lost", "cut off"))
    checks = (
        (bool(outcomes.problems), "; ".join(outcomes.problems[:5])),
        (unexpected > 0, f"outcomes: {sent}"),
        (sent["lost"] + sent["cut off"] > outcomes.connections, f"{sent}; {outcomes.connections} connections"),
        (counts.get("accuracy", 0) != stored, f"feedback {outcomes.feedback}, figures {counts}"),
        (stored + outcomes.feedback["404"] < outcomes.feedback.total(), f"feedback {outcomes.feedback}"),
        (outcomes.jobs.total() == 0, "no batch job has ended"),
        (throughput < 0.9 or p99 > 1.2, f"cost: throughput {throughput:.2f}, p99 {p99:.2f}"),
    )
    return [table], [text for failed, text in checks if failed]
