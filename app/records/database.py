"""The captured requests with their feedback, and the batch jobs, in a database and a folder.

    records.db              the tables below, in SQLite, unless they are in PostgreSQL
    images/<digest>.png     the images of captured requests, each stored once
    files/<id>              the inputs and outputs of batch jobs

Feedback and images of a request are deleted with it. The statements are valid for both databases.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
from PIL import Image
from typing_extensions import TypedDict

from app.errors import NotReady
from app.records.captured import Captured, Compared, FeedbackRequest, Measured
from app.records.drift import Features, drift, image_features, series_features, text_features
from app.store import Card
from app.tasks.image_codecs import png

log = logging.getLogger("quartet")

FILE = "records.db"
STATEMENT_ROWS = 500  # a statement of SQLite may have 32,766 values
LOCK_SECONDS = 5  # a transaction of another worker takes milliseconds
POSTGRES_LOCK = 7_370_283  # any number that other programs do not use for a lock of this database
PLACEHOLDER = re.compile(r":([a-z_]+)")
TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, time DOUBLE PRECISION, key TEXT, model TEXT, version INTEGER, task TEXT, job TEXT,
    answer TEXT);
CREATE TABLE IF NOT EXISTS images (
    request TEXT REFERENCES requests ON DELETE CASCADE, position INTEGER, digest TEXT, bytes INTEGER,
    PRIMARY KEY (request, position));
CREATE TABLE IF NOT EXISTS feedback (
    request TEXT REFERENCES requests ON DELETE CASCADE, item INTEGER, step INTEGER, truth TEXT,
    PRIMARY KEY (request, item, step));
CREATE TABLE IF NOT EXISTS shadows (
    request TEXT REFERENCES requests ON DELETE CASCADE, version INTEGER, answer TEXT, PRIMARY KEY (request, version));
CREATE TABLE IF NOT EXISTS figures (
    request TEXT REFERENCES requests ON DELETE CASCADE, version INTEGER, item INTEGER, step INTEGER, name TEXT,
    value DOUBLE PRECISION, PRIMARY KEY (request, version, item, step, name));
CREATE INDEX IF NOT EXISTS newest ON requests (model, version, time);
CREATE TABLE IF NOT EXISTS api_objects (
    id TEXT PRIMARY KEY, key TEXT, kind TEXT, status TEXT, created DOUBLE PRECISION, body TEXT, owner TEXT,
    lease DOUBLE PRECISION DEFAULT 0);
CREATE TABLE IF NOT EXISTS batch_lines (
    batch TEXT REFERENCES api_objects ON DELETE CASCADE, line INTEGER, custom_id TEXT, status INTEGER, body TEXT,
    PRIMARY KEY (batch, line))
"""
USED_BYTES = (  # in SQLite and in PostgreSQL
    "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size",
    "SELECT COALESCE(SUM(pg_column_size(requests.*)), 0) FROM requests",
)


class RecordsUnavailable(NotReady):
    """The records cannot be read or written now."""


class FeedbackFigure(TypedDict):
    model: str
    version: int
    name: str
    """`accuracy` and `confidence` of images, which should be equal; `mase` and `coverage_95` of forecasts; `accepted`
    of texts"""
    count: int
    mean: float
    interval: list[float]
    """95 % interval of the mean"""


