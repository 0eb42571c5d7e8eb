"""The functions of the package ``training``: ``fit``, ``predict`` and ``evaluate``."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.store import Store, StoreError
from training import cnn, gan, lstm, prediction, rnn
from training.evaluation import evaluate as evaluation
from training.options import STORE, read_version


def fit(name: str, *, generate: bool = False, **options: Any) -> str | None:
    """Train a network on your own data, publish it, and return NAME@VERSION.

    Args:
        name: name of the model.
        generate: whether to train a generator of images, instead of a classifier.
        options: one of ``images``, ``csv`` and ``text`` with the path of the data, and options of the command.

    Returns None if no new version was published, for example because the new network is not better.
    """
    commands: dict[str, Any] = {"images": gan if generate else cnn, "csv": lstm, "text": rnn}
    given = [kind for kind in commands if kind in options]
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(commands)}; you gave {', '.join(given) or 'none'}")
    store = Store(Path(options.get("store", STORE)))
    before = store.numbers(name)
    with _errors():
        commands[given[0]].main(_words({"name": name, **options}))
    new = store.numbers(name)[len(before) :]
    return f"{name}@{new[-1]}" if new else None


def predict(
    model: str, data: str | Path | None = None, *, out: str | Path | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Predict for an image, a folder of images, a table or a text; without ``data``, generate images.

    Returns the rows of the output, which is also written to ``out``. Images, series and prompts that fail cause a
    warning. Rows of generated images have a PNG file in base64.
    """
    with _errors(), tempfile.TemporaryDirectory() as folder:
        words = _words({"out": out or Path(folder, "out"), **options})
        parsed = prediction.arguments([model, *([] if data is None else [str(data)]), *words])
        rows, problems = prediction.predict(parsed)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return rows


def evaluate(model: str, *, store: str | Path | None = None, device: str = "cpu") -> dict[str, float]:
    """Measure a published version again, on the test data of its training, and return its metrics by name.

    Raises ValueError also for a network that was trained on all data, because no test data are left for it.
    """
    models = Path(store or STORE)
    with _errors():
        try:
            version = read_version(models, model)
            if version.card.refit_steps is not None:
                raise ValueError(f"{model} was trained on all data; its card has the metrics of the first training")
            own = evaluation.own_data(version.card, models)
            measured = evaluation.measure(version, models, device, own)
        except (StoreError, evaluation.EvaluationError) as error:
            raise ValueError(f"{model}: {error}") from error
    return {name: metric["value"] for name, metric in measured.items()}


def _words(options: dict[str, Any]) -> list[str]:
    """Return the words of a command line."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words.append("--" + name.strip("_").replace("_", "-"))
            if isinstance(value, dict):
                value = [f"{key}={number}" for key, number in value.items()]
            words += map(str, [] if value is True else value if isinstance(value, list | tuple) else [value])
    return words


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Raise ValueError if a command ends with a message. Other exit statuses are results, not errors."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            raise ValueError(error.code) from error
        if error.code == 2:  # argparse has printed a message
            raise ValueError("the options are wrong; see the message above") from error
