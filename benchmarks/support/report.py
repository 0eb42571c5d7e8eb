"""Format the measured figures as Markdown tables of medians over rounds, and compare them with targets."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.load import Figures
from benchmarks.support.workloads import ALONE, BESIDE, BESIDE_DIGITS, BESIDE_TEXTS

OURS, PLAIN = "ours", "plain"
START = "start"


@dataclass
class Results:
    """The measured figures. ``cells[workload][server][callers]`` is the list of the figures of all rounds.

    If a measurement has no callers, ``callers`` is 0. ``ours`` is the name of the server that represents Quartet in
    ratios and targets.
    """

    cells: dict[str, dict[str, dict[int, list[Figures]]]] = field(default_factory=dict)

    ours: str = OURS
    titles: dict[str, str] = field(default_factory=dict)  # titles of the measured workloads

    def add(self, workload: str, server: str, callers: int, figures: Figures) -> None:
        self.cells.setdefault(workload, {}).setdefault(server, {}).setdefault(callers, []).append(figures)

    def values(self, workload: str, server: str, callers: int, key: str) -> list[float]:
        """Return the figure ``key`` of each round that has it."""
        rounds = self.cells.get(workload, {}).get(server, {}).get(callers, [])
        return [figures[key] for figures in rounds if not math.isnan(figures.get(key, math.nan))]

    def median(self, workload: str, server: str, callers: int, key: str) -> float:
        """Return the median over rounds; NaN if nothing was measured."""
        values = self.values(workload, server, callers, key)
        return statistics.median(values) if values else math.nan


def part_name(server: str, part: str) -> str:
    """Return the name that the results use for a server and a part of a workload."""
    return f"{server}: {part}" if part else server


class Column(NamedTuple):
    key: str
    header: str
    digits: int = 0
    total: bool = False  # whether to show the sum over rounds instead of the median


LATENCIES = [Column("p50", "p50 ms", 1), Column("p95", "p95 ms", 1), Column("p99", "p99 ms", 1)]
SERVER = [Column("errors", "errors", total=True), Column("cpu", "CPU s/s", 2), Column("pss", "PSS MiB")]
COLUMNS = [Column("per_second", "requests/s"), Column("ratio", "of plain", 2), *LATENCIES, *SERVER]
STREAMS = [
    Column("characters", "characters/s"),
    Column("ratio", "of plain", 2),
    *(Column(f"first_p{part}", f"first p{part} ms", 1) for part in (50, 95, 99)),
    *(Column(f"gap_p{part}", f"gap p{part} ms", 1) for part in (50, 95, 99)),
    *SERVER,
]
MIXED = [column for column in COLUMNS if column.key not in ("cpu", "pss")]
STARTS = [Column("seconds", "ready after s", 2), Column("pss", "PSS MiB"), Column("rss", "RSS MiB")]
TABLES = {"streams": STREAMS, "mixed": MIXED, "large": MIXED, START: STARTS}


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def table(results: Results, workload: str) -> str:
    """Return a Markdown table with a row for each server and each number of callers.

    The table also shows the minimum and the maximum of the first figure over the rounds.
    """
    columns = TABLES.get(workload, COLUMNS)
    first = columns[0]
    headers = ["server", "callers", first.header, "min–max", *(column.header for column in columns[1:])]
    lines = [f"| {' | '.join(headers)} |", f"|---|{'--:|' * (len(headers) - 1)}"]
    servers = results.cells[workload]
    for callers in sorted({callers for result in servers.values() for callers in result}):
        for server in (server for server in servers if callers in servers[server]):
            values = results.values(workload, server, callers, first.key) or [math.nan]
            spread = f"{number(min(values), first.digits)}–{number(max(values), first.digits)}"
            cells = [cell(results, workload, server, callers, column) for column in columns]
            lines.append(f"| {' | '.join([server, str(callers or ''), cells[0], spread, *cells[1:]])} |")
    return "\n".join(lines)


def cell(results: Results, workload: str, server: str, callers: int, column: Column) -> str:
    return number(figure(results, workload, server, callers, column), column.digits)


def figure(results: Results, workload: str, server: str, callers: int, column: Column) -> float:
    """Return the figure of a cell, or NaN for an empty cell."""
    if column.key == "ratio":
        key = TABLES.get(workload, COLUMNS)[0].key
        base = part_name(PLAIN, server.partition(": ")[2])
        value = ratio(results.median(workload, server, callers, key), results.median(workload, base, callers, key))
        return math.nan if server == base else value
    if column.total:
        values = results.values(workload, server, callers, column.key)
        return sum(values) if values else math.nan
    return results.median(workload, server, callers, column.key)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file in benchmarks/results/. Keep the title and the notes of an existing file."""
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"title": path.stem, "notes": []}
    kept = {key: before[key] for key in ("title", "notes")}
    path.write_text(json.dumps(content | kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


def without_save(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the command line without ``--save FILE`` or ``--save=FILE``."""
    return [
        argument
        for previous, argument in pairwise(["", *arguments])
        if "--save" not in (previous, argument) and not argument.startswith("--save=")
    ]


def as_json(results: Results, workload: str, title: str) -> dict[str, Any]:
    """Return the table of a workload for benchmarks/results/: its columns (with their numbers of decimals) and rows."""
    first, *others = TABLES.get(workload, COLUMNS)
    decimals = {"server": None, "callers": 0, first.header: first.digits, "min": first.digits, "max": first.digits}
    rows: list[list[Any]] = []
    servers = results.cells[workload]
    for callers in sorted({callers for rounds in servers.values() for callers in rounds}):
        for server in (server for server in servers if callers in servers[server]):
            values = results.values(workload, server, callers, first.key) or [math.nan]
            figures = [(figure(results, workload, server, callers, first), first.digits)]
            figures += [(limit(values), first.digits) for limit in (min, max)]
            figures += [(figure(results, workload, server, callers, column), column.digits) for column in others]
            rows.append([server, callers or None, *(rounded(value, digits) for value, digits in figures)])
    return {
        "title": title,
        "columns": {**decimals, **{column.header: column.digits for column in others}},
        "rows": rows,
    }


def rounded(value: float, digits: int) -> float | None:
    if math.isnan(value):
        return None
    return round(value, digits) if digits else round(value)


@dataclass(frozen=True)
class Target:
    """A target for a figure: the required value ``must`` and the desired value ``goal``.

    If ``is_maximum`` is true, both values are upper limits of the figure. Otherwise they are lower limits.
    """

    text: str
    must: float
    goal: float
    measured: Callable[[Results], float]
    unit: str = "x"
    is_maximum: bool = False

    def met(self, measured: float) -> str:
        if math.isnan(measured):
            return "not measured"
        for limit, word in ((self.goal, "goal"), (self.must, "must")):
            if measured <= limit if self.is_maximum else measured >= limit:
                return word
        return "no"


def ratio(value: float, base: float) -> float:
    return value / base if base else math.nan


def over_plain(workload: str, callers: int, key: str) -> Callable[[Results], float]:
    return lambda result: ratio(
        result.median(workload, result.ours, callers, key), result.median(workload, PLAIN, callers, key)
    )


def of_limit(workload: str, callers: int, limit: str) -> Callable[[Results], float]:
    """Return a function that computes Quartet's throughput in per cent of a limit (see ``throughput_limits``)."""
    key = "per_second"
    return lambda result: (
        100 * ratio(result.median(workload, result.ours, callers, key), result.median(workload, limit, 0, key))
    )


def first_character(streams: int) -> Callable[[Results], float]:
    return lambda result: result.median("streams", result.ours, streams, "first_p99")


def slowdown(workload: str, callers: int, other: str) -> Callable[[Results], float]:
    """Return a function that computes the p99 of classification while other requests run, relative to the p99 alone."""

    def measured(result: Results) -> float:
        beside, alone = (
            result.median(workload, part_name(result.ours, part), callers, "p99") for part in (BESIDE + other, ALONE)
        )
        return ratio(beside, alone)

    return measured


TWO_THREADS = "in process, 2 threads, batch 32"
TWO_WORKERS = f"{OURS}, 2 workers"
TARGETS = [
    Target("workshop CNN, 64 callers: throughput / plain", 3.3, 4.2, over_plain("cnn", 64, "per_second")),
    Target("workshop CNN, 1 caller: p50 / plain", 1.1, 0.9, over_plain("cnn", 1, "p50"), is_maximum=True),
    Target("workshop CNN, 64 callers: p99 / plain", 0.6, 0.4, over_plain("cnn", 64, "p99"), is_maximum=True),
    Target(
        "cifar10-whitened, 64 callers: throughput / in process with 2 threads",
        80,
        95,
        of_limit("strong", 64, TWO_THREADS),
        "%",
    ),
    Target("text, 32 callers, 200 characters: throughput / plain", 5.5, 7.5, over_plain("text", 32, "per_second")),
    Target("text, 32 callers: throughput / in process with 2 threads", 75, 95, of_limit("text", 32, TWO_THREADS), "%"),
    Target("64 streams: time to first character, p99", 100, 30, first_character(64), "ms", is_maximum=True),
    Target("forecasts, 32 callers: throughput / plain", 9, 15, over_plain("forecast", 32, "per_second")),
    Target("16 digits, 32 callers: throughput / plain", 2, 2.6, over_plain("sample", 32, "per_second")),
    Target(
        "8 callers classify: p99 with 32 texts running / alone",
        3,
        1.5,
        slowdown("mixed", 8, BESIDE_TEXTS),
        is_maximum=True,
    ),
    Target(
        f"4 callers classify: p99 beside {BESIDE_DIGITS} / alone",
        2,
        1.5,
        slowdown("large", 4, BESIDE_DIGITS),
        is_maximum=True,
    ),
    Target(
        "memory of two workers, PSS",
        450,
        400,
        lambda result: result.median(START, TWO_WORKERS, 0, "pss"),
        "MiB",
        is_maximum=True,
    ),
    Target(
        "start to ready", 5, 2.5, lambda result: result.median(START, result.ours, 0, "seconds"), "s", is_maximum=True
    ),
]


def evaluate_targets(results: Results) -> list[tuple[Target, float]]:
    return [(target, target.measured(results)) for target in TARGETS]


def targets(evaluated: Sequence[tuple[Target, float]]) -> str:
    lines = ["| target | must | goal | measured | met |", "|---|--:|--:|--:|---|"]
    for target, measured in evaluated:
        sign = "≤" if target.is_maximum else "≥"
        bounds = [f"{sign} {limit:g} {target.unit}" for limit in (target.must, target.goal)]
        shown = "" if math.isnan(measured) else f"{measured:,.2f} {target.unit}"
        lines.append(f"| {target.text} | {' | '.join(bounds)} | {shown} | {target.met(measured)} |")
    return "\n".join(lines)


def targets_as_json(evaluated: Sequence[tuple[Target, float]]) -> dict[str, Any]:
    """Return the table of the measured targets for a file in benchmarks/results/."""
    rows = []
    for target, measured in ((target, measured) for target, measured in evaluated if not math.isnan(measured)):
        sign = "≤" if target.is_maximum else "≥"
        bounds = [f"{sign} {bound:g}" for bound in (target.must, target.goal)]
        rows.append([target.text, target.unit, *bounds, rounded(measured, 2)])
    columns = {"figure": None, "unit": None, "must": None, "goal": None, "measured": "g"}
    return {"title": "targets", "columns": columns, "rows": rows}
