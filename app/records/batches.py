"""The files and the batch jobs of OpenAI's Batch API, in the file of the records.

A job belongs to one process at a time, which renews its lease. If the process ends, another one continues after the
lease. Each line of the output is stored once, in the transaction that checks the lease.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson
from typing_extensions import TypedDict

from app.errors import BadValue, Conflict, NotFound, quote_value
from app.records.database import Database

LEASE_SECONDS = 30.0
MAX_AGE_SECONDS = 86_400  # of a job, OpenAI's only completion window
UNFINISHED = "json_extract(body, '$.status') IN ('validating', 'in_progress', 'cancelling')"


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

    Each method takes the name of the API key, and finds only what belongs to this key. Methods raise sqlite3.Error and
    OSError if the file cannot be read or written.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = secrets.token_hex(8)  # of the jobs of this process

    def _add(self, key: str | None, body: FileObject | Batch) -> None:
        row = (body["id"], key, time.time(), orjson.dumps(body).decode())
        with self.database.transaction() as rows:
            rows.execute("INSERT INTO objects (id, key, created, body) VALUES (?, ?, ?, ?)", row)

    def get(self, key: str | None, kind: str, id: str) -> Any:
        """Return an object. Raises NotFound."""
        found = self.all(key, kind, id)
        if not found:
            raise NotFound(f"there is no {kind} {quote_value(id)}", "id")
        return found[0]

    def all(self, key: str | None, kind: str, id: str | None = None) -> list[Any]:
        """Return all objects of a kind, the newest first, or only the one with this id."""
        condition = "key IS ? AND json_extract(body, '$.object') = ? AND id = COALESCE(?, id)"
        with self.database.transaction() as rows:
            query = f"SELECT body FROM objects WHERE {condition} ORDER BY created DESC, id"
            return [orjson.loads(row["body"]) for row in rows.execute(query, (key, kind, id))]

    # Files

    def add_file(self, key: str | None, name: str, purpose: str, content: bytes) -> FileObject:
        """Store a file."""
        file: FileObject = {
            "id": f"file-{secrets.token_hex(12)}", "object": "file", "bytes": len(content),
            "created_at": int(time.time()), "filename": name, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self.database.file(file["id"]).write_bytes(content)
        self._add(key, file)
        return file

    def content(self, key: str | None, file: str) -> bytes:
        """Return the content of a file. Raises NotFound."""
        return self.database.file(self.get(key, "file", file)["id"]).read_bytes()

    def delete_file(self, key: str | None, file: str) -> None:
        """Delete a file. Raises NotFound."""
        path = self.database.file(self.get(key, "file", file)["id"])
        with self.database.transaction() as rows:
            rows.execute("DELETE FROM objects WHERE id = ?", (file,))
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
        self.get(key, "batch", batch)
        with self.database.transaction() as rows:
            changed = "body = json_set(body, '$.status', 'cancelling')"
            found = rows.execute(f"UPDATE objects SET {changed} WHERE id = ? AND {UNFINISHED}", (batch,)).rowcount
        job: Batch = self.get(key, "batch", batch)
        if not found:
            raise Conflict(f"the batch is {job['status']}, so it cannot be cancelled")
        return job

    # Work on jobs, with a lease

    def claim(self) -> tuple[str | None, Batch] | None:
        """Return the oldest unfinished job that no other process has, and its key, and take its lease."""
        now = time.time()
        with self.database.transaction() as rows:
            found = rows.execute(
                "UPDATE objects SET owner = ?, lease = ? WHERE id = (SELECT id FROM objects "
                f"WHERE {UNFINISHED} AND (lease < ? OR owner = ?) ORDER BY created LIMIT 1) RETURNING key, body",
                (self.owner, now + LEASE_SECONDS, now, self.owner),
            ).fetchall()
        return (found[0]["key"], orjson.loads(found[0]["body"])) if found else None

    def release(self) -> None:
        """Let another process take the job of this one immediately."""
        with self.database.transaction() as rows:
            rows.execute("UPDATE objects SET owner = NULL, lease = 0 WHERE owner = ?", (self.owner,))

    def update(self, batch: str, **fields: Any) -> str:
        """Renew the lease, merge fields into the job, and return its status. Raises LeaseLost."""
        with self.database.transaction() as rows:
            return self._update(rows, batch, "json_patch(body, ?)", orjson.dumps(fields).decode())

    def _update(self, rows: sqlite3.Connection, batch: str, body: str, *values: object) -> str:
        found = rows.execute(
            f"UPDATE objects SET body = {body}, lease = ? WHERE id = ? AND owner = ? "
            "RETURNING json_extract(body, '$.status')",
            (*values, time.time() + LEASE_SECONDS, batch, self.owner),
        ).fetchall()
        if not found:
            raise LeaseLost
        return str(found[0][0])

    def done(self, batch: str) -> set[int]:
        """Return the numbers of the lines that have an answer."""
        with self.database.transaction() as rows:
            return {row["line"] for row in rows.execute("SELECT line FROM lines WHERE batch = ?", (batch,))}

    def add_line(self, batch: str, line: int, custom_id: str, status: int, body: str) -> str:
        """Store the answer to a line, unless it has one, and return the status of the job. Raises LeaseLost."""
        count = "$.request_counts." + ("completed" if status < 400 else "failed")
        with self.database.transaction() as rows:
            row = (batch, line, custom_id, status, body)
            added = rows.execute("INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?, ?)", row).rowcount
            return self._update(rows, batch, "json_set(body, ?, json_extract(body, ?) + ?)", count, count, added)

    def finish(self, key: str | None, batch: str, status: str, problems: Sequence[Any] = ()) -> None:
        """End a job: write the answers to files, one for those without and one for those with an error."""
        fields: dict[str, Any] = {"status": status}
        if problems:
            fields["errors"] = {"object": "list", "data": problems}
        if status == "completed":
            fields["completed_at"] = int(time.time())
        for name, condition in (("output", "status < 400"), ("error", "status >= 400")):
            if content := b"".join(self._output(batch, condition)):
                file = self.add_file(key, f"{batch}_{name}.jsonl", "batch_output", content)
                fields[f"{name}_file_id"] = file["id"]
        self.update(batch, **fields)

    def _output(self, batch: str, condition: str) -> Iterator[bytes]:
        with self.database.transaction() as rows:
            for row in rows.execute(f"SELECT * FROM lines WHERE batch = ? AND {condition} ORDER BY line", (batch,)):
                request = f"{batch}-{row['line']}"
                response = {"status_code": row["status"], "request_id": request, "body": orjson.Fragment(row["body"])}
                line = {"id": request, "custom_id": row["custom_id"], "response": response, "error": None}
                yield orjson.dumps(line) + b"\n"
