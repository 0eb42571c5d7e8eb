"""The files and the batch jobs of OpenAI's Batch API, in the database of the records.

A job belongs to one process at a time, which renews its lease. If the process ends, another one continues after the
lease. Each line of the output is stored once, in the transaction that checks the lease.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import orjson
from typing_extensions import TypedDict

from app.errors import BadValue, Conflict, NotFound, quote_value
from app.records.database import Database, Rows

LEASE_SECONDS = 30.0
MAX_AGE_SECONDS = 86_400  # of a job, OpenAI's only completion window
UNFINISHED = ("validating", "in_progress", "cancelling")


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """Unix time in seconds"""
    filename: str
    purpose: str
    status: Literal["processed"]


class Batch(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal["validating", "in_progress", "completed", "failed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    """file with the answers, one in each line"""
    error_file_id: str | None
    """file with the answers of lines that failed"""
    errors: Any
    """why the job failed: invalid lines of the input"""
    created_at: int
    in_progress_at: int | None
    expires_at: int
    completed_at: int | None
    request_counts: dict[str, int]
    """`total`, `completed` and `failed`"""
    metadata: dict[str, str]


class LeaseLost(Exception):
    """Another process has the job now."""


class Batches:
    """Files and jobs. They are stored as the objects of OpenAI's API, and "file" or "batch" is the kind of an object.

    Each method takes the name of the API key, and finds only what belongs to this key. Methods raise
    RecordsUnavailable.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = secrets.token_hex(8)  # of the jobs of this process

    def _add(self, key: str | None, body: FileObject | Batch, content: bytes = b"") -> None:
        values = {
            "id": body["id"], "key": key, "kind": body["object"], "status": body["status"], "created": time.time(),
            "body": orjson.dumps(body).decode(),
        }  # fmt: skip
        with self.database.transaction() as rows:
            if body["object"] == "file":
                self.database.file(body["id"]).write_bytes(content)
            columns = "id, key, kind, status, created, body"
            rows.execute(f"INSERT INTO api_objects ({columns}) VALUES (:{columns.replace(', ', ', :')})", values)

    def get(self, key: str | None, kind: str, id: str) -> Any:
        """Return an object. Raises NotFound."""
        found = self.all(key, kind, id)
        if not found:
            raise NotFound(f"there is no {kind} {quote_value(id)}", "id")
        return found[0]

    def all(self, key: str | None, kind: str, id: str | None = None) -> list[Any]:
        """Return all objects of a kind, the newest first, or only the one with this id."""
        condition = "COALESCE(key, '') = :key AND kind = :kind AND id = COALESCE(:id, id)"
        with self.database.transaction() as rows:
            query = f"SELECT body FROM api_objects WHERE {condition} ORDER BY created DESC, id"
            found = rows.execute(query, {"key": key or "", "kind": kind, "id": id})
            return [orjson.loads(row.body) for row in found]

    # Files

    def add_file(self, key: str | None, name: str, purpose: str, content: bytes) -> FileObject:
        """Store a file."""
        file: FileObject = {
            "id": f"file-{secrets.token_hex(12)}", "object": "file", "bytes": len(content),
            "created_at": int(time.time()), "filename": name, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self._add(key, file, content)
        return file

    def content(self, key: str | None, file: str) -> bytes:
        """Return the content of a file. Raises NotFound."""
        path = self.database.file(self.get(key, "file", file)["id"])
        with self.database.transaction():
            try:
                return path.read_bytes()
            except FileNotFoundError:
                raise NotFound(f"the content of {file} is missing", "id") from None

    def delete_file(self, key: str | None, file: str) -> None:
        """Delete a file. Raises NotFound."""
        path = self.database.file(self.get(key, "file", file)["id"])
        with self.database.transaction() as rows:
            rows.execute("DELETE FROM api_objects WHERE id = :id", {"id": file})
            path.unlink(missing_ok=True)

    # Jobs

    def add(self, key: str | None, input_file: str, endpoint: str, metadata: dict[str, str]) -> Batch:
        """Add a job. Raises NotFound for an unknown file, and BadValue for an output file."""
        if self.get(key, "file", input_file)["purpose"] != "batch":
            raise BadValue(
                f"input_file_id is {quote_value(input_file)}; it should have the purpose 'batch'", "input_file_id"
            )
        now = int(time.time())
        batch: Batch = {
            "id": f"batch_{secrets.token_hex(12)}", "object": "batch", "endpoint": endpoint,
            "input_file_id": input_file, "completion_window": "24h", "status": "validating", "output_file_id": None,
            "error_file_id": None, "errors": None, "created_at": now, "in_progress_at": None,
            "expires_at": now + MAX_AGE_SECONDS, "completed_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": metadata,
        }  # fmt: skip
        self._add(key, batch)
        return batch

    def cancel(self, key: str | None, batch: str) -> Batch:
        """Let a job end soon. Raises NotFound, and Conflict if it has ended."""

        def change(job: Batch) -> None:
            if job["status"] not in UNFINISHED:
                raise Conflict(f"the batch is {job['status']}, so it cannot be cancelled")
            job["status"] = "cancelling"

        self.get(key, "batch", batch)
        with self.database.transaction() as rows:
            found = rows.execute(  # an update, because others change the job until the first update
                "UPDATE api_objects SET lease = lease WHERE id = :id RETURNING body", {"id": batch}
            ).fetchone()
            return self._change(rows, found.body, change)

    @staticmethod
    def _change(rows: Rows, body: str, change: Callable[[Batch], None]) -> Batch:
        """Change a job that was read in the same transaction."""
        job: Batch = orjson.loads(body)
        change(job)
        values = {"id": job["id"], "status": job["status"], "body": orjson.dumps(job).decode()}
        rows.execute("UPDATE api_objects SET status = :status, body = :body WHERE id = :id", values)
        return job

    # Work on jobs, with a lease

    def claim(self) -> tuple[str | None, Batch] | None:
        """Return the oldest unfinished job that no other process has, and its key, and take its lease."""
        now = time.time()
        with self.database.transaction() as rows:
            found = rows.execute(
                "UPDATE api_objects SET owner = :owner, lease = :lease WHERE id = (SELECT id FROM api_objects "
                f"WHERE status IN {UNFINISHED} AND (lease < :now OR owner = :owner) ORDER BY created LIMIT 1) "
                "RETURNING key, body",
                {"owner": self.owner, "lease": now + LEASE_SECONDS, "now": now},
            ).fetchone()
        return (found.key, orjson.loads(found.body)) if found else None

    def release(self) -> None:
        """Let another process take the job of this one immediately."""
        with self.database.transaction() as rows:
            rows.execute("UPDATE api_objects SET owner = NULL, lease = 0 WHERE owner = :owner", {"owner": self.owner})

    def start(self, batch: str, lines: int) -> str:
        """Renew the lease of a new job with this number of lines, and return its status. Raises LeaseLost."""

        def change(job: Batch) -> None:
            if job["status"] == "validating":  # otherwise it has been cancelled
                job["status"] = "in_progress"
            job["in_progress_at"] = int(time.time())
            job["request_counts"]["total"] = lines

        with self.database.transaction() as rows:
            return self._update(rows, batch, change)

    def renew(self, batch: str) -> str:
        """Renew the lease of a job, and return its status. Raises LeaseLost."""
        with self.database.transaction() as rows:
            return self._update(rows, batch, lambda job: None)

    def _update(self, rows: Rows, batch: str, change: Callable[[Batch], None]) -> str:
        found = rows.execute(
            "UPDATE api_objects SET lease = :lease WHERE id = :id AND owner = :owner RETURNING body",
            {"lease": time.time() + LEASE_SECONDS, "id": batch, "owner": self.owner},
        ).fetchone()
        if not found:
            raise LeaseLost
        return self._change(rows, found.body, change)["status"]

    def done(self, batch: str) -> set[int]:
        """Return the numbers of the lines that have an answer."""
        with self.database.transaction() as rows:
            found = rows.execute("SELECT line FROM batch_lines WHERE batch = :batch", {"batch": batch})
            return {row.line for row in found}

    def add_line(self, batch: str, line: int, custom_id: str, status: int, body: str) -> str:
        """Store the answer to a line, unless it has one, and return the status of the job. Raises LeaseLost."""
        name = orjson.dumps(custom_id).decode()  # PostgreSQL has no texts with NUL
        with self.database.transaction() as rows:
            added = rows.execute(
                "INSERT INTO batch_lines VALUES (:batch, :line, :name, :status, :body) ON CONFLICT DO NOTHING",
                {"batch": batch, "line": line, "name": name, "status": status, "body": body},
            ).rowcount

            def change(job: Batch) -> None:
                job["request_counts"]["completed" if status < 400 else "failed"] += added

            return self._update(rows, batch, change)

    def finish(
        self, key: str | None, batch: str, status: Literal["completed", "failed", "expired", "cancelled"],
        problems: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """End a job: write the answers to files, one for those without and one for those with an error."""
        files: Any = {}
        for name, condition in (("output", "status < 400"), ("error", "status >= 400")):
            if content := b"".join(self._output(batch, condition)):
                file = self.add_file(key, f"{batch}_{name}.jsonl", "batch_output", content)
                files[f"{name}_file_id"] = file["id"]

        def change(job: Batch) -> None:
            job.update(files)
            job["status"] = status
            if problems:
                job["errors"] = {"object": "list", "data": problems}
            if status == "completed":
                job["completed_at"] = int(time.time())

        with self.database.transaction() as rows:
            self._update(rows, batch, change)

    def _output(self, batch: str, condition: str) -> Iterator[bytes]:
        query = f"SELECT * FROM batch_lines WHERE batch = :batch AND {condition} ORDER BY line"
        with self.database.transaction() as rows:
            for row in rows.execute(query, {"batch": batch}):
                request = f"{batch}-{row.line}"
                response = {"status_code": row.status, "request_id": request, "body": orjson.Fragment(row.body)}
                custom_id = orjson.Fragment(row.custom_id)
                line = {"id": request, "custom_id": custom_id, "response": response, "error": None}
                yield orjson.dumps(line) + b"\n"
