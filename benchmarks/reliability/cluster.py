"""Test a Ray cluster of two nodes on this machine, under load. Kill a replica and a node of the cluster.

    python -m benchmarks.reliability.cluster                     # all parts, about six minutes; needs the extra [ray]
    python -m benchmarks.reliability.cluster --only node --callers 32    # one part

The test has these parts:

same      send each request to the cluster and to a service without Ray; both answers must be equal
replica   kill a replica under load; print the statuses of the answers, and the seconds until two replicas run again
node      kill a node with all its processes under load; print the same figures as in the part replica
scaling   wait until load starts a second replica; then run only two streams until it is removed; print these figures
drain     reduce two replicas to one while both generate long texts; print the number of finished texts

In the printed statuses, 0 stands for an incomplete answer. The exit status is 1 if an answer of the cluster differs in
the part ``same``, if a text is not finished in the part ``drain``, or if the cluster refuses a connection.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.speed.serving import comma_separated, progress
from benchmarks.support import load, servers
from benchmarks.support.load import Answer, Request
from benchmarks.support.servers import ROOT, free_port, stats
from benchmarks.support.workloads import workloads
from deploy.ray_serve import build

PARTS = ("same", "replica", "node", "scaling", "drain")
TASKS = ["classify", "continue", "forecast", "sample"]
TIMEOUT_SECONDS = 240.0  # longest time to wait for a condition
APPLICATION, GROUP = "quartet", "all"
FIXED = {"min_replicas": 2, "max_replicas": 2, "target_requests": 64}
ONE = {"min_replicas": 1, "max_replicas": 1, "target_requests": 64}
LONG = 1000  # length in characters of the texts that run while Ray stops their replica
SCALED = {"min_replicas": 1, "max_replicas": 2, "target_requests": 8, "upscale_seconds": 1, "downscale_seconds": 3}


def requests() -> list[Request]:
    """Return one request of each kind for each protocol."""

    def post(path: str, **body: Any) -> Request:
        return Request(path, json.dumps(body).encode())

    text, values = "shakespeare-rnn", json.loads((ROOT / "docs/sine.json").read_text())["values"]
    picture = (ROOT / "tests/images/cifar10/0013-horse.png").read_bytes()
    tensor = {"name": "values", "datatype": "FP64", "shape": [1, len(values)], "data": values}
    series = {"type": "univariate_time_series", "series": values, "frequency": "H"}
    return [
        Request("/v1/images/classify?explain=true", picture, "image/png"),
        post("/v1/text/continue", prompt="ROMEO:", seed=2, max_characters=80),
        post("/v1/text/continue", prompt="ROMEO:", seed=2, max_characters=80, n=3, stream=True),
        post("/v1/series/forecast", values=values),
        post("/v1/images/sample", count=4, seed=1),
        post("/v1/completions", model=text, prompt="ROMEO:", seed=2, logprobs=2),
        post("/v1/completions", model=text, prompt="ROMEO:", seed=2, max_tokens=80, stream=True),
        post("/v1/images/generations", prompt="two sevens and a 3", seed=1),
        post("/v1/timeseries/forecast", inputs=[series], options={"horizon": 3}),
        post("/v2/models/sine-lstm/infer", inputs=[tensor]),
        post(f"/v2/models/{text}/generate", text_input="ROMEO:", seed=2),
        post(f"/v2/models/{text}/generate_stream", text_input="ROMEO:", seed=2, max_characters=80),
        post("/v1/text/continue", temperature=-1),
        post("/v2/models/nothing/infer"),
    ]


def content(body: bytes) -> object:
    """Return the body of an answer without ids and times. For a stream, return a map from each index to its text."""
    events = re.findall(rb"^data: (\{.*\})\r?$", body, re.MULTILINE)
    if events:
        parsed = [json.loads(text) for text in events]
        choices = [(event.get("choices") or [event])[0] for event in parsed]
        keys = ("text", "text_output")
        texts: dict[int, str] = collections.defaultdict(str)
        for choice in choices:
            texts[choice.get("index", 0)] += "".join(choice.get(key, "") for key in keys)
        return dict(texts)
    return re.sub(rb'"(id|created|created_at)":("[^"]*"|\d+)', b"", body)


async def differences(port: int, plain: int) -> list[str]:
    """Return a line for each request that the cluster and a service without Ray answer differently.

    The cluster listens on ``port``, and the service on the port ``plain``.
    """
    differing = []
    for request in requests():
        proxied, direct = await load.send(port, request), await load.send(plain, request)
        if (proxied.status, content(proxied.body)) != (direct.status, content(direct.body)):
            differing.append(
                f"{request.path}: {proxied.status} {proxied.body[:200]!r}, plain {direct.status} {direct.body[:200]!r}"
            )
        progress(f"{direct.status} {request.path}")
    return differing


def replicas() -> int:
    """Return the number of running replicas of the group."""
    group = serve.status().applications[APPLICATION].deployments[GROUP]
    return group.replica_states.get("RUNNING", 0)


async def wait_until(condition: Callable[[], bool]) -> float:
    """Wait until the condition is true, and return the waiting time in seconds.

    Raises TimeoutError after TIMEOUT_SECONDS.
    """
    started = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110  # Ray has no event for this
            await asyncio.sleep(0.2)
    return time.perf_counter() - started


def victim() -> int:
    """Return the process id of a replica, which can then be killed."""
    for pid, _ in stats():
        with suppress(OSError):  # the process has ended
            if (
                Path(f"/proc/{pid}/cmdline")
                .read_bytes()
                .startswith(f"ray::ServeReplica:{APPLICATION}:{GROUP}".encode())
            ):
                return pid
    raise LookupError("no replica runs")


async def under_load(port: int, workload: str, callers: int, change: Callable[[], Any]) -> str:
    """Send requests while ``change`` changes the cluster. Return a text with the statuses of the answers."""
    available = workloads(ROOT / "models_store")
    streams = [request for request in requests() if b'"stream"' in request.body]
    selected = available["cnn"].requests if workload == "cnn" else streams
    stop, answers = asyncio.Event(), list[Answer]()

    async def keep_sending() -> None:
        while not stop.is_set():
            answers.extend((await load.call(port, selected, callers, 1.0)).answers)

    task = asyncio.create_task(keep_sending())
    await asyncio.sleep(3)
    report = await change()
    await asyncio.sleep(3)
    stop.set()
    await task
    statuses = dict(collections.Counter(answer.status for answer in answers))
    failed = sum(b'"error"' in answer.body for answer in answers if answer.status == 200)
    slowest = max(answer.seconds for answer in answers if answer.status == 200)
    figures = f"{statuses}, {failed} streams ended with an error; slowest {slowest:.1f} s"
    return f"{workload}, {callers} callers: {figures}; {report}"


async def drained(port: int) -> tuple[str, bool]:
    """Let Ray stop one of two replicas while long streams run.

    Ray lets the replica finish its requests before it stops the replica. Return a text with the outcomes of the
    streams, and whether all streams were finished.
    """
    long = {"model": "shakespeare-rnn", "prompt": "a", "max_characters": LONG, "stream": True}
    selected = [Request("/v1/text/continue", json.dumps({**long, "seed": seed}).encode()) for seed in range(16)]
    tasks = [asyncio.create_task(load.send(port, request)) for request in selected]
    await asyncio.sleep(2)
    running, started = sum(not task.done() for task in tasks), time.perf_counter()
    await asyncio.to_thread(deploy, ONE)  # returns when the replica has stopped
    await wait_until(lambda: replicas() == 1)
    seconds = time.perf_counter() - started
    answers = await asyncio.gather(*tasks)
    complete = sum(isinstance(text := content(answer.body), dict) and len(text[0]) == LONG for answer in answers)
    longest = max(answer.seconds for answer in answers)
    outcome = f"{complete} finished, in at most {longest:.1f} s; the replica stopped after {seconds:.1f} s"
    return f"{running} of {len(tasks)} were running, {outcome}", complete == len(tasks)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster of two nodes during a ``with`` block. The second node runs only replicas, so it can be removed."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes of both nodes
    os.environ.setdefault("QUARTET_STORE", str(ROOT / "models_store"))
    node = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    ray_cluster = Cluster(initialize_head=True, connect=True, head_node_args={**node, "include_dashboard": False})
    try:
        ray_cluster.add_node(**node, resources={"second": 1})
        ray_cluster.wait_for_nodes()
        yield ray_cluster
    finally:
        with suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        ray_cluster.shutdown()


def deploy(layout: Mapping[str, float]) -> None:
    serve.run(build({"groups": {GROUP: {"tasks": TASKS, **layout}}}), name=APPLICATION, route_prefix="/")


async def parts(options: argparse.Namespace, port: int, ray_cluster: Cluster, plain: int) -> bool:
    """Run the selected parts, and print their results. Return whether all required results are right."""
    passed = True

    async def kill_replica() -> str:
        os.kill(victim(), signal.SIGKILL)
        await wait_until(lambda: replicas() < 2)
        return f"two replicas again after {await wait_until(lambda: replicas() == 2):.1f} s"

    async def remove_node() -> str:
        await asyncio.to_thread(ray_cluster.remove_node, ray_cluster.list_all_nodes()[1], allow_graceful=False)
        await wait_until(lambda: replicas() < 2)
        return f"two replicas again after {await wait_until(lambda: replicas() == 2):.1f} s"

    async def scale_up() -> str:
        return f"two replicas after {await wait_until(lambda: replicas() == 2):.1f} s"

    async def scale_down() -> str:
        return f"one replica after {await wait_until(lambda: replicas() == 1):.1f} s"

    if "scaling" in options.only:
        print("load rises:", await under_load(port, "cnn", options.callers, scale_up), flush=True)
        print("load falls:", await under_load(port, "streams", 2, scale_down), flush=True)
        await asyncio.to_thread(deploy, FIXED)
        await wait_until(lambda: replicas() == 2)
    if "same" in options.only:
        differing = await differences(port, plain)
        print(
            f"same: {len(requests()) - len(differing)} of {len(requests())} answers equal those of a single service",
            flush=True,
        )
        print("\n".join(differing), flush=True)
        passed = not differing
    if "drain" in options.only:
        outcome, finished = await drained(port)
        print("one replica is drained:", outcome, flush=True)
        passed = passed and finished
        await asyncio.to_thread(deploy, FIXED)
        await wait_until(lambda: replicas() == 2)
    for workload in ("cnn", "streams"):
        if "replica" in options.only:
            print("a replica is killed:", await under_load(port, workload, options.callers, kill_replica), flush=True)
    if "node" in options.only:
        print("a node is killed:", await under_load(port, "cnn", options.callers, remove_node), flush=True)
    return passed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Test a Ray cluster of two nodes on this machine, and kill a replica and a node."
    )
    parser.add_argument(
        "--only", type=comma_separated(PARTS), default=list(PARTS), help=f"parts among {','.join(PARTS)}"
    )
    parser.add_argument("--callers", type=int, default=32, help="number of callers (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name, cluster() as nodes:
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        deploy(SCALED if "scaling" in options.only else FIXED)
        plain = servers.ours(Path(name), ROOT / "models_store", "1x1")
        try:
            if "same" in options.only:
                plain.start()
            passed = asyncio.run(parts(options, port, nodes, plain.port))
        finally:
            plain.stop()
    sys.exit(not passed)


if __name__ == "__main__":
    main()
