"""Write docs/measurements.md and the tables in README.md and docs/how-to/sizing.md.

python -m docs.measurements     # make report

All figures come from the model cards in models_store/ and from the files in benchmarks/results/.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.store import Card, Store
from docs.markdown import code, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- written by make report: (\w+) -->\n).*?(<!-- end -->)", re.S)
SERVING = "speed/serving"
SERVERS = ("ours", "plain x2", "mosec", "mosec-x2", "litserve", "torchserve")
PLAIN = "a FastAPI server without batching"

HEAD = """# Measurements

`make report` writes this page from the model cards and from the files in `benchmarks/results/`.

Each table states its date.

## Quality of the included models

`make evaluate` measures the figures of the cards again with the code of the service, and fails if one differs.
[Metrics](reference/model-card.md#metrics) explains their names. The card of each model
(`models_store/<name>/<version>/card.json`, or `GET /v1/models`) has all figures, with the data, the seed and the command.

Hyperparameters were chosen on validation data. Each model was trained with one seed. The column *test readings* counts
how often the test data were read for this model, with unpublished trainings; `training/evaluation/test_measurements.jsonl` lists
each reading. The last column has the values that the figure had then.

"""
ONE_THREAD = """
- `*_views`: with test-time augmentation (`QUARTET_TTA`).
- `hourly_owa`, `weekly_owa`: error on the test parts of the M4 competition. The forecast of the benchmark Naive2 has 1.
- `nats_per_character`: on the last tenth of Shakespeare's plays, which was not used in training.
- `frechet_distance` has to be compared with `frechet_floor`, the distance between two sets of real digits.

## Speed of one network on one thread

Each training measures its network with the code of the service, and stores the result on the card. `python -m
training.evaluation.evaluate` measures it again. Rows from different machines cannot be compared.

"""
SERVING_HEAD = """
## Speed of the service

`FastAPI` is a server that calls the same networks directly in the request handler, without batching. The
table shows requests per second, and the 99th percentile of the latency. Each figure is a median over rounds in which the
servers take turns. Quartet has two workers. The clients ran on the same two cores. Other programs ran at times, so single
rows are too low: FastAPI with one client and the workshop CNN answered 35, 63 and 830 requests/s in the three rounds.

"""
PEERS_HEAD = """
## Other model servers

Requests per second of 64 clients in the same run. Each server is configured as its documentation recommends;
`benchmarks/peers/` has the code of mosec, LitServe and TorchServe. `x2` means two processes for each model.

"""
FORECASTERS_HEAD = """
## Other forecasters

Mean absolute scaled error (MASE); lower is better. In parentheses: the 90 % interval of the difference from
`series-lstm`, from a bootstrap over the forecasts. `series-lstm` was not trained on these series. Nothing was selected on
the two collections of `vega_datasets` (US employment, Seattle), which were chosen before they were measured, once.
AutoETS is better than the network on the employment, and worse on the weather. The other sets are weaker evidence:
constants of the networks were chosen with M1, and the factor of the intervals also with ETTh1. The horizons of the
synthetic training series are those of M1, M3 and M4.

"""
CORRUPTIONS_HEAD = """
## Corrupted images

Accuracy on images of CIFAR-10 with the 15 corruptions of ImageNet-C in five severities, on the first 500 test images.
ImageNet-C defines them for larger images, so they are stronger here than in CIFAR-10-C. `cifar10-accurate` was trained
with noise, blur and JPEG artefacts of its own.

"""
RELIABILITY_HEAD = """
## Reliability

Each command fails if a limit is exceeded. The load generator shares the two cores with the service. The soak test of 2
December ran beside other tests, and exceeded its limit for the growth of the memory. Fuzzing was measured with earlier
code. The row of chunks of one byte in the last table is from before the limit of small chunks was lowered.

"""
ATTACK_HEAD = """
The next table shows the 99th percentile of the latency of a normal client while attackers send harmful requests. {}
requests of the normal client failed.

"""
DETAILS = re.compile(
    "open file|threads|after (two|three|four)|p50|classifications|duration|other requests$|last failure|per second"
)
QUALITY = ("accuracy", "accuracy_views", "calibration_error", "nats_per_character", "hourly_owa",
           "weekly_owa", "hourly_coverage_95", "free_running_rmse", "frechet_distance", "frechet_floor",
           "conditional_accuracy")  # fmt: skip
ITEMS = {"classify": "images", "continue": "characters", "forecast": "forecasts", "sample": "images"}


START = "start and memory, included networks"
CNN, TEXT, FORECAST = "workshop CNN, one 32x32 PNG", "text, 32 characters in, 200 out", "forecasts of 48 steps"
SIZED = (CNN, "cifar10-whitened, one 32x32 PNG", TEXT, FORECAST, "16 digits as PNGs")


def metric(name: str, key: str) -> float:
    """Return a metric from the card of the newest version of a model."""
    return [card for card in cards() if card.name == name][-1].metrics[key].value


def imagenet_c(name: str) -> float:
    """Return the mean accuracy of a model on images with the corruptions of ImageNet-C."""
    (source,) = load("accuracy/corruptions")["tables"]
    column = next(at for at, heading in enumerate(source["columns"]) if heading.startswith(f"{name}@"))
    return next(row[column] for row in source["rows"] if row[0].startswith("mean of"))


def serving(title: str, column: str, server: str = "ours", callers: int | None = 64) -> Any:
    """Return a figure of a table in ``benchmarks/results/speed/serving.json``."""
    for source in load(SERVING)["tables"]:
        for values in source["rows"]:
            row = dict(zip(source["columns"], values, strict=True))
            if (source["title"], row.get("server"), row.get("callers")) == (title, server, callers):
                return row[column]
    raise KeyError(title)


def load(path: str) -> Any:
    return json.loads((RESULTS / f"{path}.json").read_text("utf-8"))


def cards() -> list[Card]:
    """Return the cards of all versions, those of a model in the order of their numbers."""
    store = Store(ROOT / "models_store")
    return [store.card(*key) for key in sorted(store.versions())]


def quality() -> str:
    rows = []
    for card in cards():
        name = f"{card.name}@{card.version}"
        for key in QUALITY:
            if key in card.metrics:
                figure, earlier = card.metrics[key], card.earlier_readings or []
                before = [each.metrics[key] for each in earlier if key in each.metrics]
                interval = " to ".join(f"{bound:.{figure.decimals}f}" for bound in figure.interval or [])
                shown = [f"{value:.{figure.decimals}f}" for value in (figure.value, *before)]
                readings = str(1 + len(earlier)) if name else ""
                rows.append([code(name) if name else "", code(key), shown[0], interval, readings, ", ".join(shown[1:])])
                name = ""
    columns = ["model", "metric", "value", "95 % interval", "test readings", "at earlier readings"]
    return table(columns, rows, columns[2:])


def one_thread() -> str:
    rows = [
        [
            code(f"{card.name}@{card.version}"),
            speed.milliseconds,
            f"{speed.per_second:,.0f}",
            ITEMS[card.task],
            speed.hardware,
        ]
        for card in cards()
        if (speed := card.speed)
    ]
    heads = ["model", "one item, ms", "items per second, batches of 64", "item", "machine"]
    return table(heads, rows, heads[1:3])


def about(path: str) -> str:
    """Return the command, the machine and the date of a run as a paragraph."""
    content = load(path)
    return f"`{content['command']}`, {content['date']}, {content['machine']}.\n\n"


def by_server(columns: Sequence[str], servers: Container[str], callers: Container[int]) -> str:
    """Return a table with a row for each kind of request and number of callers, and the columns of each server."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for source in load(SERVING)["tables"]:
        for values in source["rows"]:
            row = dict(zip(source["columns"], values, strict=True))
            if {*columns, "callers"} <= row.keys() and row["server"] in servers and row["callers"] in callers:
                name = row["server"].replace("ours", "Quartet").replace("plain", "FastAPI")
                figures = {f"{name}, {column}": f"{row[column]:,.0f}" for column in columns}
                rows.setdefault((source["title"], row["callers"]), {}).update(figures)
    heads = sorted({head: 0 for row in rows.values() for head in row}, key=lambda head: head.endswith("p99 ms"))
    lines = [[*key, *(row.get(head, "") for head in heads)] for key, row in rows.items()]
    return table(["request", "callers", *heads], lines, ["callers", *heads])


def start() -> str:
    (source,) = [each for each in load(SERVING)["tables"] if each["title"] == START]
    columns = [list(source["columns"]).index(name) for name in ("server", "ready after s", "PSS MiB")]
    rows = [[row[column] for column in columns] for row in source["rows"]]
    return table(["start with the included networks", "ready after s", "memory (PSS), MiB"], rows)


def forecasters() -> str:
    (source,) = load("accuracy/forecasters")["tables"]
    rows: dict[str, dict[str, str]] = {}
    for series, forecaster, mase, difference, *_ in source["rows"]:
        rows.setdefault(series, {})[forecaster] = f"{mase:.3f}" + f" {difference}".replace(" % interval", " %").rstrip()
    names = ["series-lstm@3", "AutoTheta", "AutoETS", "seasonal naive"]
    shown = [[key, *(row.get(name, "") for name in names)] for key, row in rows.items()]
    return table(["series", *names], shown, names)


def corrupted() -> str:
    (source,) = load("accuracy/corruptions")["tables"]
    columns = list(source["columns"])
    return table(columns, [[row[0], *(f"{value:.3f}" for value in row[1:])] for row in source["rows"]], columns[1:])


def reliability() -> Iterator[str]:
    """Yield the table of attacks, and one table of all other runs."""
    rows = []
    for path in sorted((RESULTS / "reliability").glob("*.json")):
        content = load(f"reliability/{path.stem}")
        for source in content["tables"]:
            if list(source["columns"]) == ["figure", "value", "unit"]:
                kept = [row for row in source["rows"] if not DETAILS.search(row[0])]
                run = [code(content["command"]), content["date"]]
                rows += [[*run, label, f"{value:,} {unit}"] for label, value, unit in kept]
    yield table(["command", "date", "figure", "value"], rows, ["value"])
    (attacks,) = load("reliability/attack")["tables"]
    yield ATTACK_HEAD.format(sum(row[6] for row in attacks["rows"])) + about("reliability/attack")
    heads = ["attack", "connections", "p99 alone, ms", "p99 during the attack, ms"]
    yield table(heads, [row[:4] for row in attacks["rows"]], heads[1:])


def page() -> str:
    """Return the text of docs/measurements.md."""
    return "".join([
        HEAD, quality(), ONE_THREAD, one_thread(),
        SERVING_HEAD, about(SERVING), by_server(["requests/s", "p99 ms"], ["ours", "plain"], [1, 64]), "\n", start(),
        PEERS_HEAD, by_server(["requests/s"], SERVERS, [64]),
        CORRUPTIONS_HEAD, about("accuracy/corruptions"), corrupted(),
        FORECASTERS_HEAD, about("accuracy/forecasters"), forecasters(),
        RELIABILITY_HEAD, *reliability(),
    ])  # fmt: skip


def key_figures() -> str:
    """Return the README's table of key figures."""
    rows = [
        ("`cifar10-accurate`: accuracy on CIFAR-10", f"{metric('cifar10-accurate', 'accuracy'):.1%}"),
        ("the same with the 15 corruptions of ImageNet-C, 500 images", f"{imagenet_c('cifar10-accurate'):.1%}"),
        ("`shakespeare-rnn`: nats per character", f"{metric('shakespeare-rnn', 'nats_per_character'):.3f}"),
        ("`series-lstm`: error on M4 hourly series (OWA; Naive2 has 1)", f"{metric('series-lstm', 'hourly_owa'):.3f}"),
        ("`mnist-cgan`: digits that are read as requested", f"{metric('mnist-cgan', 'conditional_accuracy'):.1%}"),
        ("`cifar10-lenet`: images per second", f"{serving(CNN, 'requests/s'):,}"),
        (f"the same, relative to {PLAIN}", f"{serving(CNN, 'of plain'):.1f} x"),
        ("texts of 200 characters, relative to the same", f"{serving(TEXT, 'of plain'):.1f} x"),
        ("forecasts of 48 steps, relative to the same", f"{serving(FORECAST, 'of plain'):.1f} x"),
        ("start of the service", f"{serving(START, 'ready after s', callers=None):.1f} s"),
    ]
    heads = ["figure", "value"]
    run = load(SERVING)
    note = f"\nQuality: `make evaluate`. Speed: `make bench`, 64 concurrent clients, {run['machine']}, {run['date']}.\n"
    return table(heads, rows, heads[1:]) + note


def sizing() -> str:
    """Return the table of docs/how-to/sizing.md: requests per second that one core can handle, and cores for two loads."""
    planned = {title: 0.6 * serving(title, "requests/s") / 2 for title in SIZED}
    rows = [[title, f"{rate:,.0f}", math.ceil(100 / rate), math.ceil(10_000 / rate)] for title, rate in planned.items()]
    heads = ["request", "planned requests/s per core", "cores for 100/s", "cores for 10,000/s"]
    return table(heads, rows, heads[1:])


def pages() -> dict[Path, str]:
    """Return the path and the text of each generated file."""
    blocks = {"key_figures": key_figures, "sizing": sizing}
    files = {ROOT / "docs" / "measurements.md": page()}
    for path in (ROOT / "README.md", ROOT / "docs" / "how-to" / "sizing.md"):
        files[path] = BLOCK.sub(lambda match: match[1] + blocks[match[2]]() + match[3], path.read_text("utf-8"))
    return files


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
