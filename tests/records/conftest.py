"""A PostgreSQL server for slow tests of the records."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.support.servers import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path("/usr/bin")]


@pytest.fixture
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server and yield the URL of a database."""
    initdb, server = (PROGRAMS[-1] / name for name in ("initdb", "postgres"))
    if not initdb.exists():
        pytest.skip("postgresql is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder, port = tempfile.mkdtemp(prefix="quartet-postgres-"), free_port()
    if user:
        shutil.chown(folder, user)
    data, options = f"{folder}/data", ["-p", str(port), "-k", folder, "-h", "127.0.0.1", "-c", "fsync=off"]
    subprocess.run([initdb, "-D", data, "-U", "quartet", "--auth=trust"], user=user, check=True, capture_output=True)
    with subprocess.Popen([server, "-D", data, *options], user=user, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert any("ready to accept connections" in line for line in process.stderr)
        yield f"postgresql://quartet@127.0.0.1:{port}/postgres"
        process.terminate()
        process.communicate(timeout=60)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def records_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of the database of the records: none for SQLite."""
    return str(request.getfixturevalue("postgres")) if request.param == "postgres" else ""
