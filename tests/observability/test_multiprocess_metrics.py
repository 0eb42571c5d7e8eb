"""The files in which the processes of a service count."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client.mmap_dict import MmapedDict
from support.processes import serving
from support.service import ROOT

from app.observability import multiprocess_metrics
from app.store.disk import file_lock


def write_counts(file: Path, counts: dict[str, float]) -> None:
    content = MmapedDict(str(file))
    for key, value in counts.items():
        content.write_value(key, value, 0.0)
    content.close()


def read_counts(file: Path) -> dict[str, float]:
    return {key: value for key, value, *_ in MmapedDict.read_all_values_from_file(str(file))}


def test_counts_that_a_failed_merge_left_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(multiprocess_metrics.FOLDER_VARIABLE, str(tmp_path))
    write_counts(tmp_path / "counter_0.fresh", {"key": 2.0, "other": 1.0})
    write_counts(tmp_path / "counter_7.db", {"key": 3.0})
    multiprocess_metrics.merge_ended(7)
    assert [file.name for file in tmp_path.iterdir()] == ["counter_0.db"]
    assert read_counts(tmp_path / "counter_0.db") == {"key": 3.0}


def test_the_times_of_ended_processes_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(multiprocess_metrics.FOLDER_VARIABLE, str(tmp_path))
    key = json.dumps(["last", "last", {"version": "1"}, "Time of the last batch"])
    for process, time in ((7, 50.0), (8, 60.0), (9, 40.0)):
        write_counts(tmp_path / f"gauge_max_{process}.db", {key: time})
        write_counts(tmp_path / f"gauge_livesum_{process}.db", {key: 1.0})
        multiprocess_metrics.merge_ended(process)
    assert [file.name for file in tmp_path.iterdir()] == ["gauge_max_0.db"]
    write_counts(tmp_path / "gauge_max_10.db", {key: 0.0})  # of the worker that replaces the last one
    (metric,) = multiprocess_metrics.collect_shared()
    assert [(sample.labels, sample.value) for sample in metric.samples] == [({"version": "1"}, 60.0)]


def test_a_file_that_a_worker_has_just_created_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(multiprocess_metrics.FOLDER_VARIABLE, str(tmp_path))
    write_counts(tmp_path / "counter_7.db", {json.dumps(["a", "a_total", {}, "A"]): 3.0})
    (tmp_path / "counter_8.db").touch()
    (tmp_path / "gauge_livesum_8.db").touch()
    (metric,) = multiprocess_metrics.collect_shared()
    assert [sample.value for sample in metric.samples] == [3.0]
    multiprocess_metrics.merge_ended(8)  # the worker was killed before it wrote to its files
    assert [file.name for file in tmp_path.iterdir()] == ["counter_7.db"]


def test_counts_that_a_failed_rewrite_left_are_not_kept(tmp_path: Path) -> None:
    current, removed = (json.dumps(["a", "a", {"version": version}, ""]) for version in ("2", "1"))
    write_counts(tmp_path / "counter_7.fresh", {removed: 5.0})
    write_counts(tmp_path / "counter_7.db", {removed: 6.0, current: 3.0})
    copy = multiprocess_metrics._current_copy(tmp_path / "counter_7.db", lambda labels: labels["version"] == "2")
    assert read_counts(copy) == {current: 3.0}


def test_a_process_that_hangs_with_the_lock_of_the_metrics_does_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(multiprocess_metrics.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(multiprocess_metrics, "LOCK_SECONDS", 0.0)
    write_counts(tmp_path / "counter_7.db", {"key": 3.0})
    with file_lock(tmp_path):
        multiprocess_metrics.merge_ended(7)
    assert [file.name for file in tmp_path.iterdir()] == ["counter_7.db"]
    multiprocess_metrics.merge_ended(7)
    assert [file.name for file in tmp_path.iterdir()] == ["counter_0.db"]


def test_metric_folders_of_killed_services_are_removed_and_others_stay(tmp_path: Path) -> None:
    """Process ids do not show whether a service was killed, because they are reused in containers."""
    for name in ("quartet-1-dead", "quartet-1-busy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alive").touch()
    (tmp_path / "quartet-test-data").mkdir()
    script = (
        "import os; os.access = lambda *_: False\n"
        "from app.observability.multiprocess_metrics import shared_metrics\n"
        "with shared_metrics(): print(*sorted(os.listdir(os.environ['TMPDIR'])))"
    )
    with file_lock(tmp_path / "quartet-1-busy" / "alive"):
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    busy, own, data = result.stdout.split()
    assert (busy, data) == ("quartet-1-busy", "quartet-test-data")
    assert re.fullmatch(r"quartet-\d+-\w+", own)
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy, data]


def test_a_single_process_ignores_the_metrics_folder_of_another_service(tiny_store: Path) -> None:
    before = (
        "import os\nfrom prometheus_client import values\n"
        "for name in ('PROMETHEUS_MULTIPROC_DIR', 'prometheus_multiproc_dir'): os.environ[name] = '/nonexistent'\n"
        "values.ValueClass = values.get_value_class()"
    )
    with serving(tiny_store, before=before, workers=1) as service:
        assert "quartet_workers 1.0" in httpx.get(f"{service.url}/metrics", timeout=60).text
