"""The steps that all inference requests share.

The steps are: set the deadline, read the body, find the model, check its queue, parse, compute, and build the response.
Some endpoints find the model and check its queue before they read the body, to reject requests early.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from fastapi import Request
from starlette.responses import Response

from app.api.deadline import Deadline, run_before_deadline, set_deadline
from app.api.middleware.body_memory import hold_memory
from app.api.request_body import EXTRA_COMMAS, MAX_FIELDS, BodyReader, RequestBody, max_json_bytes, read_json
from app.api.sse import DONE, EventStream
from app.engine.executor import INLINE_SIZE
from app.engine.observer import current_trace
from app.observability.middleware import REQUEST_ID
from app.serving.model import Model, P
from app.serving.models import Models
from app.tasks import Task


async def resolve_model(request: Request, models: Models, task: Task[P], name: str | None, deadline: float) -> Model[P]:
    """Return the loaded model version that answers a request. Waits for a version that is still being loaded.

    While a new version serves a share of the requests (as a canary), the request id selects the version. Requests with
    the same ``x-request-id`` therefore get the same version.

    Raises:
        UnknownModel, RetiredModel, UnloadedModel, BadValue, NotReady, TimedOut: see ``Models.resolve``.
    """
    return await models.resolve(task, name, request.scope.get(REQUEST_ID, ""), deadline)


def record_version(model: Model) -> None:
    """Record in the trace of the request that this version answers it. Metrics and the access log use this."""
    if trace := current_trace.get():
        trace.model, trace.version = model.card.name, model.card.version


class InferenceBody(RequestBody):
    """A JSON body with an optional model name.

    Each subclass declares the field ``model`` itself, so that the OpenAPI document lists it at the right place.
    """

    if TYPE_CHECKING:
        model: str | None

    def resolved(self) -> Self:
        """Return the body with aliases replaced by the names of the fields. Raises BadValue."""
        return self


class Inference(Generic[P]):
    """An inference request whose model version is known. Subclasses define the steps in which endpoints differ.

    ``run_inference`` calls ``parse``, the engine and ``respond``, in this order. Steps with a size of up to
    ``INLINE_SIZE`` values run on the event loop. Larger steps run on a thread.
    """

    rows = 1  # number of rows that the request adds to the model's queue
    parse_size = 0  # size of the step ``parse``, in values
    streamed = False  # whether the response is a stream of server-sent events
    stream_end = DONE
    memory_bytes = 0  # memory for the items, without the body; known after ``parse``

    def __init__(self, model: Model[P]) -> None:
        self.model = model
        self.engine = model.engine

    def parse(self) -> Sequence[Any]:
        """Return the items for the engine. Raises BadValue."""
        raise NotImplementedError

    def engine_deadline(self, deadline: float) -> float:
        """Return the deadline for the engine, in event-loop time: ``deadline``, or an earlier time."""
        return deadline

    def response_size(self, outputs: Sequence[Any]) -> int:
        """Return the size of the step ``respond``, in values."""
        return 0

    def respond(self, outputs: Sequence[Any]) -> Response:
        """Return the response, given one output for each item."""
        raise NotImplementedError

    def events(self) -> AsyncGenerator[bytes, None]:
        """Return the server-sent events of a streamed response."""
        raise NotImplementedError


async def run_inference(request: Request, models: Models, inference: Inference[Any], deadline: float) -> Response:
    """Parse a request, run it on the engine and return the response.

    The caller must have read the body and checked the queue with the engine's ``admit``.

    Raises:
        BadValue, Overloaded, NotReady, InferenceFailed, OutOfMemory: a step or the engine raised this error.
        MemoryFull: all requests together would hold too much memory.
        CallerGone, TimedOut: the client disconnected, or ``deadline`` passed.
    """
    executor = models.parse_executor
    if inference.parse_size <= INLINE_SIZE:  # the usual case, without the cost of a coroutine
        items = inference.parse()
    else:
        items = await run_before_deadline(request, executor, inference.parse_size, inference.parse)
    hold_memory(request, inference.memory_bytes)
    deadline = inference.engine_deadline(deadline)
    if inference.streamed:
        return EventStream(request, inference.events(), deadline, inference.stream_end, x_model=inference.model.id)
    with Deadline(request, deadline):
        outputs = await inference.engine.submit(items)
        if inference.response_size(outputs) <= INLINE_SIZE:
            return inference.respond(outputs)
        return await executor.run(inference.respond, outputs)


Body = TypeVar("Body", bound=InferenceBody)


class JsonEndpoint(Generic[Body, P]):
    """Answers the requests of an endpoint that takes an ``InferenceBody``.

    ``create`` makes the ``Inference`` of a request and raises BadValue for fields that do not fit the model.
    ``content_bytes`` and ``content_commas`` limit the bytes and commas of the prompt or of the values in the body.
    """

    def __init__(
        self,
        models: Models,
        task: Task[P],
        body: type[Body],
        create: Callable[[Request, Model[P], Body], Inference[P]],
        *,
        content_bytes: int = 0,
        content_commas: int,
        max_fields: int = MAX_FIELDS,
    ) -> None:
        self._registry = models
        self._task = task
        self._body = body
        self._create = create
        settings = models.settings
        max_bytes = max_json_bytes(settings.max_body_bytes, content_bytes)
        self._reader = BodyReader(max_bytes, settings.body_seconds, models.parse_executor, max_fields)
        self._max_commas = content_commas + EXTRA_COMMAS

    async def run(self, request: Request) -> Response:
        """Answer a request. First read the body, then find the model and check its queue."""
        deadline = set_deadline(request, self._registry.settings.request_seconds)
        body = (await read_json(request, self._body, self._reader, self._max_commas)).resolved()
        model = await resolve_model(request, self._registry, self._task, body.model, deadline)
        record_version(model)
        inference = self._create(request, model, body)
        model.engine.admit(inference.rows)
        return await run_inference(request, self._registry, inference, deadline)
