"""The steps from a job to a response, which all inference requests share.

The steps are: find the model, check its queue, prepare the job, compute it, finish the answer, and encode it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

from app.api.deadline import DEADLINE, Deadline, run_before_deadline
from app.api.middleware.body_memory import hold_memory
from app.api.operation import Endpoint, Request
from app.api.request_body import read_json
from app.api.responses import json_response
from app.api.shadow import Copy
from app.api.sse import DONE, EventStream, event
from app.engine.executor import INLINE_SIZE
from app.engine.fair_queue import current_caller
from app.engine.observer import current_trace
from app.limits import Limits
from app.observability.middleware import REQUEST_ID
from app.serving.model import Model
from app.store import Card
from app.tasks import Task
from app.tasks.job import Job
from app.tasks.text_generation import Continuation

J = TypeVar("J", bound=Job)
Fields = TypeVar("Fields")
Body = TypeVar("Body", bound=BaseModel)


async def resolve(request: Request, task: Task[Any], name: str | None) -> Model[Any]:
    """Return the loaded model version that answers a request. Waits for a version that is still being loaded.

    While a new version serves a share of the requests (as a canary), the request id selects the version. Requests with
    the same ``x-request-id`` therefore get the same version. The trace of the request records the version.

    Raises:
        UnknownModel, RetiredModel, UnloadedModel, BadValue, NotReady, TimedOut: see ``Models.resolve``.
    """
    model = await request.models.resolve(task, name, request.scope.get(REQUEST_ID, ""), request.scope[DEADLINE])
    if trace := current_trace.get():
        trace.model, trace.version = model.card.name, model.card.version
    return model


@dataclass(frozen=True)
class Call(Generic[Fields]):
    """An inference request: its HTTP request, its fields in terms of the protocol, and the model that answers it."""

    request: Request
    body: Fields
    model: Model[Any]


@dataclass(frozen=True)
class Protocol:
    """How a protocol writes the answers to jobs of one task.

    Attributes:
        encode: function ``(call, job, answer)`` that returns the response, or its content for JSON.
        encode_delta: function ``(call, job, answer, delta)`` that returns the event for new characters of a text.
        encode_end: function ``(call, job, answer)`` that returns the event after the last characters, or None.
        stream_end: the end marker of a stream.
    """

    encode: Callable[[Call[Any], Any, Any], Any]
    encode_delta: Callable[[Call[Any], Any, Any, TextDelta], Any] | None = None
    encode_end: Callable[[Call[Any], Any, Any], Any] = lambda *_: None
    stream_end: bytes = DONE


async def run_job(call: Call[Any], job: Job, protocol: Protocol) -> Response:
    """Prepare a job, compute it and return the response. The queue of the model must have been checked.

    Raises:
        BadValue, Overloaded, NotReady, InferenceFailed, OutOfMemory: a step or the engine raised this error.
        MemoryFull: all requests together would hold too much memory.
        CallerGone, TimedOut: the client disconnected, or the deadline passed.
    """
    request, model, executor = call.request, call.model, call.request.models.parse_executor
    predictor = model.predictor
    items = await run_before_deadline(request, executor, job.prepare_size, predictor.prepare, job)
    hold_memory(request, job.memory_bytes(items))
    keep = _capture(call, job)
    if job.streamed:
        events = _events(call, job, predictor.finish(job, items, items), protocol, keep)
        return EventStream(request, events, protocol.stream_end, model=call.model.id)
    async with Deadline(request):
        outputs = await model.engine.submit(items)

        def respond() -> tuple[Any, Response]:
            answer = predictor.finish(job, items, outputs)
            content = protocol.encode(call, job, answer)
            return answer, content if isinstance(content, Response) else json_response(content)

        is_small = job.answer_size(outputs) <= INLINE_SIZE
        answer, response = respond() if is_small else await executor.run(respond)
        keep(answer)
        return response


def _capture(call: Call[Any], job: Job) -> Callable[[Any], None]:
    """Return a function that captures the answer to a job."""
    service, request_id, key = call.request.service, call.request.scope[REQUEST_ID], current_caller.get()
    capture, shadows, started_at = service.capture, service.shadows, perf_counter()
    if capture is None or shadows is None:
        return lambda answer: None

    def keep(answer: Any) -> None:
        if capture.offer(request_id, key, call.model.card, job, answer):
            shadows.offer(Copy(request_id, call.model, job, answer, perf_counter() - started_at))

    return keep


@dataclass(frozen=True)
class TextDelta:
    """New characters of text number ``index``, from position ``start``. ``finished`` is true for its last delta."""

    index: int
    start: int
    text: str
    finished: bool


async def _events(
    call: Call[Any], job: Job, answer: Any, protocol: Protocol, keep: Callable[[Any], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a streamed text while it is generated. The last ``TextDelta`` may be empty."""
    texts: list[Continuation] = answer.texts
    sent, unfinished = [0] * len(texts), list(range(len(texts)))

    def encode(step: list[TextDelta]) -> bytes:
        assert protocol.encode_delta
        return b"".join([event(protocol.encode_delta(call, job, answer, delta)) for delta in step])

    is_large = job.answer_size(texts) > INLINE_SIZE  # of the first step, which may repeat a long prompt
    async with aclosing(call.model.stream(texts)) as steps:
        async for _ in steps:
            step = []
            for index in unfinished:
                text = texts[index]
                if (new := text.streamable_text[sent[index] :]) or text.finished:
                    step.append(TextDelta(index, sent[index], new, text.finished))
                sent[index] += len(new)
            unfinished = [index for index in unfinished if not texts[index].finished]
            if step:
                yield await call.request.models.parse_executor.run(encode, step) if is_large else encode(step)
                is_large = False
    keep(answer)
    if end := protocol.encode_end(call, job, answer):
        yield event(end)


def json_endpoint(
    task: Task[Any],
    body: type[Body],
    protocol: Protocol,
    check_model: Callable[[Card, Body, J], None] | None = None,
) -> Callable[[Callable[[Body, Limits], J]], Endpoint]:
    """Make an endpoint from a function that returns the job for a JSON body and raises BadValue.

    Args:
        body: the Pydantic class of the body, with a field ``model``.
        check_model: function that completes the job with what the card of its model needs. Raises BadValue.
    """

    def endpoint_of(decode: Callable[[Body, Limits], J]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            fields: Any = await read_json(request, body)
            job = decode(fields, request.limits)
            job.check(request.limits)
            model = await resolve(request, task, fields.model)
            if check_model:
                check_model(model.card, fields, job)
            model.engine.admit(job.rows)
            return await run_job(Call(request, fields, model), job, protocol)

        endpoint.__name__, endpoint.__doc__ = decode.__name__, decode.__doc__
        return endpoint

    return endpoint_of
