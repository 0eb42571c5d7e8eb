"""Tables in the bodies of requests to ``/v1/series/forecast``: CSV and Excel files.

The reader of tables needs pandas. It is imported with the first table, on a thread.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from app.api.deadline import run_before_deadline
from app.api.openapi import BINARY, FORM, TEXT
from app.api.operation import Request
from app.api.request_body import Described, ModelName, limited, max_bytes, read_body, read_form
from app.engine.executor import INLINE_SIZE
from app.errors import BadValue, NotInstalled, TooLarge, quote_value
from app.limits import Limits
from app.store import Card, SeriesTraits
from app.tables.messages import TableError, spelled
from app.tables.options import ReadOptions

if TYPE_CHECKING:
    from app.tables.forecast import TableSeries

CSV = "text/csv"
EXCEL = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
BYTES_PER_VALUE = 100  # largest size of a row of a table with one value, on average
CELLS_PER_VALUE = 10  # largest number of cells of a table for each value of its series
LARGE_BYTES = 2**20  # larger tables are read one at a time, to limit memory
DEFAULT_HORIZON = 24
OTHER_FILES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PAR1")  # the reader would decompress them to any size

EXAMPLE = "date,shop,sold\n" + "".join(
    f"2026-01-{day:02},{shop},{sold}\n" for shop, level in (("north", 20), ("south", 50))
    for day, sold in enumerate([level + 5 * (day % 7) for day in range(14)], 1)
)  # fmt: skip
FILE = {**BINARY, "description": "the table, as CSV or .xlsx"}
FUTURE = {**BINARY, "description": "a table with the future values of known covariates, such as prices"}
BODIES = {
    CSV: {"schema": TEXT, "example": EXAMPLE},
    EXCEL: {"schema": BINARY},
    FORM: {
        "schema": {
            "title": "ForecastForm",
            "type": "object",
            "properties": {"file": FILE, "future": FUTURE},
            "required": ["file"],
            "additionalProperties": False,
        }
    },
}


class ForecastQuery(Described):
    """The query parameters of a request with a table that are not options of the reader."""

    model: ModelName = None
    horizon: int | None = Field(None, ge=1, json_schema_extra=limited("max_horizon"))
    """number of values to forecast. By default, one season of a model that was fine-tuned on a table, or 24; with known
    covariates, all steps that have future values"""
    levels: Annotated[list[Annotated[float, Field(gt=0, lt=100)]], Field(max_length=10)] = Field([])
    """levels of the intervals in per cent; by default 80 and 95."""
    seasonality: int | None = Field(None, ge=1)
    """values per season, as in a JSON request"""
    integer: bool = False
    """whether to round all results to integers"""
    history: bool = False
    """whether the response has the values and times of the table"""


class TableQuery(ReadOptions, ForecastQuery):
    """The query parameters of a request with a table."""


class ReadTable(NamedTuple):
    """The series of a table, the name of its time step, and remarks on how it was read."""

    series: list[TableSeries]
    step: str
    remarks: list[str]


def is_table(request: Request) -> bool:
    """Return whether the body is a table, not JSON."""
    return _media_type(request) in BODIES


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_table(request: Request, query: TableQuery, card: Card) -> ReadTable:
    """Read the series in the body of a request, for the model with this card.

    Raises:
        BadValue: the table cannot be read, or it is ambiguous. The message names the parameter that decides.
        NotInstalled: pandas is missing.
        QuartetError: any error of ``read_form`` or ``run_before_deadline``.
    """
    limits, executor = request.limits, request.models.parse_executor
    limit = max_bytes(request, BYTES_PER_VALUE * limits.max_series_values)
    files = await _files(request, limit)
    size = sum(len(content) for _, content in files.values())
    if size > LARGE_BYTES:
        executor = request.models.large_image_executor
    size = max(size, INLINE_SIZE + 1)  # never on the event loop, because importing pandas takes a second
    return await run_before_deadline(request, executor, size, _read, files, query, card, limits, limit)


async def _files(request: Request, limit: int) -> dict[str, tuple[str, bytes]]:
    """Return the name and the content of each file in the request: ``file``, and perhaps ``future``."""
    if _media_type(request) != FORM:
        return {"file": ("body", await read_body(request, limit))}
    files: dict[str, tuple[str, bytes]] = {}
    for field in await read_form(request, limit, max_files=2):
        if field.name not in ("file", "future") or isinstance(field.content, str):
            advice = "the table goes into 'file', as a file, and options go into the query"
            raise BadValue(f"there is no form field {quote_value(field.name)}; {advice}", field.name)
        if field.name in files:
            raise BadValue(f"{field.name} was sent more than once; send one table", field.name)
        files[field.name] = (f"file {field.filename}", field.content)
    if "file" not in files:
        raise BadValue("file is missing; send a table", "file")
    return files


def _read(files: dict[str, tuple[str, bytes]], query: TableQuery, card: Card, limits: Limits, limit: int) -> ReadTable:
    """Read the series of a table. Raises BadValue, NotInstalled and TooLarge."""
    try:
        from app.tables.forecast import series_of
        from app.tables.read import read
    except ModuleNotFoundError as error:
        raise NotInstalled(
            "this service cannot read tables; install the reader with pip install '.[tables]'"
        ) from error
    traits = card.series or SeriesTraits(season=None)
    names = traits.known.named if traits.known else []
    season, max_cells = traits.season or 1, CELLS_PER_VALUE * limits.max_series_values
    usual = season if season > 1 else min(DEFAULT_HORIZON, limits.max_horizon)
    horizon = query.horizon or (None if names else usual)
    name, content = files["file"]
    try:
        content = _plain(content, limit)
        table = read(content, "series", query, names, max_cells)
        if (count := table.frame["unique_id"].nunique()) > limits.max_series:
            raise BadValue(f"the table has {count:,} series; the maximum is {limits.max_series}", "file")
        if "future" in files:
            name, content = files["future"]
            content = _plain(content, limit)
        future = {
            each: read(content, name, query.model_copy(update={"column": [each]}), max_cells=max_cells)
            for each in names
        }
        series = list(series_of(table, future, horizon))
        if len({len(each.steps) for each in series}) > 1:
            series = list(series_of(table, future, min(len(each.steps) for each in series)))
    except (ValueError, OverflowError) as error:  # ValueError: an error of pandas for an unusual option
        known = error if isinstance(error, TableError) else TableError(str(error))
        text = spelled(known.message, _parameter)
        raise BadValue(f"{quote_value(name)[1:-1]}: {text}", known.option or "file") from error
    return ReadTable(series, table.step, [spelled(remark, _parameter) for remark in table.remarks])


def _parameter(name: str, *values: str) -> str:
    """Spell an option of the reader as query parameters, such as ``missing=-999&missing=closed``."""
    return "&".join(f"{name}={value}" for value in values) or ("by_rows=true" if name == "by_rows" else name)


def _plain(content: bytes, limit: int) -> bytes:
    """Return a file without compression. Raises BadValue for other formats, and TooLarge above ``limit`` bytes."""
    if content.startswith(OTHER_FILES):
        raise BadValue("the file is compressed or Parquet; send CSV or .xlsx", "file")
    if not content.startswith(b"PK\x03\x04"):
        return content
    result = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(result, "w") as plain:
            for member in archive.infolist():
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise BadValue("the .xlsx file has an unusual compression; save it again", "file")
                with archive.open(member) as file:
                    part = file.read(limit + 1)
                limit -= len(part)
                if limit < 0:
                    raise TooLarge("the .xlsx file has too many cells", "file")
                plain.writestr(member.filename, part)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
        raise BadValue(f"the .xlsx file is damaged or encrypted: {error}", "file") from error
    return result.getvalue()
