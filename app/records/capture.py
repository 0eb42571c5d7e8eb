"""Capture a share of the requests for some models, without delaying them."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.limits import Limits
from app.records.captured import ANSWERS, Captured, Compared
from app.records.database import LOCK_SECONDS, Database, FeedbackFigure, RecordsUnavailable
from app.settings import Settings, SettingsError, hide_password
from app.store.card import Card, is_model_name
from app.tasks.job import Job

log = logging.getLogger("quartet")

GATHER_SECONDS = 0.1  # requests of this time are stored in one transaction


class Capture:
    """Stores the captured requests in an open database on a thread. If it cannot keep up, they are dropped and counted.

    Args:
        shares: the share of the requests to capture, in per cent, by model.
        count: function that counts a request, given its model, and ``stored``, ``dropped``, ``compared`` (with the
            answer of a shadow) or ``skipped`` (because the service was busy).
    """

    def __init__(
        self,
        database: Database,
        shares: Mapping[str, float],
        limits: Limits,
        count: Callable[[str, str], object],
    ) -> None:
        self.database, self.shares, self.count = database, shares, count
        self._limits = limits
        # Queue, which has a limit, takes four times as long for each request.
        self._waiting: queue.SimpleQueue[Callable[[], Captured | Compared] | None] = queue.SimpleQueue()
        self._cards: dict[tuple[str, int], Card] = {}  # of captured requests
        self.drift: list[tuple[str, str, str, float]] = []  # model, version, feature, and its drift
        self.figures: list[FeedbackFigure] = []  # what feedback says about the answers, at most a few seconds old
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def offer(self, request: str, key: str | None, card: Card, job: Job, answer: Any) -> bool:
        """Capture a request if it belongs to the share of its model. Return whether it does."""
        belongs = type(job) in ANSWERS and random.random() * 100 < self.shares.get(card.name, 0.0)
        if belongs:
            self._cards[card.name, card.version] = card
            self._put(card.name, lambda: Captured.of(request, key, card, job, answer))
        return belongs

    def add_copy(self, compared: Compared) -> None:
        """Store the answer of a shadow, if its request is stored."""
        self._put(compared.model, lambda: compared)

    def _put(self, model: str, make: Callable[[], Captured | Compared]) -> None:
        if self._waiting.qsize() < self._limits.captures_waiting:
            self._waiting.put(make)
        else:
            self.count(model, "dropped")

    def close(self) -> None:
        """Store the requests that wait, unless the disk does not answer."""
        self._waiting.put(None)
        self._thread.join(LOCK_SECONDS)

    def _run(self) -> None:
        """Store requests, update ``figures`` and ``drift``, and delete old requests until ``close`` is called."""
        is_open, figures_at, drift_at, running = True, 0.0, 0.0, True
        while running:
            taken = self._take()
            running = None not in taken
            made = [make() for make in taken if make]
            now, has_failed = time.monotonic(), False
            try:
                if not is_open:
                    self.database.open()
                    is_open = True
                if made:
                    self.database.add(made)
                if now > figures_at + self._limits.figures_seconds:
                    self.figures, figures_at = self.database.figures(), now
                if now > drift_at + self._limits.drift_seconds:
                    drift_at = now
                    self.drift = [
                        (name, str(version), feature, value)
                        for (name, version), card in list(self._cards.items())
                        for feature, value in self.database.drift(card).items()
                    ]
                    self.database.trim(self._limits.capture_bytes, self._limits.capture_days * 86_400)
            except RecordsUnavailable as error:
                log.error("requests cannot be captured: %s", error)
                is_open, has_failed = False, True
            for each in made:
                self.count(each.model, "dropped" if has_failed else each.result)

    def _take(self) -> list[Callable[[], Captured | Compared] | None]:
        """Return what has been offered, after a while also if nothing was."""
        try:
            taken = [self._waiting.get(timeout=self._limits.figures_seconds)]
        except queue.Empty:
            return []
        if taken[0]:
            time.sleep(GATHER_SECONDS)
        while len(taken) < self._limits.captures_waiting and not self._waiting.empty():
            taken.append(self._waiting.get())
        return taken


def parse_shares(text: str) -> dict[str, float]:
    """Return the shares in per cent, given a text such as ``sales:20,pets``. Raises SettingsError."""
    shares = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, share = part.partition(":")
        try:
            shares[name] = float(share or 100)
        except ValueError:
            shares[name] = 0.0
        if not is_model_name(name) or not 0 < shares[name] <= 100:
            raise SettingsError(f"QUARTET_CAPTURE has {part!r}; it should be like 'sales' or 'sales:20' (per cent)")
    return shares


def open_records(settings: Settings, count: Callable[[str, str], object]) -> tuple[Database | None, Capture | None]:
    """Return the records and the capture of a service, or None for each that it does not have. Raises SettingsError.

    ``count``: see ``Capture``.
    """
    shares, folder = parse_shares(settings.capture), settings.records_folder
    if folder is None:
        if shares:
            raise SettingsError(f"QUARTET_CAPTURE is {settings.capture!r}, which needs QUARTET_RECORDS_FOLDER")
        return None, None
    name = f"QUARTET_RECORDS_FOLDER is {str(folder)!r}"
    if settings.records_url:
        name += f", QUARTET_RECORDS_URL {hide_password(repr(settings.records_url))}"
    try:
        database = Database(folder, settings.records_url)
        database.open()
    except RecordsUnavailable as error:
        raise SettingsError(f"{name}: {error}") from None
    return database, Capture(database, shares, settings.limits, count) if shares else None
