"""The documented memory of the service."""

from __future__ import annotations

import re

from support.service import ROOT

from app.server.process import Machine, plan_workers
from app.serving.preload import worker_bytes
from app.settings import Settings


def test_the_documented_memory_is_enough_for_one_worker_for_each_core() -> None:
    needed = worker_bytes(ROOT / "models_store")

    def workers(cores: int, gibibytes: float) -> int:
        return plan_workers(Settings(), Machine(cores, int(gibibytes * 2**30), needed))[0]

    files = ("docker-compose.yml", "docs/how-to/production.md", "docs/how-to/sizing.md")
    compose, page, sizing = (" ".join((ROOT / file).read_text().replace("# ", "").split()) for file in files)
    memory, _ = re.findall(r"mem_limit: \$\{MEMORY:-(\d+)g\}", compose)  # of the services without and with a GPU
    default = workers(16, int(memory))
    assert f"With `{memory}g` and the included networks, these are {default} workers." in page
    ((cores, gibibytes),) = re.findall(r"CPUS=(\d+) MEMORY=(\d+)g", page)
    assert workers(int(cores), int(gibibytes)) == int(cores)
    for text in (compose, page, sizing):
        assert re.search(rf"(more than|enough for) {default} cores", text)
        (each,) = re.findall(r"at least ([\d.]+) GiB for each core", text)
        assert [workers(number, number * float(each)) for number in range(1, 17)] == [*range(1, 17)]
