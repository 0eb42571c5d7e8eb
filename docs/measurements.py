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

`make report` writes this page from the cards in `models_store/` and the files in `benchmarks/results/`. Each figure names
its command, machine and date. To change a figure, run its command again and edit the file.
`make bench ARGS="--save benchmarks/results/speed/serving.json"` writes the file of [Quartet and a plain FastAPI server](#quartet-and-a-plain-fastapi-server).

- [Models](#models): what each network achieves on its test data
- [Accuracy](#accuracy): comparisons with other forecasters, and training on your own data
- [Speed](#speed): throughput and latency
- [Reliability](#reliability): restarts, overload, kills and long runs

## Models

Each figure is stored on its model's card (`models_store/<name>/<version>/card.json`, or `GET /v1/models`), with its
data, seed and command. `make evaluate` measures all of them again with the code that serves. It fails if a figure differs by
more than its rounding, or if the data are not those of the card. Where a processor that uses bfloat16, or another processor in the
training of a classifier, explains a difference, it states the difference.

Hyperparameters were chosen on validation parts. All models were trained once, with seed 0. No model is the best of several
seeds. The test parts were read this often:

| model | reads of the test part |
|---|---|
| `shakespeare-rnn@2` and `@3`, `series-lstm`, `mnist-cgan`, `mnist-gan`, `mnist-judge` | once |
| `cifar10-lenet` | twice: once with batch size 128 (accuracy 0.742), once with 512, which is faster |
| `sine-lstm` | twice: the second time after the free-running half became one call; the figures were the same |
| `cifar10-whitened` | three times: with label smoothing in the answers (calibration error 0.0106, 0.0110 with test-time augmentation), with another correction (0.0090 and 0.0071), and as published |
| `shakespeare-rnn@1` | three times, and parts of it once more to analyse the loss; see [training/LOG.md](../training/LOG.md) |

Trials of one or two epochs during development also printed test figures. Nothing was chosen by them. Since 27 November 2026, the
code appends each reading of a test part to the end of [training/LOG.md](../training/LOG.md).

The card of `cifar10-whitened` was measured in float32. The service uses bfloat16 for matrix products if they are clearly
faster on the processor; it tries this when it loads the model. They take half of the time on an AMD EPYC and 1.5 times as
long on an Intel Xeon without AMX. In bfloat16 the accuracy is 0.9417 (0.9463 with test-time augmentation). No other figure
changes by more than 0.001. `samples_only_accuracy` of `mnist-cgan` depends on the processor, because the training takes
another path: 0.989 on an AMD EPYC, 0.987 on an Intel Xeon. All other figures are the same on both.

The figure of a generator is its Fréchet distance relative to the floor: that of real images which the reference classifier has
not seen. `mnist-cgan` has 5.39 / 4.92 = 1.10. The standard error of the floor is 0.50 (jackknife of ten), so that of the ratio is
0.11. New cards state both as `frechet_ratio_unseen` and its spread. `frechet_ratio`, 1.04 unrounded, divides by the floor of
images which the classifier has seen. 11 disjoint draws of 5,000 of these have a mean of 5.57 and a standard deviation of 0.84;
their jackknife estimates 0.84.
"""
SPEED_HEAD = """
### Speed of one thread

Each training measures its network on one thread with the code that serves, and stores the figures on the card.
`python -m training.evaluation.speed` measures them again. Another run on a shared machine differs by 15 % or more.
"""
ITEMS = {"classify": "images", "continue": "characters", "forecast": "forecasts", "sample": "images"}
SECTIONS = {
    "accuracy": "Results of `training/` besides the model cards.",
    "speed": "`plain` is a plain FastAPI server without batching. Other columns: `of plain` is the throughput relative to "
    "`plain` with as many callers. `CPU s/s` is the used CPU seconds per second. `PSS` is the memory of all processes.",
    "reliability": "Each command checks every answer and ends with an error if a limit is exceeded.",
}


class KeyFigure(NamedTuple):
    """A row of the README's table. ``read`` returns the value, and ``show`` turns it into text."""

    label: str
    read: Callable[[], float]
    show: Callable[[float], str]
    command: str


def metric(name: str, key: str) -> Callable[[], float]:
    """Return a function that reads a metric from the newest card of a model."""
    return lambda: cards()[name][-1].metrics[key].value


def result(path: str, title: str, column: str, **cells: object) -> Callable[[], float]:
    """Return a function that reads a number from the table ``title`` in ``benchmarks/results/{path}.json``.

    The number is in ``column`` of the only row in which the given columns have the values ``cells``.
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
        "CIFAR-10 test accuracy, `cifar10-whitened`", metric("cifar10-whitened", "accuracy"), percent, "make evaluate"
    ),
    KeyFigure(
        "the same with test-time augmentation (`QUARTET_TTA=true`)",
        metric("cifar10-whitened", "accuracy_views"),
        percent,
        "make evaluate",
    ),
    KeyFigure(
        "Shakespeare, test loss of `shakespeare-rnn`",
        metric("shakespeare-rnn", "nats_per_character"),
        amount("nats per character", 3),
        "make evaluate",
    ),
    KeyFigure(
        "M4 hourly, overall weighted average (OWA) of `series-lstm`; naive forecast: 1",
        metric("series-lstm", "hourly_owa"),
        amount("", 3),
        "make evaluate",
    ),
    KeyFigure(
        "Fréchet distance of `mnist-cgan`, relative to real images that the classifier has not seen (standard error 0.11)",
        lambda: metric("mnist-cgan", "frechet_distance_5000")() / metric("mnist-cgan", "frechet_floor_5000")(),
        amount("", 2),
        "make evaluate",
    ),
    KeyFigure(
        "images classified, `cifar10-lenet`, 64 callers",
        result("speed/serving", CNN, "requests/s", server="ours", callers=64),
        amount("requests/s"),
        BENCH,
    ),
    KeyFigure(
        "the same, relative to a plain FastAPI server",
        result("speed/serving", CNN, "of plain", server="ours", callers=64),
        amount("x", 2),
        BENCH,
    ),
    KeyFigure(
        "texts of 200 characters, 32 callers, relative to a plain FastAPI server",
        result("speed/serving", TEXT, "of plain", server="ours", callers=32),
        amount("x", 2),
        BENCH,
    ),
    KeyFigure(
        "start to ready, ten versions of eight networks, two workers",
        result("speed/serving", "targets", "measured", figure="start to ready"),
        amount("s", 2),
        BENCH,
    ),
    KeyFigure(
        "failed requests during eight rolling restarts under load",
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
    for name, number in store.all_versions(STORE):
        cards.setdefault(name, []).append(store.read_card(STORE / name / str(number)))
    return cards


def numbers(columns: dict[str, Any], rows: list[list[Any]]) -> str:
    """Return a Markdown table. ``columns`` maps names to the number of decimals, "g" (all decimals) or None (text)."""
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
    columns = {"model": None, "one alone, ms": "g", "per second, batches of 64": 0, "of": None, "machine": None}
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
