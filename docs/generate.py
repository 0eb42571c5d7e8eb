"""Write the reference pages in docs/reference/ from the code.

python -m docs.generate     # make docs
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from prometheus_client.metrics import MetricWrapperBase

import app.main  # noqa: F401 - defines all errors
from app import errors, store
from app.networks import KINDS
from app.observability.metrics import Metrics
from app.settings import PREFIX, Settings
from docs import card_metrics
from docs.markdown import code, sentence, table

LARGE = 1e18  # larger numbers are written with an exponent
FOLDER = Path(__file__).parent / "reference"

CARD_FIELDS = {
    "name": "name of the model: lower-case letters, digits and hyphens; `stats` is reserved",
    "version": "version number, from 1",
    "task": "task that the model serves",
    "title": "one sentence that describes the model",
    "kind": "name of the network architecture; see below",
    "sizes": "sizes of the layers of the network; see below",
    "inputs": "input tensors of the network; -1 stands for a dimension of any size",
    "outputs": "output tensors of the network",
    "labels": "class names of a classifier, or of a generator with labels",
    "thresholds": "for classifiers with several labels per image: an image has a label if its probability reaches this value",
    "vocabulary": "characters of a text model; the index of a character is its token id",
    "series": "properties of the series of a forecaster: season, year, non-negative or integer values, known covariates",
    "refit_steps": "number of training steps of the published network, if it was trained on all data. The metrics are then those of an earlier network, which was trained without the held-out data",
    "refit_layers": "the layers that the training on all data changed: all, or only the last",
    "held_out": "number of training images that were not used for training",
    "earlier_readings": "earlier measurements on the same test data, each with its reason and its figures",
    "ancestors": "networks from which the network learned, the oldest first, each with its role (base, teacher or calibration), the hash of its weights, its data, its command and its minutes; null stands for an unknown value",
    "residuals": "for the kind `series-lstm` (the workshop's network, model `sine-lstm`): the standard deviation of the forecast errors for each step ahead, divided by the scale of the training series",
    "metrics": "measured figures; see below",
    "data": "name and SHA-256 hash of each data set",
    "seed": "seed of the training",
    "command": "command that trained or imported the model",
    "commit": "git commit of the code that finished the training",
    "resumed": "where the training was resumed: step, and the commit of the code and the version of PyTorch before and after; absent or null if the training was not resumed",
    "versions": "versions of Python and PyTorch",
    "hardware": "processor and threads of the training",
    "minutes": "duration of the training, without those of the ancestors",
    "created": "time of publication, ISO 8601",
    "notes": "remarks on the training",
    "weights_sha256": "SHA-256 hash of `model.safetensors`",
    "speed": "speed of the network on one thread: milliseconds for one item, and items per second in batches",
    "licence": "licence of an imported network, or of the pretrained network from which the training started",
    "source": "origin of this network",
    "reference": "histograms of the features of the validation data, to detect drift",
}
CARD_HEAD = """# Model card

`make docs` generates this page from the code.

A model card is a JSON file that describes one version of a model. The store (`models_store/`, or the folder in
`QUARTET_STORE`) contains these files:

| path | content |
|---|---|
| `defaults.json` | for each task, the default model, which answers requests without `model` |
| `<name>/active.json` | the active version, the canary, the history of active versions and the retired versions; the file does not exist until a version is activated |
| `<name>/<version>/card.json` | the model card, described below |
| `<name>/<version>/model.safetensors` | the weights |
| `<name>/<version>/*.png` | pictures of the training, such as `curves.png` and `samples.png` |
| `.lock` | empty file that a command locks while it changes the other files |

A published version never changes. [Versions](../how-to/rollout.md) describes the commands that manage versions. A card
has at most 4 MiB. The service ignores fields that it does not know. In `inputs` and `outputs`, unknown fields are an
error.

## Fields of card.json

"""
KIND_AND_NAME = """
The kind `series-lstm` is the workshop's network, and its model is `sine-lstm`. The model `series-lstm` has the kind
`forecaster`.
"""
SETTINGS_HEAD = """# Settings

`make docs` generates this page from `app/settings.py`.

Settings are environment variables. If a value is invalid, or a `QUARTET_` variable is unknown or not in upper case, the
service prints the name of the variable and does not start. The training scripts also read `QUARTET_DATA_DIR`, the
folder of the training data. Further limits, such as the number of images in a request, are in
`app/limits.py`; for example, `QUARTET_LIMITS='{"max_images": 64}'` changes this one.

"""
METRICS_HEAD = """# Metrics

`make docs` generates this page from `app/observability/metrics.py`.

