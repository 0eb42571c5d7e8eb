"""The Ray Serve application: its groups of replicas, and a replica that runs without Ray."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from support.service import ROOT, TEST

from app.settings import SettingsError

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]


async def test_https_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deploy.ray_serve import build

    for variable in ("QUARTET_TLS_CERT", "QUARTET_TLS_KEY"):
        (tmp_path / variable).touch()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    with pytest.raises(SettingsError, match=r"^QUARTET_TLS_CERT is '.*': Ray takes only HTTP; use a proxy for HTTPS$"):
        build({})


async def test_each_task_must_be_in_exactly_one_group() -> None:
    from deploy.ray_serve import build

    with pytest.raises(ValueError, match=r"groups have the tasks \['classify', 'classify', 'infer'\]"):
        build({"groups": {"a": {"tasks": ["classify"]}, "b": {"tasks": ["classify"]}}})
    with pytest.raises(ValueError, match="replicas"):
        build({"groups": {"a": {"tasks": ["classify"], "replicas": 3}}})


async def test_the_cluster_configuration_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from deploy import ray_serve

    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert ray_serve.build(application.args)
    assert application.import_path == f"{ray_serve.build.__module__}:{ray_serve.build.__name__}"


async def test_a_replica_answers_without_a_socket(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.ray_serve import Replica

    for name in ("QUARTET_STORE", "QUARTET_THREADS"):  # monkeypatch restores these variables after the test
        monkeypatch.setenv(name, "")
    replica: Any = object.__new__(Replica)
    await replica.__init__({"QUARTET_STORE": str(tiny_store), "QUARTET_THREADS": str(TEST["threads"])})
    assert os.environ["QUARTET_STORE"] == str(tiny_store)
    scope = {"type": "http", "method": "POST", "path": "/v1/images/sample", "query_string": b"", "headers": []}
    ((head, body),) = [messages async for messages in replica.answer(scope, b'{"count": 2}')]
    assert head["status"] == 200
    assert len(json.loads(body["body"])["results"]) == 2
    await replica.check_health()
    await replica.hosted.stop()


async def test_metrics_of_removed_versions_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.observability.metrics import Metrics
    from deploy import ray_serve

    metrics = Metrics()
    for version in (1, 2):
        metrics.for_version("m", version).on_batch(3, 0.1)
    replica: Any = object.__new__(ray_serve.Replica)
    report = partial(metrics.on_versions, 1, 0, frozenset({("m", 2)}), 0.0)
    replica.models = SimpleNamespace(report=report, observers=metrics)
    context = SimpleNamespace(deployment="oneshot", replica_id=SimpleNamespace(unique_id="a1"))
    monkeypatch.setattr(ray_serve.serve, "get_replica_context", lambda: context)
    name, families = await replica.metrics()
    assert name == "oneshot-a1"
    assert {sample.labels.get("version") for family in families for sample in family.samples} == {None, "2"}


async def test_metrics_of_all_replicas_need_an_api_key(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app import key_file
    from deploy.ray_serve import Ingress

    for name in ("QUARTET_STORE", "QUARTET_KEYS_FILE"):
        monkeypatch.setenv(name, "")
    key = key_file.add(tmp_path / "keys", "alice")
    environment = {"QUARTET_STORE": str(tiny_store), "QUARTET_KEYS_FILE": str(tmp_path / "keys")}
    ingress = Ingress({}, environment, {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ingress.app), base_url="http://x") as client:
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": key}, 200)):
            assert (await client.get("/metrics", headers=headers)).status_code == status
