"""The captured requests with their feedback, and the batch jobs, in an SQLite file.

    records.db              the tables below, in WAL mode
    images/<digest>.png     the images of captured requests, each stored once
    files/<id>              the inputs and outputs of batch jobs

Feedback and images of a request are deleted with it.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import cast

import numpy as np
import orjson
from typing_extensions import TypedDict

from app.records.captured import Captured, Compared, FeedbackRequest, Measured
from app.records.drift import drift
from app.store import Card
from app.tasks.image_codecs import png

log = logging.getLogger("quartet")

FILE = "records.db"
LOCK_SECONDS = 5.0  # a transaction of another worker takes milliseconds
TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, time REAL, key TEXT, model TEXT, version INTEGER, task TEXT, job TEXT, answer TEXT);
CREATE TABLE IF NOT EXISTS images (
    request TEXT REFERENCES requests ON DELETE CASCADE, position INTEGER, digest TEXT, bytes INTEGER,
    PRIMARY KEY (request, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feedback (
    request TEXT REFERENCES requests ON DELETE CASCADE, item INTEGER, step INTEGER, truth TEXT,
    PRIMARY KEY (request, item, step)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shadows (
    request TEXT REFERENCES requests ON DELETE CASCADE, version INTEGER, answer TEXT,
    PRIMARY KEY (request, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS figures (
    request TEXT REFERENCES requests ON DELETE CASCADE, version INTEGER, item INTEGER, step INTEGER, name TEXT,
    value REAL, PRIMARY KEY (request, version, item, step, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS features (request TEXT PRIMARY KEY REFERENCES requests ON DELETE CASCADE, rows TEXT);
CREATE INDEX IF NOT EXISTS newest ON requests (model, version, time);
CREATE TABLE IF NOT EXISTS objects (
    id TEXT PRIMARY KEY, key TEXT, created REAL, body TEXT, owner TEXT, lease REAL DEFAULT 0);
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT REFERENCES objects ON DELETE CASCADE, line INTEGER, custom_id TEXT, status INTEGER, body TEXT,
    PRIMARY KEY (batch, line)) WITHOUT ROWID;
"""


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