class Rows:
    """A transaction. Its statements have values by name, such as ``:id``. Rows of results are named tuples."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def _translate(self, statement: str) -> str:
        return statement if isinstance(self._connection, sqlite3.Connection) else PLACEHOLDER.sub(r"%(\1)s", statement)

    def execute(self, statement: str, values: Mapping[str, Any] = {}) -> Any:  # it is not changed
        return self._connection.execute(self._translate(statement), values)

    def insert(self, table: str, rows: Sequence[Sequence[Any]], on_conflict: str = "DO NOTHING") -> None:
        """Insert rows, which have a value for each column of the table.

        A statement inserts many rows. With one for each row, SQLite would release Python's lock for each row, and get
        it back late while the service is busy.
        """
        mark = "?" if isinstance(self._connection, sqlite3.Connection) else "%s"
        for start in range(0, len(rows), STATEMENT_ROWS):
            some = rows[start : start + STATEMENT_ROWS]
            marks = ", ".join([f"({', '.join([mark] * len(some[0]))})"] * len(some))
            statement = f"INSERT INTO {table} VALUES {marks} ON CONFLICT {on_conflict}"
            self._connection.execute(statement, list(chain.from_iterable(some)))


@lru_cache
def _row_class(names: Sequence[str]) -> Any:
    return namedtuple("Row", names, rename=True)


def _named_row(cursor: sqlite3.Cursor, row: Sequence[Any]) -> Any:
    return _row_class(tuple(column[0] for column in cursor.description))._make(row)


class Database:
    """The records in ``folder``. Several processes may use them at the same time.

    ``url`` is that of a PostgreSQL database, which several machines may use if they share the folder. Methods raise
    RecordsUnavailable.
    """

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder, self._url = folder, url
        self._errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
        self._kept: sqlite3.Connection | None = None  # while one is open, closing others does not copy the WAL file
        if url:
            try:
                import psycopg
            except ImportError:
                raise RecordsUnavailable("a PostgreSQL database needs the extra [postgres]") from None
            self._errors = (psycopg.Error, OSError)

    def open(self) -> None:
        """Create the tables. A damaged file of SQLite is moved aside first."""
        self.close()
        try:
            for folder in (self.folder, self.folder / "images", self.folder / "files"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RecordsUnavailable(f"the records cannot be written: {error}") from error
        try:
            self._create()
        except RecordsUnavailable as error:
            cause = error.__cause__
            if not isinstance(cause, sqlite3.DatabaseError) or isinstance(cause, sqlite3.OperationalError):
                raise  # locked, or the disk is full
            aside = self.folder / f"{FILE}.damaged-{time.time_ns()}"
            (self.folder / FILE).rename(aside)
            for suffix in ("-wal", "-shm"):
                (self.folder / f"{FILE}{suffix}").unlink(missing_ok=True)
            log.error("%s is damaged (%s) and was moved to %s", FILE, cause, aside.name)
            self._create()

    def _create(self) -> None:
        with self.transaction() as rows:
            if not self._url:
                rows.execute("PRAGMA journal_mode = WAL")
            for statement in TABLES.split(";"):
                rows.execute(statement)
        if not self._url:
            self._kept = sqlite3.connect(self.folder / FILE, check_same_thread=False)
            self._kept.execute("SELECT COUNT(*) FROM api_objects")

    def close(self) -> None:
        if self._kept:
            self._kept.close()
            self._kept = None

    @contextmanager
    def transaction(self) -> Iterator[Rows]:
        """Commit the changes of the block together, or none of them. Other transactions wait, also of other machines.

        The block may also use files in the folder. Raises RecordsUnavailable.
        """
        try:
            with closing(self._connect()) as connection, connection:
                if self._url:
                    connection.execute(f"SELECT pg_advisory_xact_lock({POSTGRES_LOCK})")
                yield Rows(connection)
        except self._errors as error:
            raise RecordsUnavailable(f"the records cannot be read or written now: {error}") from error

    def _connect(self) -> Any:
        if self._url:
            import psycopg
            from psycopg.rows import namedtuple_row

            options = f"-c lock_timeout={LOCK_SECONDS}s"
            return psycopg.connect(self._url, row_factory=namedtuple_row, connect_timeout=LOCK_SECONDS, options=options)
        file = sqlite3.connect(self.folder / FILE, timeout=LOCK_SECONDS, isolation_level="IMMEDIATE")
        file.row_factory = _named_row
        file.execute("PRAGMA foreign_keys = ON")
        file.execute("PRAGMA synchronous = NORMAL")  # in WAL mode, only a loss of power loses changes
        return file

    def add(self, records: Sequence[Captured | Compared]) -> None:
        """Store requests, and answers of shadows to stored requests. What is stored already is left out."""
        requests = [each for each in records if isinstance(each, Captured)]
        copies = [each for each in records if isinstance(each, Compared)]
        with self.transaction() as rows:
            rows.insert("requests", [each.row() for each in requests])
            images = [
                (each.request, position, digest, pixels)
                for each in requests
                for position, (digest, pixels) in enumerate(zip(each.digests(), each.pixels, strict=True))
            ]
            different = {digest: pixels for _, _, digest, pixels in images}
            sizes = {digest: self._store(digest, pixels) for digest, pixels in different.items()}
            rows.insert("images", [(*position, digest, sizes[digest]) for *position, digest, _ in images])
            for copy in copies:
                values = "SELECT id, :version, :answer FROM requests WHERE id = :request ON CONFLICT DO NOTHING"
                if rows.execute(f"INSERT INTO shadows {values}", vars(copy)).rowcount:
                    self._measure(rows, copy.request, copy.measured)

    @staticmethod
    def _measure(rows: Rows, request: str, measured: Mapping[int, Iterable[Measured]]) -> None:
        """Store measurements by version. They replace those of the same item, step and name."""
        rows.insert(
            "figures",
            [
                (request, version, each.item, each.step, each.name, each.value)
                for version, own in measured.items()
                for each in own
            ],
            "(request, version, item, step, name) DO UPDATE SET value = excluded.value",
        )

    def _store(self, digest: str, pixels: np.ndarray) -> int:
        """Store an image, unless it is stored already. Return the size of its file in bytes."""
        path = f"{self.folder}/images/{digest}.png"
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return Path(path).write_bytes(png(pixels))

    def image(self, digest: str) -> Path:
        """Return the path of an image."""
        return self.folder / "images" / f"{digest}.png"

    def file(self, id: str) -> Path:
        """Return the path of an input or output of a batch job."""
        return self.folder / "files" / id

    def find(self, request: str) -> list[Captured]:
        """Return a captured request without its images: with its answer, and once with each answer of a shadow."""
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT id, model, version, task, job, answer, key FROM requests WHERE id = :request UNION ALL "
                "SELECT id, model, shadows.version, task, job, shadows.answer, key FROM requests JOIN shadows "
                "ON request = id WHERE id = :request AND shadows.answer != ''",
                {"request": request},
            )
            return [Captured(*row) for row in found]

    def add_feedback(self, truth: FeedbackRequest, measured: Mapping[int, Sequence[Measured]]) -> None:
        """Store feedback and its measurements by version. They replace those of the same item and step."""
        with self.transaction() as rows:
            for step, value in truth.steps().items():
                text = orjson.dumps(value).decode()
                rows.execute(
                    "INSERT INTO feedback VALUES (:request, :item, :step, :truth) "
                    "ON CONFLICT (request, item, step) DO UPDATE SET truth = excluded.truth",
                    {"request": truth.request_id, "item": truth.item, "step": step, "truth": text},
                )
            self._measure(rows, truth.request_id, measured)

    def figures(self) -> list[FeedbackFigure]:
        """Return the figures of each version."""
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT model, figures.version, name, COUNT(*), AVG(value), AVG(value * value) AS square "
                "FROM figures JOIN requests ON requests.id = figures.request GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
            ).fetchall()
        names = ("model", "version", "name", "count", "mean")
        return [
            cast(FeedbackFigure, dict(zip(names, row, strict=False)) | {"interval": interval(*row[2:])})
            for row in found
        ]

    def drift(self, card: Card) -> dict[str, float]:
        """Return the drift of each feature in the newest requests of a version; empty while there are too few."""
        if card.reference is None:
            return {}
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT job, answer, position, digest FROM (SELECT * FROM requests WHERE model = :model "
                "AND version = :version ORDER BY time DESC LIMIT :window) AS newest "
                "LEFT JOIN images ON request = id ORDER BY time DESC, id, position LIMIT :window",
                {"model": card.name, "version": card.version, "window": card.reference.window},
            )
            features = (each for row in found for each in self._features(row))
            return drift(card.reference, list(islice(features, card.reference.window)))

    def _features(self, row: Any) -> list[Features]:
        """Return the features of an image, or of the series or the prompts of a request."""
        job, answer = orjson.loads(row.job), orjson.loads(row.answer)
        if row.digest:
            pixels = np.atleast_3d(np.asarray(Image.open(self.image(row.digest)))).transpose(2, 0, 1)
            return [image_features(pixels, answer["probabilities"][row.position])]
        if "prompts" in job:
            return [each for prompt in job["prompts"] for each in text_features(prompt)]
        series = zip(job["series"], answer["forecasts"], strict=True)
        return [series_features(np.array(values, dtype=float), forecast["seasonality"]) for values, forecast in series]

    def truths(self, model: str) -> list[Any]:
        """Return the feedback on the requests of a model with their jobs, answers and images, oldest requests first."""
        with self.transaction() as rows:
            found: list[Any] = rows.execute(
                "SELECT id, task, job, answer, item, step, truth, digest FROM feedback "
                "JOIN requests ON id = feedback.request "
                "LEFT JOIN images ON images.request = id AND position = item WHERE model = :model "
                "ORDER BY requests.time, id, item, step",
                {"model": model},
            ).fetchall()
        return found

    def differences(self, model: str, version: int, other: int) -> dict[str, tuple[float, tuple[float, float], int]]:
        """Return ``version`` minus ``other`` for each figure that at least two requests have for both.

        A difference is the mean over requests, its 95 % interval, and the number of requests.
        """
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT name, COUNT(*), AVG(mean), AVG(mean * mean) AS square FROM ("
                "SELECT name, AVG(a.value - b.value) AS mean FROM figures AS a JOIN figures AS b "
                "USING (request, item, step, name) JOIN requests ON requests.id = request "
                "WHERE requests.model = :model AND a.version = :version AND b.version = :other "
                "GROUP BY name, request) AS means GROUP BY name HAVING COUNT(*) > 1",
                {"model": model, "version": version, "other": other},
            )
            return {name: (mean, interval("", count, mean, square), count) for name, count, mean, square in found}

    def counts(self) -> list[Any]:
        """Return the model, the version, the number of requests, and the times of the oldest and the newest one."""
        with self.transaction() as rows:
            found: list[Any] = rows.execute(
                "SELECT model, version, COUNT(*), MIN(time), MAX(time) FROM requests GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()
        return found

    def delete(self, condition: str, value: object) -> int:
        """Delete the requests for which an SQL condition with ``:value`` is true. Return their number."""
        values = {"value": value}
        with self.transaction() as rows:
            digests = rows.execute(
                f"SELECT digest FROM images JOIN requests ON requests.id = images.request WHERE {condition}", values
            ).fetchall()
            count = int(rows.execute(f"DELETE FROM requests WHERE {condition}", values).rowcount)
            used = set(rows.execute("SELECT DISTINCT digest FROM images")) if digests else set()
            for (digest,) in set(digests) - used:
                self.image(digest).unlink(missing_ok=True)
        return count

    def trim(self, max_bytes: int, max_seconds: float) -> None:
        """Delete requests that are older than ``max_seconds``, and the oldest tenth while there are too many bytes."""
        self.delete("time < :value", time.time() - max_seconds)
        tenth = "SELECT COUNT(*) / :value FROM requests"
        while self.size() > max_bytes and self.delete(
            f"time <= (SELECT time FROM requests ORDER BY time LIMIT 1 OFFSET ({tenth}))", 10
        ):
            pass

    def size(self) -> int:
        """Return the number of bytes that requests, feedback and images take."""
        with self.transaction() as rows:
            used = rows.execute(USED_BYTES[bool(self._url)]).fetchone()[0]
            sizes = "SELECT COALESCE(SUM(size), 0) FROM (SELECT MAX(bytes) AS size FROM images GROUP BY digest) AS each"
            return int(used + rows.execute(sizes).fetchone()[0])


def interval(name: str, count: int, mean: float, mean_square: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean: Wilson's for shares, otherwise the normal one."""
    z = 1.96
    if name in ("accepted", "accuracy", "agreement") or name.startswith("coverage_"):
        center = (mean + z * z / (2 * count)) / (1 + z * z / count)
        spread = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
        return center - spread, center + spread
    spread = z * math.sqrt(max(mean_square - mean * mean, 0.0) / max(count - 1, 1))
    return mean - spread, mean + spread