`GET /metrics` returns these metrics for all workers together, in the Prometheus text format. Units are seconds, rows
and bytes. A row is one input of a network, such as one image. [Monitoring](../how-to/monitoring.md) describes the
dashboard and the alerts.

"""
ERRORS_HEAD = """# Errors

`make docs` generates this page from `app/errors.py`.

Every error has this JSON form. The message contains the wrong value and states which values are allowed.

```json
{"error": {"message": "temperature is -1; ...", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}
```

Under `/v2`, the form is `{"error": "the message"}`. If an error occurs during a stream, the stream ends with an event
of the same form. The values of `type` and `code` are like those of OpenAI, so the OpenAI client raises the matching
exception class.

"""
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
INDEX = """# Reference

`make docs` generates these pages from the code. A test fails if they are out of date. The reference of the HTTP API is
`/docs` of a running service, and `/openapi.json`. The reference of a command is its `--help`.

- [Settings](settings.md)
- [Metrics](metrics.md)
- [Errors](errors.md)
- [Model card](model-card.md)
"""


def number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and value < LARGE else f"{value:g}"


def settings() -> str:
    rows = []
    schemas = Settings.model_json_schema()["properties"]
    for name, field in Settings.model_fields.items():
        if name == "limits":  # see SETTINGS_HEAD
            continue
        schema = schemas[name]
        choices = [schema, *schema.get("anyOf", ())]
        bounds = [
            text.format(number(choice[key])) for choice in choices for key, text in BOUNDS.items() if key in choice
        ]
        default = "" if field.default is None else str(field.default)
        rows.append((code(PREFIX + name.upper()), code(default), ", ".join(bounds), field.description))
    return SETTINGS_HEAD + table(("variable", "default", "allowed", "description"), rows)


def metrics() -> str:
    rows = []
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            labels = ", ".join(code(label) for label in metric._labelnames)
            rows.append((code(name), metric._type, labels, metric._documentation))
    return METRICS_HEAD + table(("metric", "type", "labels", "description"), rows)


def all_errors(base: type[errors.QuartetError] = errors.QuartetError) -> Iterator[type[errors.QuartetError]]:
    yield base
    for own in base.__subclasses__():
        yield from all_errors(own)


def error_page() -> str:
    classes: dict[str, type[errors.QuartetError]] = {}
    for each in all_errors():
        if each.__module__.startswith("app."):
            classes.setdefault(each.code, each)  # the class that introduces the code
    rows = sorted(
        (str(each.status), code(each.code), code(each.type), code(each.__name__), described(each))
        for each in classes.values()
    )
    return ERRORS_HEAD + table(("status", "code", "type", "class", "meaning"), rows)


def described(error: type[errors.QuartetError]) -> str:
    """Return the first paragraph of the docstring of an error."""
    if error is errors.QuartetError:
        return "An unexpected error. The log contains the traceback."
    return sentence(error.__dict__.get("__doc__"))


def type_name(annotation: Any) -> str:
    """Return a type annotation as a text for readers, such as ``list[str] or None``."""
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    text = re.sub(r"\b(?:typing|types|app\.[\w.]+)\.", "", text).replace("NoneType", "None")
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 or None", text)
    return text.replace(" | ", " or ").replace("Literal", "one of ")


def card() -> str:
    hints = get_type_hints(store.Card)
    rows = [(code(name), code(type_name(hints[name])), CARD_FIELDS[name]) for name in store.Card.model_fields]
    parts = [CARD_HEAD, table(("field", "type", "content"), rows), "\n## Architectures\n\n"]
    kinds = [
        (
            code(kind),
            code(entry[1].__name__),
            ", ".join(code(field.name) for field in fields(entry[1])),
            entry[2] or "any",
        )
        for kind, entry in KINDS.items()
    ]
    parts.append(table(("kind", "sizes", "fields of sizes", "task"), kinds))
    parts += [KIND_AND_NAME, card_metrics.HEAD, table(("metric", "meaning"), card_metrics.rows())]
    parts += [card_metrics.AFFIXES_HEAD, table(("name", "variant"), card_metrics.affix_rows())]
    return "".join(parts)


def pages() -> dict[Path, str]:
    """Return the path and the text of each generated file.

    QUARTET_ variables in the environment are ignored, so that the pages state the defaults.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with patch.dict(os.environ, plain, clear=True):
        return _pages()


def _pages() -> dict[Path, str]:
    return {
        FOLDER / "README.md": INDEX,
        FOLDER / "settings.md": settings(),
        FOLDER / "metrics.md": metrics(),
        FOLDER / "errors.md": error_page(),
        FOLDER / "model-card.md": card(),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