class Database:
    """The records in ``folder``. Several processes may use it at the same time.

    Methods raise sqlite3.Error and OSError if the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: sqlite3.Connection | None = None  # while one is open, closing others does not copy the WAL file

    def open(self) -> None:
        """Create the file. If it is damaged, move it aside and create a new one."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("images", "files"):
            (self.folder / name).mkdir(exist_ok=True)
        self.close()
        try:
            self._create()
        except sqlite3.OperationalError:  # locked, or the disk is full
            raise
        except sqlite3.DatabaseError as error:
            aside = self.folder / f"{FILE}.damaged-{time.time_ns()}"
            (self.folder / FILE).rename(aside)
            for suffix in ("-wal", "-shm"):
                (self.folder / f"{FILE}{suffix}").unlink(missing_ok=True)
            log.error("%s is damaged (%s) and was moved to %s", FILE, error, aside.name)
            self._create()

    def _create(self) -> None:
        with self.transaction() as rows:
            rows.execute("PRAGMA journal_mode = WAL")
            rows.executescript(TABLES)
        self._kept = sqlite3.connect(self.folder / FILE, check_same_thread=False)
        self._kept.execute("SELECT COUNT(*) FROM objects")

    def close(self) -> None:
        if self._kept:
            self._kept.close()
            self._kept = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit the changes of the block together, or none of them."""
        with closing(
            sqlite3.connect(self.folder / FILE, timeout=LOCK_SECONDS, isolation_level="IMMEDIATE")
        ) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")  # in WAL mode, only a loss of power loses changes
            connection.row_factory = sqlite3.Row
            with connection:
                yield connection

    def add(self, records: Sequence[Captured | Compared]) -> None:
        """Store requests, and answers of shadows to stored requests. What is stored already is left out."""
        requests = [each for each in records if isinstance(each, Captured)]
        copies = [each for each in records if isinstance(each, Compared)]
        with self.transaction() as rows:
            rows.executemany(
                "INSERT OR IGNORE INTO requests VALUES (:request, :time, :key, :model, :version, :task, :job, :answer)",
                map(vars, requests),
            )
            rows.executemany(
                "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)",
                [
                    (each.request, position, digest, self._store(digest, pixels))
                    for each in requests
                    for position, (digest, pixels) in enumerate(zip(each.digests(), each.pixels, strict=True))
                ],
            )
            found = [(each.request, each.features) for each in requests if each.features]
            rows.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", found)
            for copy in copies:
                values = "SELECT id, :version, :answer FROM requests WHERE id = :request"
                if rows.execute(f"INSERT OR IGNORE INTO shadows {values}", vars(copy)).rowcount:
                    self._measure(rows, copy.request, copy.measured)

    @staticmethod
    def _measure(rows: sqlite3.Connection, request: str, measured: Mapping[int, Iterable[Measured]]) -> None:
        """Store measurements by version. They replace those of the same item, step and name."""
        rows.executemany(
            "INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?, ?)",
            [(request, version, *astuple(each)) for version, own in measured.items() for each in own],
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
                row = (truth.request_id, truth.item, step, orjson.dumps(value).decode())
                columns = "request, item, step, truth"
                rows.execute(f"INSERT OR REPLACE INTO feedback ({columns}) VALUES (?, ?, ?, ?)", row)
            self._measure(rows, truth.request_id, measured)

    def figures(self) -> list[FeedbackFigure]:
        """Return the figures of each version."""
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT model, figures.version, name, COUNT(*) AS count, AVG(value) AS mean, AVG(value * value) "
                "FROM figures JOIN requests ON requests.id = figures.request GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
            ).fetchall()
        names = ("model", "version", "name", "count", "mean")
        return [
            cast(FeedbackFigure, {name: row[name] for name in names} | {"interval": interval(*row[2:])})
            for row in found
        ]

    def drift(self, card: Card) -> dict[str, float]:
        """Return the drift of each feature in the newest requests of a version; empty while there are too few."""
        if card.reference is None:
            return {}
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT rows FROM requests JOIN features ON request = id WHERE model = ? AND version = ? "
                "ORDER BY time DESC LIMIT ?",
                (card.name, card.version, card.reference.window),
            ).fetchall()
        return drift(card.reference, [each for row in found for each in orjson.loads(row["rows"])])

    def truths(self, model: str) -> list[sqlite3.Row]:
        """Return the feedback on the requests of a model with their jobs, answers and images, oldest requests first."""
        with self.transaction() as rows:
            return rows.execute(
                "SELECT id, task, job, answer, item, step, truth, digest FROM feedback "
                "JOIN requests ON id = feedback.request "
                "LEFT JOIN images ON images.request = id AND position = item WHERE model = ? "
                "ORDER BY requests.time, id, item, step",
                (model,),
            ).fetchall()

    def differences(self, model: str, version: int, other: int) -> dict[str, tuple[float, tuple[float, float], int]]:
        """Return ``version`` minus ``other`` for each figure that at least two requests have for both.

        A difference is the mean over requests, its 95 % interval, and the number of requests.
        """
        with self.transaction() as rows:
            found = rows.execute(
                "SELECT name, COUNT(*), AVG(mean), AVG(mean * mean) FROM ("
                "SELECT a.name, AVG(a.value - b.value) AS mean FROM figures AS a JOIN figures AS b "
                "USING (request, item, step, name) JOIN requests "
                "ON requests.id = request WHERE requests.model = ? AND a.version = ? AND b.version = ? "
                "GROUP BY a.name, request) GROUP BY name HAVING COUNT(*) > 1",
                (model, version, other),
            )
            return {name: (mean, interval("", count, mean, square), count) for name, count, mean, square in found}

    def counts(self) -> list[sqlite3.Row]:
        """Return the model, the version, the number of requests, and the times of the oldest and the newest one."""
        with self.transaction() as rows:
            return rows.execute(
                "SELECT model, version, COUNT(*), MIN(time), MAX(time) FROM requests GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()

    def delete(self, condition: str, value: object) -> int:
        """Delete the requests for which an SQL condition with one parameter is true. Return their number."""
        with self.transaction() as rows:
            digests = rows.execute(
                f"SELECT digest FROM images JOIN requests ON requests.id = images.request WHERE {condition}", (value,)
            ).fetchall()
            count = rows.execute(f"DELETE FROM requests WHERE {condition}", (value,)).rowcount
            used = {row["digest"] for row in rows.execute("SELECT DISTINCT digest FROM images")} if digests else set()
            for digest in {row["digest"] for row in digests} - used:
                self.image(digest).unlink(missing_ok=True)
        return count

    def trim(self, max_bytes: int, max_seconds: float) -> None:
        """Delete requests that are older than ``max_seconds``, and the oldest tenth while there are too many bytes."""
        self.delete("time < ?", time.time() - max_seconds)
        while self.size() > max_bytes and self.delete(
            "time <= (SELECT time FROM requests ORDER BY time LIMIT 1 OFFSET (SELECT COUNT(*) / ? FROM requests))", 10
        ):
            pass

    def size(self) -> int:
        """Return the number of bytes that requests, feedback and images take."""
        with self.transaction() as rows:
            used = rows.execute(
                "SELECT (page_count - freelist_count) * page_size FROM "
                "pragma_page_count, pragma_freelist_count, pragma_page_size"
            ).fetchone()[0]
            sizes = "SELECT TOTAL(size) FROM (SELECT MAX(bytes) AS size FROM images GROUP BY digest)"
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
