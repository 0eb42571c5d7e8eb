"""Every limit with its unit, from the environment. Wrong values are refused with the name of the variable."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "QUARTET_"
ELSEWHERE = {"QUARTET_DATA_DIR"}  # read by training/

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(SystemExit):
    """A setting that cannot be used. Ends the service with its sentence instead of a traceback."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    store: Path = Field(Path("models_store"), description="folder of the trained networks")
    store_poll_seconds: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="seconds between two looks at the store; 0: only at the start"
    )
    model_bytes: int = Field(
        0, ge=0, description="bytes of weights that a worker keeps in memory, where the defaults need no more; 0: any"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="processes that serve; 0: one for each core, as memory allows, up to 16; 1 on a GPU",
    )
    threads: int = Field(0, ge=0, description="threads of one computation on the CPU; 0: cores divided by workers")
    tta: bool = Field(False, description="look at each image several times, where the network can: surer and slower")
    parse_threads: Count = Field(2, description="images that are decoded at a time")
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="`debug`, `info`, `warning`, `error`"
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="`text` or `json`: lines of the log")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="address of an OTLP collector for traces, such as `http://localhost:4318`; empty: none",
    )

    admin_key: SecretStr | None = Field(None, description="key that opens `/v1/admin`; without one it does not exist")
    admin_key_file: Path | None = Field(None, description="file with that key, in place of the key itself")
    max_import_bytes: Count = Field(2 * 2**30, description="bytes of an archive that is imported, packed and unpacked")

    keys_file: Path | None = Field(None, description="file of API keys (`python -m app.keys`); none: open to all")
    rate_limit: str = Field("", description="requests that a key may send, such as `600/minute`; empty: any number")
    rate_limit_storage: str = Field(
        "memory", pattern="^(memory|rediss?://.+)$", description="where they are counted: `memory`, or a `redis://` URL"
    )
    cors_origins: str = Field(
        "", description="origins whose pages may call, with commas between, or `*`; empty: none but our own"
    )
    tls_cert: Path | None = Field(None, description="certificate chain in PEM: serve HTTPS")
    tls_key: Path | None = Field(None, description="its private key in PEM")

    max_body_bytes: Count = Field(32 * 2**20, description="bytes of a body; of one without images less is allowed")
    max_buffered_bytes: Count = Field(
        256 * 2**20, description="bytes that all bodies under way may hold, shared by the workers"
    )
    request_seconds: Seconds = Field(
        60, description="seconds that a request may take; `x-request-timeout` asks for less"
    )
    body_seconds: Seconds = Field(30, description="seconds that a body under way may pause")
    max_images: Count = Field(16, description="images in one request")
    max_pixels: Count = Field(
        50_000_000,
        description="pixels of one image, before it is decoded, and of all that are explained in one request",
    )
    max_prompt_characters: Count = Field(100_000, description="characters of a prompt")
    max_characters: Count = Field(4_000, description="characters to continue a text by")
    max_texts: Count = Field(16, description="continuations of one prompt (`n`)")
    max_series: Count = Field(64, description="series in one request")
    max_series_values: Count = Field(100_000, description="values of all series in one request")
    max_horizon: Count = Field(1_000, description="steps to forecast")
    max_samples: Count = Field(1_024, description="images to draw in one request")

    batch_rows: Count = Field(64, description="rows that are computed together")
    queue_rows: Count = Field(
        2048, description="rows that may wait for one model, shared by the workers; past that, 429"
    )
    max_running_texts: Count = Field(128, description="texts that are continued together, in one worker")
    inline_seconds: float = Field(
        0.004,
        ge=0,
        le=0.05,
        description="a batch that should take no longer is computed on the event loop itself; 0: none; texts, while "
        "others are refused, three times as long",
    )
    unready_after_seconds: Seconds = Field(
        5, description="seconds without an answer of an engine after which readiness is off"
    )
    liveness_timeout_seconds: float = Field(  # what it is told by comes ten times a second
        30, ge=0.3, allow_inf_nan=False, description="seconds without an answer after which an engine counts as hung"
    )
    shutdown_grace_seconds: Seconds = Field(20, description="seconds that running requests may take at shutdown")

    def __init__(self, **values: Any) -> None:
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        for variable in os.environ:
            if variable.startswith(PREFIX) and variable not in known | ELSEWHERE:
                close = difflib.get_close_matches(variable, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"
                raise SettingsError(f"{variable} is not a setting{hint}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError("\n".join(_sentence(detail) for detail in error.errors())) from None


def _sentence(detail: Any) -> str:
    variable = PREFIX + re.sub(r"^QUARTET_", "", str(detail["loc"][0]), flags=re.IGNORECASE).upper()
    return f"{variable} is {hide_password(repr(detail['input']))}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def hide_password(text: str) -> str:
    """A text without the name and the password that an address in it may have."""
    return re.sub("//.*@", "//***@", text)
