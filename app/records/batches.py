"""The files and the batch jobs of OpenAI's Batch API, in the file of the records.

A job belongs to one process at a time, which renews its lease. If the process ends, another one continues after the
lease. Each line of the output is stored once, in the transaction that checks the lease.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from app.errors import BadValue, Conflict, NotFound, quote_value
from app.records.database import Database

LEASE_SECONDS = 30.0
MAX_AGE_SECONDS = 86_400.0  # of a job, OpenAI's only completion window
UNFINISHED = ("validating", "in_progress", "cancelling")
Row = Mapping[str, Any]


class LeaseLost(Exception):
    """Another process has the job now."""


class Batches:
    """Files and jobs. Each method takes the name of the API key, and finds only what belongs to this key.

    Methods raise sqlite3.Error and OSError if the file cannot be read or written.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = secrets.token_hex(8)  # of the jobs of this process

    # Files

    def add_file(self, key: str | None, name: str, purpose: str, content: bytes) -> Row:
        """Store a file, and return its row."""
        row: Row = {"id": f"file-{secrets.token_hex(12)}", "key": key, "name": name, "purpose": purpose,
                    "bytes": len(content), "created": time.time()}  # fmt: skip
        self.database.file(row["id"]).write_bytes(content)
        with self.database.transaction() as rows:
            _insert(rows, "files", row)
        return row

    def file(self, key: str | None, file: str) -> Row:
        """Return the row of a file. Raises NotFound."""
        return self._one("files", key, file)

    def files(self, key: str | None) -> list[Row]:
        return self._all("files", key)

    def content(self, key: str | None, file: str) -> bytes:
        """Return the content of a file. Raises NotFound."""
        return self.database.file(self.file(key, file)["id"]).read_bytes()

    def delete_file(self, key: str | None, file: str) -> None:
        """Delete a file. Raises NotFound."""
        path = self.database.file(self.file(key, file)["id"])
        with self.database.transaction() as rows:
            rows.execute("DELETE FROM files WHERE id = ?", (file,))
        path.unlink(missing_ok=True)

    # Jobs

    def add(self, key: str | None, input_file: str, endpoint: str, metadata: Mapping[str, str]) -> Row:
        """Add a job, and return its row. Raises NotFound for an unknown file, and BadValue for an output file."""
        if self.file(key, input_file)["purpose"] != "batch":
            raise BadValue(
                f"input_file_id is {quote_value(input_file)}; it should have the purpose 'batch'", "input_file_id"
            )
        row: Row = {
            "id": f"batch_{secrets.token_hex(12)}", "key": key, "input": input_file, "endpoint": endpoint,
            "metadata": orjson.dumps(metadata).decode(), "created": time.time(), "status": "validating", "total": 0,
            "lease": 0.0,
        }  # fmt: skip
        with self.database.transaction() as rows:
            _insert(rows, "batches", row)
        return self.get(key, row["id"])

    def get(self, key: str | None, batch: str) -> Row:
        """Return the row of a job, with the numbers of ``completed`` and ``failed`` lines. Raises NotFound."""
        return self._counted(self._one("batches", key, batch))

    def jobs(self, key: str | None) -> list[Row]:
        return [self._counted(row) for row in self._all("batches", key)]

    def _counted(self, row: Row) -> Row:
        with self.database.transaction() as rows:
            counts = rows.execute(
                "SELECT TOTAL(status < 400) AS completed, TOTAL(status >= 400) AS failed FROM lines WHERE batch = ?",
                (row["id"],),
            ).fetchone()
        return {**row, **{name: int(counts[name]) for name in ("completed", "failed")}}

    def cancel(self, key: str | None, batch: str) -> Row:
        """Let a job end soon, and return its row. Raises NotFound, and Conflict if it has ended."""
        self.get(key, batch)
        with self.database.transaction() as rows:
            found = rows.execute(
                f"UPDATE batches SET status = 'cancelling' WHERE id = ? AND status IN {UNFINISHED}", (batch,)
            ).rowcount
        row = self.get(key, batch)
        if not found:
            raise Conflict(f"the batch is {row['status']}, so it cannot be cancelled")
        return row

    # Work on jobs, with a lease

    def claim(self) -> Row | None:
        """Return the oldest unfinished job that no process has, and take its lease."""
        now = time.time()
        with self.database.transaction() as rows:
            rows.execute(
                "UPDATE batches SET owner = ?, lease = ? WHERE id = "
                f"(SELECT id FROM batches WHERE status IN {UNFINISHED} AND lease < ? ORDER BY created LIMIT 1)",
                (self.owner, now + LEASE_SECONDS, now),
            )
            row = rows.execute(
                f"SELECT * FROM batches WHERE owner = ? AND status IN {UNFINISHED}", (self.owner,)
            ).fetchone()
        return dict(row) if row else None

    def release(self) -> None:
        """Let another process take the job of this one immediately."""
        with self.database.transaction() as rows:
            rows.execute("UPDATE batches SET owner = NULL, lease = 0 WHERE owner = ?", (self.owner,))

    def update(self, batch: str, **values: Any) -> str:
        """Renew the lease, set columns, and return the status before. Raises LeaseLost."""
        values["lease"] = time.time() + LEASE_SECONDS
        with self.database.transaction() as rows:
            assignments = ", ".join(f"{name} = ?" for name in values)
            rows.execute(
                f"UPDATE batches SET {assignments} WHERE id = ? AND owner = ?", (*values.values(), batch, self.owner)
            )
            return self._status(rows, batch)

    def _status(self, rows: sqlite3.Connection, batch: str) -> str:
        row = rows.execute("SELECT status FROM batches WHERE id = ? AND owner = ?", (batch, self.owner)).fetchone()
        if row is None:
            raise LeaseLost
        return str(row["status"])

    def done(self, batch: str) -> set[int]:
        """Return the numbers of the lines that have an answer."""
        with self.database.transaction() as rows:
            return {row["line"] for row in rows.execute("SELECT line FROM lines WHERE batch = ?", (batch,))}

    def add_line(self, batch: str, line: int, custom_id: str, status: int, body: str) -> None:
        """Store the answer to a line, unless it has one. Raises LeaseLost."""
        with self.database.transaction() as rows:
            rows.execute("INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?, ?)", (batch, line, custom_id, status, body))
            self._status(rows, batch)

    def finish(self, job: Row, status: str, problems: Sequence[Row] = ()) -> None:
        """End a job: write the answers to files, one for those without and one for those with an error."""
        ended: dict[str, Any] = {"status": status, "ended": time.time(), "problems": orjson.dumps(problems).decode()}
        for column, condition in (("output", "status < 400"), ("errors", "status >= 400")):
            content = b"".join(self._output(job["id"], condition))
            if content:
                ended[column] = self.add_file(job["key"], f"{job['id']}_{column}.jsonl", "batch_output", content)["id"]
        self.update(job["id"], **ended)

    def _output(self, batch: str, condition: str) -> Iterator[bytes]:
        with self.database.transaction() as rows:
            for row in rows.execute(f"SELECT * FROM lines WHERE batch = ? AND {condition} ORDER BY line", (batch,)):
                request = f"{batch}-{row['line']}"
                response = {"status_code": row["status"], "request_id": request, "body": orjson.Fragment(row["body"])}
                line = {"id": request, "custom_id": row["custom_id"], "response": response, "error": None}
                yield orjson.dumps(line) + b"\n"

    def _one(self, table: str, key: str | None, id: str) -> Row:
        with self.database.transaction() as rows:
            row = rows.execute(f"SELECT * FROM {table} WHERE id = ? AND key IS ?", (id, key)).fetchone()
        if row is None:
            raise NotFound(f"there is no {'file' if table == 'files' else 'batch'} {quote_value(id)}", "id")
        return dict(row)

    def _all(self, table: str, key: str | None) -> list[Row]:
        with self.database.transaction() as rows:
            found = rows.execute(f"SELECT * FROM {table} WHERE key IS ? ORDER BY created DESC, id", (key,)).fetchall()
        return [dict(row) for row in found]


def _insert(rows: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    places = ", ".join("?" * len(row))
    rows.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values()))
