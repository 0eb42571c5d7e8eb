"""Quartet as a Ray Serve application: groups of replicas on one or many machines.

    serve run deploy.ray_serve:app                       # the groups below
    serve deploy deploy/ray_serve.yaml                   # onto a running cluster, with groups of one's own

Each replica is the whole service, its batcher and its text engine, without a socket. Ray routes to the replica with
least to do, places, restarts, scales by the requests that wait and run, and lets a replica finish before it goes.
Replicas are grouped by what they are asked, so that long texts do not hold up images. An ingress carries requests to
the group; when a replica dies under a request whose answer has not begun, another one is asked.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Metric
from pydantic import BaseModel, ConfigDict, Field
from ray import exceptions, serve
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Scope

from app import store
from app.api.errors import error_response
from app.api.middleware.api_keys import key_of, load_keyring
from app.errors import Unauthorized
from app.main import create_app
from app.settings import PREFIX, Settings
from app.store import StoreError, TaskName
from app.tasks import TASKS
from deploy.forward import Forwarded, Hosted, gathered, task_of

LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    ReplicaUnavailableError,
)
FIGURES_SECONDS = 5.0  # for all replicas to tell theirs
REPORT_SECONDS = 2.0  # between two reports of what waits and runs; Ray's own 10 s are late for upscale_seconds
MEAN_SECONDS = 10.0  # over which it is averaged, in place of 30
QUIET = {"enable_access_log": False}  # a replica tells of each request itself


class Group(BaseModel):
    """Replicas for some tasks. ``requests``: that wait or run in one replica, on average; more and there will be one
    replica more, up to ``most``. ``settings`` are QUARTET_ variables without their prefix, in small letters.
    """

    model_config = ConfigDict(extra="forbid")

    tasks: list[TaskName] = Field(min_length=1)
    least: int = Field(default=1, ge=1)
    most: int = Field(default=4, ge=1)
    requests: float = Field(default=16, gt=0)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    upscale_seconds: float = Field(default=5, ge=0)
    downscale_seconds: float = Field(default=60, ge=0)
    settings: dict[str, str] = {}


class Layout(BaseModel):
    """Which groups there are; every task must be in one. ``ingresses``: processes that carry requests to them."""

    model_config = ConfigDict(extra="forbid")

    groups: dict[str, Group] = {
        "oneshot": Group(tasks=[task.name for task in TASKS.values() if task.engine == "batch"]),
        "texts": Group(tasks=[task.name for task in TASKS.values() if task.engine == "text"]),
    }
    ingresses: int = Field(default=2, ge=1)


class Replica:
    """One process of a group."""

    async def __init__(self, environment: dict[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        os.environ.update(environment)
        self.hosted = Hosted(create_app(Settings()))
        self.registry = self.hosted.app.state.registry
        await self.hosted.start()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of an answer, as they come."""
        answer = self.hosted.answer(scope, body)
        try:
            async for messages in answer:
                yield messages
        finally:
            await answer.aclose()

    async def figures(self) -> tuple[str, list[Metric]]:
        """Which replica this is, and what it has counted."""
        self.registry.report()
        context = serve.get_replica_context()
        return f"{context.deployment}-{context.replica_id.unique_id}", list(self.registry.observers.registry.collect())

    async def check_health(self) -> None:
        """Raises, so that Ray starts another one, when the engine has hung as ``/health/live`` has it."""
        silent = self.registry.executor.oldest_job_seconds()
        if silent > 2 * self.registry.settings.liveness_timeout_seconds:
            raise RuntimeError(f"the engine has not answered for {silent:.0f} s")

    async def __del__(self) -> None:
        """Ray calls this once no request is under way here, and none will come."""
        await self.hosted.stop()


