"""Quartet as a Ray Serve application: groups of replicas on one or many machines.

    serve run deploy.ray_serve:app                       # the default groups below
    serve deploy deploy/ray_serve.yaml                   # your own groups on a running cluster

Each replica is a complete service that does not listen on a socket. Ray starts replicas on the machines, restarts
replicas that fail, and routes each request to a replica with few requests. It adjusts the number of replicas to the
number of waiting and running requests, and lets a replica finish its requests before it stops the replica. Replicas are
grouped by task, so that long texts do not delay images. The ingress is a process that checks keys and forwards requests
to the groups. If a replica dies before its response has started, the ingress sends the request to another replica, but
only once, and only if the request changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Metric
from pydantic import BaseModel, ConfigDict, Field
from ray import exceptions, serve
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.main import create_app
from app.settings import PREFIX, Settings, SettingsError
from app.store import TaskName
from app.tasks import TASKS
from deploy.forward import ForwardedResponse, HostedApp, render_metrics
from deploy.ingress import IngressApp

REPLICA_ERRORS = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    ReplicaUnavailableError,
)
METRICS_SECONDS = 5.0  # timeout for collecting the metrics of all replicas
REPORT_SECONDS = 2.0  # interval of the reports of waiting and running requests; Ray's default of 10 s is too slow
LOOK_BACK_SECONDS = 10.0  # time over which Ray averages these reports; Ray's default is 30 s
LOGGING = {"enable_access_log": False}  # replicas write their own access log


class Group(BaseModel):
    """A group of replicas for some tasks.

    While more than ``target_requests`` requests wait or run in each replica on average, Ray starts more replicas, up to
    ``max_replicas``. ``settings`` sets the settings of these replicas. Its keys are the names of QUARTET_ variables in
    lower case, without the prefix.
    """

    model_config = ConfigDict(extra="forbid")

    tasks: list[TaskName] = Field(min_length=1)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_requests: float = Field(default=16, gt=0)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    upscale_seconds: float = Field(default=5, ge=0)
    downscale_seconds: float = Field(default=60, ge=0)
    settings: dict[str, str] = {}


class Layout(BaseModel):
    """The groups of replicas. Each task belongs to one group. ``ingresses`` is the number of ingress processes."""

    model_config = ConfigDict(extra="forbid")

    groups: dict[str, Group] = {
        "oneshot": Group(tasks=[task.name for task in TASKS.values() if task.engine == "batch"]),
        "texts": Group(tasks=[task.name for task in TASKS.values() if task.engine == "text"]),
    }
    ingresses: int = Field(default=2, ge=1)


class Replica:
    """One replica of a group."""

    async def __init__(self, environment: dict[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        os.environ.update(environment)
        self.hosted = HostedApp(create_app(Settings()))
        self.models = self.hosted.app.state.models
        await self.hosted.start()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Answer a request. Yields lists of ASGI messages, as ``HostedApp.answer`` does."""
        answer = self.hosted.answer(scope, body)
        try:
            async for messages in answer:
                yield messages
        finally:
            await answer.aclose()

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Return the name of this replica and its metrics."""
        self.models.report()
        context = serve.get_replica_context()
        return f"{context.deployment}-{context.replica_id.unique_id}", list(self.models.observers.collect())

    async def check_health(self) -> None:
        """Raise RuntimeError if the compute thread hangs or a network cannot recover. Ray then replaces the replica."""
        if self.models.recovery.failure:
            raise RuntimeError(self.models.recovery.failure)
        silence = self.models.executor.stalled_seconds()
        if silence > 2 * self.models.settings.limits.liveness_timeout_seconds:
            raise RuntimeError(f"the compute thread has not answered for {silence:.0f} s")

    async def __del__(self) -> None:
        """Stop the service. Ray calls this method after the last request."""
        await self.hosted.stop()


class AppResponse(Response):
    """A response that an ASGI application creates."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Ingress:
    """Forwards each request to the group of its task. ``tasks`` maps tasks to groups.

    The first group answers requests without a task.
    """

    def __init__(self, tasks: dict[str, str], environment: dict[str, str], groups: dict[str, DeploymentHandle]) -> None:
        os.environ.update(environment)  # this process may run on another machine
        settings = Settings()
        self.tasks = tasks
        self.pause_seconds = settings.limits.body_seconds
        self.groups = groups
        self.calls = {name: handle.options(method_name="answer", stream=True).remote for name, handle in groups.items()}
        self.app = IngressApp(settings, self._forward_to, {"/metrics": self._show_metrics})

    async def __call__(self, request: Request) -> Response:
        return AppResponse(self.app)

    def _forward_to(self, task: TaskName | None, max_body_bytes: int) -> Response:
        call = self.calls[self.tasks[task] if task else next(iter(self.groups))]
        return ForwardedResponse(call, max_body_bytes, self.pause_seconds, REPLICA_ERRORS, BackPressureError)

    async def _show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(await self._metrics(), media_type=CONTENT_TYPE_LATEST)  # metrics of all replicas
        await response(scope, receive, send)

    async def _metrics(self) -> bytes:
        by_replica: dict[str, Iterable[Metric]] = {}
        for handle in self.groups.values():
            results = handle.broadcast("metrics").results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
            by_replica |= {result[0]: result[1] for result in await results if not isinstance(result, Exception)}
        return render_metrics(by_replica)


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from the fields of a ``Layout``. All replicas get the QUARTET_ variables of this process.

    Raises:
        SettingsError: a variable is invalid, or asks for HTTPS, which Ray does not support.
        ValueError: a task is in no group or in several groups.
    """
    layout, settings = Layout.model_validate(arguments), Settings()
    if settings.tls_cert:
        raise SettingsError(
            f"QUARTET_TLS_CERT is {str(settings.tls_cert)!r}: Ray takes only HTTP; use a proxy for HTTPS"
        )
    tasks = [(task, name) for name, group in layout.groups.items() for task in group.tasks]
    if "infer" not in dict(tasks):  # by default, the first group serves imported networks that have no task
        tasks.append(("infer", next(iter(layout.groups))))
    if sorted(task for task, _ in tasks) != sorted(TASKS):
        raise ValueError(f"groups have the tasks {sorted(task for task, _ in tasks)}; each task must be in one group")
    shared = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    shared |= {f"{PREFIX}STORE": str(settings.store.resolve()), f"{PREFIX}WORKERS": "1"}
    for name, path in (("KEYS_FILE", settings.keys_file), ("ADMIN_KEY_FILE", settings.admin_key_file)):
        if path:
            shared[f"{PREFIX}{name}"] = str(path.resolve())
    groups = {name: _group(name, group, shared, settings) for name, group in layout.groups.items()}
    ingress = serve.deployment(Ingress).options(
        num_replicas=layout.ingresses,
        ray_actor_options={"num_cpus": 0},
        logging_config=LOGGING,
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
        logging_config=LOGGING,
        max_ongoing_requests=max(1, int(4 * group.target_requests)),  # fills batches while another replica starts
        max_queued_requests=settings.queue_rows,
        autoscaling_config={
            "min_replicas": group.min_replicas,
            "max_replicas": group.max_replicas,
            "target_ongoing_requests": group.target_requests,
            "metrics_interval_s": REPORT_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "upscale_delay_s": group.upscale_seconds,
            "downscale_delay_s": group.downscale_seconds,
        },
        health_check_period_s=5,
        health_check_timeout_s=settings.limits.liveness_timeout_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.request_seconds + settings.shutdown_grace_seconds,
    )
    return deployment.bind(threads | shared | own)


app = build({})
