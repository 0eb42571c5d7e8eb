"""Write docs/measurements.md and the README's key figures from the model cards and benchmarks/results/.

python -m docs.measurements     # make report
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app import store
from app.store import Store
from docs.markdown import table

ROOT = Path(__file__).parent.parent
STORE = ROOT / "models_store"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "measurements.md"
README = ROOT / "README.md"
KEY_FIGURES_BLOCK = re.compile(
    r"(<!-- key figures, written by make report -->\n).*?(<!-- end of key figures -->)", re.S
)

HEAD = """# Measurements

`make report` writes this page from the model cards in `models_store/` and the files in `benchmarks/results/`. Each
section states its command, machine and date. To update a figure, run the command of its section again, and edit the
file in `benchmarks/results/`. For the section
[Quartet and a plain FastAPI server](#quartet-and-a-plain-fastapi-server),
`make bench ARGS="--save benchmarks/results/speed/serving.json"` writes this file.

- [Models](#models): the results of each network on its test data
- [Accuracy](#accuracy): comparisons with other forecasters, and training on your own data
- [Speed](#speed): throughput and latency
- [Reliability](#reliability): restarts, overload, kills and long runs

## Models

Each figure is stored on the card of its model (`models_store/<name>/<version>/card.json`, or `GET /v1/models`), with
its data, seed and command. [Metrics](reference/model-card.md#metrics) explains the names of the figures. `make
evaluate` measures all figures again with the code of the service. The command fails if a figure differs by more than
its rounding, or if the data differ from those on the card. In two cases, the command only prints a difference and does
not fail. In the first case, the processor computes the network in bfloat16. In the second case, a classifier is trained
for the metric, and the processor differs from that of the first measurement.

Hyperparameters were chosen on validation parts. Each model was trained with seed 0. Three models were trained again
with other seeds, but no model was selected as the best of several seeds. `cifar10-accurate` was trained a second time
for the calibration of its probabilities. `series-lstm@3` and the network of `shakespeare-rnn@5` were trained three
times to measure the spread of their figures. The sections [Three seeds of series-lstm 3](#three-seeds-of-series-lstm-3)
and [Three seeds of shakespeare-rnn 5](#three-seeds-of-shakespeare-rnn-5) and [training/LOG.md](../training/LOG.md)
describe these trainings.

The table states how often each model was measured on the test part:

| model | measurements on the test part |
|---|---|
| `series-lstm@3`, `mnist-cgan`, `mnist-gan`, `mnist-judge` | one |
| `shakespeare-rnn@5` | three. Version 4 was measured once, after it was chosen from two networks on validation data. In version 5, its logits are divided by a temperature that was fitted to validation data. This version was measured twice with the same weights, because the notes on the first card were wrong |
| `cifar10-accurate` | three: first an earlier network with another training (accuracy 0.9316, published as `cifar10-robust` 1), then with the calibration of its own training (calibration error 0.0117, and 0.0091 with test-time augmentation), and with the published calibration |
| `cifar10-lenet` | two: for a training with batch size 128 (accuracy 0.742), and for the published training with batch size 512, which is faster |
| `sine-lstm` | two: before and after a change of the code that computes the forecasts of 50 steps in one call. The figures were the same |
| `cifar10-whitened` | three: first without a correction for label smoothing (calibration error 0.0106, and 0.0110 with test-time augmentation), then with another correction (0.0090 and 0.0071), then with the published correction |
| `shakespeare-rnn@1` | three. Parts of the test part were read once more to analyse the loss; see [training/LOG.md](../training/LOG.md) |

During development, test runs of one or two epochs also printed figures of the test parts. These figures were not used
to choose anything. From 27 to 30 November 2026, the code added a line to the end of [training/LOG.md](../training/LOG.md)
for each training that measured on a test part. The section [Corruptions of ImageNet-C](#corruptions-of-imagenet-c) read 500
test images of CIFAR-10 once more, after all choices.

The figures of `cifar10-accurate` were measured in bfloat16, and those of `cifar10-whitened` in float32. When the
service loads such a model, it times a convolution in bfloat16 and in float32, and uses bfloat16 if it is clearly
faster. On some processors, bfloat16 is slower than float32. In bfloat16, the accuracy of `cifar10-whitened` is 0.9417
(0.9463 with test-time augmentation). No other figure of this model changes by more than 0.001. In float32, the accuracy
of `cifar10-accurate` is 0.9545, and its calibration error is 0.0064 (0.0056 with test-time augmentation).

`samples_only_accuracy` of `mnist-cgan` depends on the processor: it is 0.989 on an AMD EPYC, and 0.987 on an Intel
Xeon. For this figure, a classifier is trained on generated images, and rounding changes the training. All other figures
are the same on both processors.

The main figure of an image generator is its Fréchet distance divided by a floor. The Fréchet distance compares two sets
of images in the features of the reference classifier `mnist-judge`. The floor is the distance between two sets of real
images: the test images, and training images that this classifier has not seen. For `mnist-cgan`, the ratio is 5.39 /
4.92 = 1.10. The floor has a standard error of 0.50 (jackknife with ten parts), which contributes a standard error of
0.11 to the ratio. The error of the distance of the generated images is not estimated. New cards state the ratio and the
contribution of the floor as `frechet_ratio_unseen` and `frechet_ratio_unseen_spread`.

The older figure `frechet_ratio` (1.04 before rounding) uses another floor: the distance between the test images and
training images that the classifier has seen. For 11 disjoint random sets of 5,000 training images, the mean of this
floor is 5.57, and its standard deviation is 0.84. The jackknife also estimates 0.84.
"""
SPEED_HEAD = """
### Speed of one thread

Each training measures the speed of its network on one thread with the code of the service, and stores the figures on the
model card. `python -m training.evaluation.speed` measures these figures again. On a machine that other programs use, the
results of two runs can differ by 15 % or more.

Rows of different machines cannot be compared, and several machines have the name AMD EPYC. On the same Intel Xeon with
AMX, `cifar10-whitened` classifies 1,780 and `cifar10-accurate` 841 images per second in batches of 64.
"""
ITEMS = {"classify": "images", "continue": "characters", "forecast": "forecasts", "sample": "images"}
SECTIONS = {
    "accuracy": "This section contains results of `training/` that are not on the model cards.",
    "speed": "`ours` is Quartet. `ours 2x1` means two workers with one thread each. `plain` is a FastAPI server without "
    "batching. The column `of plain` is the throughput divided by the throughput of `plain` with the same number of callers. "
    "`min` and `max` are the smallest and the largest throughput of a round. `p50`, `p95` and `p99` are percentiles of the "
    "latency. `CPU s/s` is the number of CPU seconds that all processes of the server use per second. `PSS` is the memory of "
    "all its processes. It divides a shared page of memory between all processes that use this page. The benchmark and the "
    "other servers also use pages of PyTorch's files, so the PSS is lower than on a machine without them. A table of targets compares figures with a required value "
    "(`must`) and a desired value (`goal`).\n\n"
    "Known error of the tables that were measured before 2026-11-29: this project's load generator counted a request that was "
    "unfinished at the end as a fraction, but subtracted nothing at the start. So it overstated the throughput of servers "
    "with many waiting requests. For texts with 32 callers, it gave 40 requests/s for `plain`, while 32 callers divided by "
    "the median latency are 37. The ratio to `plain` was therefore too low. Rows that were measured with wrk are not affected. "
    "With the corrected load generator, but on a slower machine without AVX-512, the ratio for texts is 8.74 with 32 callers and "
    "12.49 with 64 callers.",
    "reliability": "Each command exits with an error if a limit is exceeded. `soak`, `determinism` and `restarts` compare "
    "the content of answers with the expected content, and `cluster` does so in its part `same`. `attack` and `overload` "
    "check only the status and the time of answers.",
}


class KeyFigure(NamedTuple):
    """A row of the README's table of key figures. ``read`` returns the value, and ``show`` formats it as text."""

    label: str
    read: Callable[[], float]
    show: Callable[[float], str]
    command: str


def metric(name: str, key: str) -> Callable[[], float]:
    """Return a function that reads a metric from the card of the newest version of a model."""
    return lambda: cards()[name][-1].metrics[key].value


def result(path: str, title: str, column: str, **cells: object) -> Callable[[], float]:
    """Return a function that reads a number from the table ``title`` in ``benchmarks/results/{path}.json``.

    ``cells`` maps columns to values. The number is in ``column`` of the only row that has these values.
    """

    def read() -> float:
        (source,) = [each for each in load(RESULTS / f"{path}.json")["tables"] if each["title"] == title]
        rows = [dict(zip(source["columns"], row, strict=True)) for row in source["rows"]]
        (row,) = [row for row in rows if all(row[key] == value for key, value in cells.items())]
        return float(row[column])

    return read


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def amount(unit: str, decimals: int = 0) -> Callable[[float], str]:
    return lambda value: f"{value:,.{decimals}f} {unit}".strip()


CNN, TEXT = "workshop CNN, one 32x32 PNG", "text, 32 characters in, 200 out"
BENCH = "make bench"
KEY_FIGURES = [
    KeyFigure(
        "CIFAR-10 test accuracy, `cifar10-accurate`", metric("cifar10-accurate", "accuracy"), percent, "make evaluate"
    ),
    KeyFigure(
        "the same for images with noise, blur and other corruptions",
        metric("cifar10-accurate", "accuracy_damaged"),
        percent,
        "make evaluate",
    ),
    KeyFigure(
        "test loss of `shakespeare-rnn` on Shakespeare's plays",
        metric("shakespeare-rnn", "nats_per_character"),
        amount("nats per character", 3),
        "make evaluate",
    ),
    KeyFigure(
        "error of `series-lstm` on the M4 hourly series, relative to a naive forecast (OWA, overall weighted average)",
        metric("series-lstm", "hourly_owa"),
        amount("", 3),
        "make evaluate",
    ),
    KeyFigure(
        "Fréchet distance of `mnist-cgan` to real digits, divided by the distance between two sets of real digits "
        "(4.92, standard error 0.50). 1 is ideal",
        lambda: metric("mnist-cgan", "frechet_distance_5000")() / metric("mnist-cgan", "frechet_floor_5000")(),
        amount("", 2),
        "make evaluate",
    ),
    KeyFigure(
        "image classifications per second, `cifar10-lenet`, 64 concurrent clients",
        result("speed/serving", CNN, "requests/s", server="ours", callers=64),
        amount("requests/s"),
        BENCH,
    ),
    KeyFigure(
        "the same, relative to a FastAPI server without batching",
        result("speed/serving", CNN, "of plain", server="ours", callers=64),
        amount("x", 2),
        BENCH,
    ),
    KeyFigure(
        "generated texts of 200 characters per second, 32 concurrent clients, relative to a FastAPI server without batching",
        result("speed/serving", TEXT, "of plain", server="ours", callers=32),
        amount("x", 2),
        BENCH,
    ),
    KeyFigure(
        "time from the start until the service is ready, with two workers (on 27 November 2026, with ten versions of eight "
        "networks in memory)",
        result("speed/serving", "targets", "measured", figure="start to ready"),
        amount("s", 2),
        BENCH,
    ),
    KeyFigure(
        "failed requests during eight restarts of services, one after the other, under load",
        result("reliability/restarts", "", "value", figure="failed requests"),
        amount(""),
        "make restarts",
    ),
]


def load(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def cards() -> dict[str, list[store.Card]]:
    """Return the cards of all versions by model name, the oldest version first."""
    cards: dict[str, list[store.Card]] = {}
    for name, number in Store(STORE).versions():
        cards.setdefault(name, []).append(Store(STORE).card(name, number))
    return cards


def numbers(columns: dict[str, Any], rows: list[list[Any]]) -> str:
    """Return a Markdown table. ``columns`` maps each name to its decimals: a number, "g" (all) or None (text)."""
    shown = [[show(value, form) for value, form in zip(row, columns.values(), strict=True)] for row in rows]
    return table(list(columns), shown, [name for name, form in columns.items() if form is not None])


def show(value: Any, form: Any) -> str:
    if value is None:
        return ""
    if form is None or isinstance(value, str):
        return str(value)
    return f"{value:,}" if form == "g" else f"{value:,.{form}f}"


def models() -> Iterator[str]:
    """Yield a section with the figures of each card."""
    for name, versions in cards().items():
        for card in reversed(versions):
            yield f"\n### {name}@{card.version}\n\n{card.title}. Trained by `{card.command}` in {card.minutes:g} minutes "
            yield f"({card.hardware}).\n\n"
            rows = [
                [f"`{key}`", f"{figure.value:.{figure.decimals}f}", figure.split]
                for key, figure in card.metrics.items()
            ]
            yield numbers({"figure": None, "value": 0, "measured on": None}, rows)


def speeds() -> str:
    rows: list[list[Any]] = []
    for versions in cards().values():
        for card in versions:
            if speed := card.speed:
                item = ITEMS[card.task]
                rows.append(
                    [f"`{card.name}@{card.version}`", speed.milliseconds, speed.per_second, item, speed.hardware]
                )
    columns = {"model": None, "one item, ms": "g", "items per second, batches of 64": 0, "item": None, "machine": None}
    return numbers(columns, rows)


def run(path: Path) -> Iterator[str]:
    """Yield the section for one file of results."""
    content = load(path)
    yield f"\n### {content['title']}\n\n"
    command = content["command"]
    yield f"- Command: {f'`{command}`' if ' in ' not in command else command}\n- Machine: {content['machine']}\n"
    yield f"- Date: {content['date']}\n"
    if content.get("software"):
        yield f"- Software: {content['software']}\n"
    yield from (f"- {note}\n" for note in content["notes"])
    for each in content["tables"]:
        title = f"\n{each['title']}:\n" if each["title"] else ""
        yield f"{title}\n{numbers(each['columns'], each['rows'])}"


def page() -> str:
    """Return the text of docs/measurements.md."""
    parts = [HEAD, *models(), SPEED_HEAD, "\n", speeds()]
    for folder, text in SECTIONS.items():
        parts.append(f"\n## {folder.capitalize()}\n\n{text}\n")
        for path in sorted((RESULTS / folder).glob("*.json")):
            parts += run(path)
    return "".join(parts)


def key_figures() -> str:
    """Return the README's table of key figures."""
    rows: list[list[Any]] = [
        [figure.label, figure.show(figure.read()), f"`{figure.command}`"] for figure in KEY_FIGURES
    ]
    return numbers({"figure": None, "value": 0, "command": None}, rows)


def pages() -> dict[Path, str]:
    """Return the path and the text of each generated file."""
    readme = KEY_FIGURES_BLOCK.sub(lambda match: match[1] + key_figures() + match[2], README.read_text("utf-8"))
    return {PAGE: page(), README: readme}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
