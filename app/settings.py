"""The settings of the service, which are environment variables with the prefix ``QUARTET_``.

If a variable is invalid, the error message contains its name.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.limits import Limits

PREFIX = "QUARTET_"
OTHER_VARIABLES = {"QUARTET_DATA_DIR", "QUARTET_TRAINING_LIMITS"}  # read by training/
# Kubernetes sets variables such as X_SERVICE_HOST, X_PORT and X_PORT_80_TCP_ADDR for a Service with the name x.
KUBERNETES_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?$")

Count = Annotated[int, Field(ge=1, le=10**12)]  # pydantic and torch cannot use much larger numbers
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _not_empty(path: Any) -> Any:
    if path == "":  # would otherwise be the working directory
        raise PydanticCustomError("empty_path", "the path should not be empty")
    return path


FilePath = Annotated[Path, BeforeValidator(_not_empty)]


class SettingsError(SystemExit):
    """The service cannot start with these settings.

    This error is a SystemExit, so the process ends with its message and without a traceback.
    """


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 chooses a free port")
    store: FilePath = Field(Path("models_store"), description="folder of the model store")
    store_poll_seconds: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds between two scans of the store. 0 means only one scan, at start-up. Then the service does "
        "not try again to load versions that could not be loaded, and versions without requests stay in memory.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$",
        description="device of the networks: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the first GPU, or the CPU if "
        "there is no GPU.",
    )
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="number of worker processes. 0 means one worker for each CPU core, or for each `QUARTET_THREADS` "
        "cores if that is set, but at most 16 workers, and only as many as fit into half of the memory of the machine, "
        "container or systemd unit. With a GPU, there is always one worker.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="number of CPU threads per computation. 0 means the number of cores divided by the number of "
        "workers.",
    )
    tta: bool = Field(
        False,
        description="test-time augmentation: classify shifted and mirrored copies of each image and average the "
        "results, for networks that support it. The results are more accurate, but take more time.",
    )
    log_level: str = Field(
        "info",
        pattern="^(debug|info|warning|error)$",
        description="lowest level that is logged: `debug`, `info`, `warning` or `error`",
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="format of the log lines: `text` or `json`")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL of an OTLP collector for traces, such as `http://localhost:4318`. Empty means no traces.",
    )

    admin_key: SecretStr | None = Field(
        None,
        description="key for `/v1/admin`, and for loading and unloading models under `/v2/repository/models`. Without "
        "a key, `/v1/admin` does not exist, and loading and unloading return status 403.",
    )
    admin_key_file: FilePath | None = Field(
        None, description="file that contains the admin key, instead of `QUARTET_ADMIN_KEY`"
    )

    records_folder: FilePath | None = Field(
        None, description="folder of captured requests, feedback and batch jobs. Without it, there are none of them."
    )
    records_url: str = Field(
        "",
        pattern="^(postgres(ql)?://.+)?$",
        description="PostgreSQL database of the records, such as `postgresql://user:password@host/name`, for several "
        "replicas, which share the folder, too. Empty means an SQLite file in the folder.",
    )
    capture: str = Field(
        "",
        description="models whose requests and answers are captured, with the share in per cent: `sales:20,pets`. "
        "Empty means that nothing is captured. `QUARTET_RECORDS_FOLDER` must be set, too.",
    )

    keys_file: FilePath | None = Field(
        None, description="file of API keys, made with `quartet keys`. Without a file, no key is required."
    )
    rate_limit: str = Field(
        "",
        description="rate limit such as `600/minute` or `600/minute;20/second`. It applies to each key without its own "
        "limit, separately. Keys with the same name are counted together. Empty means no limit.",
    )
    rate_limit_storage: str = Field(
        "memory",
        pattern="^(memory|rediss?://.+)$",
        description="storage of the request counts: `memory`, or a `redis://` URL to share the counts between machines",
    )
    cors_origins: str = Field(
        "",
        description="CORS origins whose web pages may call the service, separated by commas, such as `https://a.b` or "
        "`https://a.b:8443`, or `*` for all origins. Wildcards within an origin are not allowed. Empty means that only "
        "pages of the same origin may call the service.",
    )
    trusted_hosts: str = Field(
        "",
        description="further host names that the `Host` header of a request may contain, separated by commas: `a.b`, "
        "`*.a.b` for subdomains, or `*` for all names. IP addresses, local names and the machine's own name are always "
        "allowed. Empty means no further names, or all names if the service requires API keys or uses TLS.",
    )
    tls_cert: FilePath | None = Field(
        None, description="PEM file of the TLS certificate chain. If this is set, the service uses HTTPS."
    )
    tls_key: FilePath | None = Field(None, description="PEM file of the private key of `QUARTET_TLS_CERT`")

    max_body_bytes: Count = Field(
        32 * 2**20,
        description="largest size of a request body in bytes, at most `QUARTET_MAX_BUFFERED_BYTES`. Bodies without "
        "images have lower limits.",
    )
    max_buffered_bytes: Count = Field(
        256 * 2**20,
        description="bytes that all running requests of all workers together may hold in memory. Each worker gets an "
        "equal part, but at least `QUARTET_MAX_BODY_BYTES`. Three things count: request bodies, also after "
        "decompression; the prompts, random numbers and log-probabilities of texts; and responses of more than 64 KiB, "
        "until the clients have read them.",
    )
    request_seconds: Seconds = Field(
        60, description="seconds until a request times out. The header `x-request-timeout` can shorten this time."
    )
    keep_alive_seconds: Count = Field(
        5,
        description="seconds after which the service closes an idle connection. Behind a proxy that keeps idle "
        "connections open, this time must be longer than the idle time of the proxy.",
    )
    max_pixels: Count = Field(
        50_000_000,
        description="largest number of pixels per image, checked before decoding. Decoding takes up to 4 bytes of "
        "memory for each of these pixels. Formats that need more memory may have fewer pixels: a quarter for WebP, two "
        "thirds for progressive JPEG. With `explain`, the limit applies to all images of a request together.",
    )
    queue_rows: Count = Field(
        2048,
        description="largest number of rows that may wait in one queue, in all workers together. Further requests get "
        "status 429. Each version of a model has a queue. Explanations, tensors for imported text models, and bodies "
        "that wait for parsing have further queues.",
    )
    shutdown_grace_seconds: Seconds = Field(
        20,
        description="seconds that running requests may take during shutdown. After that, running computations may take "
        "the same time again.",
    )
    limits: Limits = Field(Limits(), description="JSON object that changes limits of `app/limits.py`")

    def __init__(self, **values: Any) -> None:
        known = {name.upper() for name in type(self).model_fields}
        for variable in os.environ:
            upper = variable.upper()  # pydantic also reads variables in lower case
            name = upper.removeprefix(PREFIX)
            is_known = variable == upper and (name in known or variable in OTHER_VARIABLES)
            if upper.startswith(PREFIX) and not is_known:
                if "KUBERNETES_SERVICE_HOST" in os.environ and KUBERNETES_VARIABLE.search(variable):
                    raise SettingsError(
                        f"{variable} is not a setting: Kubernetes sets it for a Service whose name begins with "
                        "quartet; set enableServiceLinks to false in the pod"
                    )
                if upper == variable and name.lower() in vars(Limits()):
                    content = f'{{"{name.lower()}": {os.environ[variable]}}}'
                    raise SettingsError(f"{variable} is now a limit; set {PREFIX}LIMITS='{content}' instead")
                close = difflib.get_close_matches(name, known, n=1)  # without the prefix, which all names share
                names = ", ".join(PREFIX + each for each in close or sorted(known))
                hint = f"did you mean {names}?" if close else f"known settings: {names}"
                raise SettingsError(f"{variable} is not a setting; {hint}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError("\n".join(_sentence(detail) for detail in error.errors())) from None
        if self.max_body_bytes > self.max_buffered_bytes:  # the largest bodies would always get status 429
            raise SettingsError(
                f"QUARTET_MAX_BODY_BYTES is {self.max_body_bytes}: the maximum is {self.max_buffered_bytes}, the value "
                "of QUARTET_MAX_BUFFERED_BYTES"
            )


def _sentence(detail: Any) -> str:
    variable = PREFIX + re.sub(r"^QUARTET_", "", str(detail["loc"][0]), flags=re.IGNORECASE).upper()
    return f"{variable} is {hide_password(repr(detail['input']))}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def hide_password(text: str) -> str:
    """Replace the user name and password of a URL in ``text`` with ``***``."""
    return re.sub("//.*@", "//***@", text)
