"""Repeat captured requests with the shadows of their models while the service is idle, and compare the answers."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from app.errors import QuartetError
from app.records.capture import Capture
from app.records.captured import Compared, Measured, answer_json, compare
from app.serving.model import Model
from app.serving.models import IDLE_CHECK_SECONDS, Models
from app.tasks.job import Job
from app.tasks.text_generation import ContinueJob

log = logging.getLogger("quartet")

WAITING = 64  # copies; each may have 16 images
WAIT_SECONDS = 1.0  # a copy that waits longer for an idle service is dropped


@dataclass(frozen=True)
class Copy:
    """A captured request, its answer, and the seconds that the answer took."""

    request: str
    model: Model[Any]
    job: Job
    answer: Any
    seconds: float


class Busy(Exception):
    """Requests wait for an engine."""


class ShadowTraffic:
    """Takes copies of captured requests. ``run`` works on one copy at a time.

    A copy is dropped and counted if the service is not idle soon, or as soon as a request waits for an engine.
    """

    def __init__(self, models: Models, capture: Capture) -> None:
        self._models, self._capture = models, capture
        self._copies: asyncio.Queue[Copy] = asyncio.Queue(WAITING)

    def offer(self, copy: Copy) -> None:
        """Take a copy if it belongs to the share of a shadow."""
        if (shadow := self._shadow(copy)) and random.random() * 100 < shadow[1]:
            try:
                self._copies.put_nowait(copy)
            except asyncio.QueueFull:
                self._capture.count(copy.model.card.name, "skipped")

    def _shadow(self, copy: Copy) -> tuple[Model[Any], float] | None:
        """Return the shadow of the model, and its share in per cent, if the active version has sent the answer."""
        card = copy.model.card
        version_set = self._models.version_sets.get(card.name)
        if version_set is None or version_set.shadow is None or version_set.active != card.version:
            return None
        model = self._models.entry(card.name, version_set.shadow.version).model
        return (model, version_set.shadow.share) if model else None

    async def run(self) -> None:
        """Compare copies until this coroutine is cancelled."""
        while True:
            copy = await self._copies.get()
            try:
                await self._repeat(copy)
            except Busy:
                self._capture.count(copy.model.card.name, "skipped")
            except QuartetError as error:
                log.warning("the shadow of %s failed on request %s: %s", copy.model.card.name, copy.request, error)
            except Exception:
                log.exception("a request could not be compared")

    async def _repeat(self, copy: Copy) -> None:
        """Compute the answer of the shadow, and store it with its comparison."""
        found = self._shadow(copy)
        if found is None:  # the shadow has ended
            return
        # While a batch is computed, the callers of the last one prepare the next: a copy would delay them.
        if not await self._models.idle(WAIT_SECONDS, running=True):
            raise Busy
        shadow, job, started_at = found[0], copy.job, perf_counter()
        if isinstance(job, ContinueJob):
            answer, own, others = "", await self._losses(copy.model, job), await self._losses(shadow, job)
        else:
            other = await self._answer(shadow, job)
            seconds = perf_counter() - started_at
            own = [Measured(0, 0, "seconds", copy.seconds)]
            others = [*compare(job, copy.answer, other), Measured(0, 0, "seconds", seconds)]
            answer = answer_json(job, other)
        measured = {copy.model.card.version: own, shadow.card.version: others}
        self._capture.add_copy(Compared(copy.request, shadow.card.name, shadow.card.version, answer, measured))

    async def _answer(self, model: Model[Any], job: Job) -> Any:
        """Return the answer of a model. Raises Busy as soon as a request waits for another engine."""
        items = await self._models.parse_executor.run(model.predictor.prepare, job)
        work = asyncio.create_task(model.engine.submit(items))
        try:
            while not (await asyncio.wait([work], timeout=IDLE_CHECK_SECONDS))[0]:
                if self._models.is_busy(except_for=model.engine):
                    raise Busy
        finally:
            work.cancel()
        return model.predictor.finish(job, items, await work)

    async def _losses(self, model: Model[Any], job: ContinueJob) -> list[Measured]:
        """Measure how well a model predicts the prompts, in nats for each character.

        Sampled texts say little about a network, and its own texts are always likely. The prompts are real texts.
        """
        scored = ContinueJob(job.prompts, max_characters=1, log_probs=0, echo=True, has_many=True)
        answer = await self._answer(model, scored)
        records = [text.prompt.log_probs.tokens if text.prompt.log_probs else () for text in answer.texts]
        return [Measured(i, 0, "loss", -sum(each) / len(each)) for i, each in enumerate(records) if each]