class Ingress:
    """Carries requests to their groups. ``tasks`` says which group a task has; the first group answers all else."""

    def __init__(self, tasks: dict[str, str], environment: dict[str, str], groups: dict[str, DeploymentHandle]) -> None:
        os.environ.update(environment)  # this may be another machine
        settings = Settings()
        self.tasks = tasks
        self.store = settings.store
        self.ring = load_keyring(settings)
        self.known: dict[str, str] = {}  # tasks of models
        self.groups = groups
        calls = {name: handle.options(method_name="answer", stream=True) for name, handle in groups.items()}
        self.forwarded = {
            name: partial(Forwarded, handle.remote, settings.max_body_bytes, LOST, BackPressureError)
            for name, handle in calls.items()
        }

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"]
        if path == "/metrics":  # of all replicas, so that none can answer it
            try:
                if self.ring:
                    key_of(self.ring, request.scope)
            except Unauthorized as error:
                return error_response(error)
            return Response(await self._figures(), media_type=CONTENT_TYPE_LATEST)
        task = task_of(path, self._card)
        return self.forwarded[self.tasks[task] if task else next(iter(self.groups))]()

    def _card(self, name: str) -> str | None:
        """The task of a model; none when there is no such model."""
        if name not in self.known:
            for found, number in store.all_versions(self.store):
                with suppress(StoreError):  # the replicas say what is wrong with it
                    self.known[found] = store.read_card(self.store / found / str(number)).task
        return self.known.get(name)

    async def _figures(self) -> bytes:
        told: dict[str, Iterable[Metric]] = {}
        for handle in self.groups.values():
            found = handle.broadcast("figures").results_async(timeout_s=FIGURES_SECONDS, return_exceptions=True)
            told |= {answer[0]: answer[1] for answer in await found if not isinstance(answer, Exception)}
        return gathered(told)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for a ``Layout``; QUARTET_ variables of this process are those of all replicas.

    Raises SettingsError for a wrong one, and ValueError for a task that is in no group or in two.
    """
    layout, settings = Layout.model_validate(arguments), Settings()
    tasks = [(task, name) for name, group in layout.groups.items() for task in group.tasks]
    if sorted(task for task, _ in tasks) != sorted(TASKS):
        raise ValueError(f"groups have the tasks {sorted(task for task, _ in tasks)}; each must be in one of them")
    shared = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    shared |= {f"{PREFIX}STORE": str(settings.store.resolve()), f"{PREFIX}WORKERS": "1"}
    if settings.keys_file:
        shared[f"{PREFIX}KEYS_FILE"] = str(settings.keys_file.resolve())
    groups = {name: _group(name, group, shared, settings) for name, group in layout.groups.items()}
    ingress = serve.deployment(Ingress).options(
        num_replicas=layout.ingresses,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.request_seconds + 5,
    )
    return ingress.bind(dict(tasks), shared, groups)


def _group(name: str, group: Group, shared: dict[str, str], settings: Settings) -> Any:
    own = {PREFIX + key.upper(): value for key, value in group.settings.items()}
    threads = {f"{PREFIX}THREADS": str(max(1, int(group.cpus)))}
    deployment = serve.deployment(Replica).options(
        name=name,
        ray_actor_options={"num_cpus": group.cpus, "num_gpus": group.gpus},
        logging_config=QUIET,
        max_ongoing_requests=max(1, int(4 * group.requests)),  # so that batches fill while another replica starts
        max_queued_requests=settings.queue_rows,
        autoscaling_config={
            "min_replicas": group.least,
            "max_replicas": group.most,
            "target_ongoing_requests": group.requests,
            "metrics_interval_s": REPORT_SECONDS,
            "look_back_period_s": MEAN_SECONDS,
            "upscale_delay_s": group.upscale_seconds,
            "downscale_delay_s": group.downscale_seconds,
        },
        health_check_period_s=5,
        health_check_timeout_s=settings.liveness_timeout_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.request_seconds + settings.shutdown_grace_seconds,
    )
    return deployment.bind(threads | shared | own)


app = build({})
