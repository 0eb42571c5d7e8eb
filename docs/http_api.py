"""Write the reference of the HTTP API from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from app.main import create_app
from app.settings import Settings
from docs.markdown import code, sentence, table

LONGEST_EXAMPLE = 400  # characters; longer examples are only in the OpenAPI document
LARGE = 1e18  # larger numbers are written with an exponent
Schema = dict[str, Any]

HEAD = """# HTTP API

`make docs` generates this page from the OpenAPI document. A running service shows the same content at `/docs`, and
serves the document at `/openapi.json`. [Calling the service](../how-to/clients.md) shows examples. [Errors](errors.md)
lists all error codes.

- The admin endpoints exist only if the service has an [admin key](../how-to/rollout.md#over-http).
- Under `/v2`, `/v2/models/{name}/versions/{number}/...` is the same as `/v2/models/{name}/...`, but for a certain
  version.
- Requests may have the headers `x-request-timeout` (time limit in seconds; not under `/v1/admin`), `x-request-id` and
  `traceparent`. With [API keys](../how-to/keys.md), they need `Authorization: Bearer KEY` or `x-api-key: KEY`.
- Responses have the header `x-request-id`. Responses with status 429 or 503 also have `Retry-After`, except failed
  health checks.
- Streams of text have the header `x-model`, and pictures of generated images have the headers `x-model` and `x-seed`.
  `x-model` is the model that computed the response, as `name@version`. `x-seed` is the seed of the images.
- A client must keep its side of the connection open until it has the response. A client that closes its side after the
  request, as `nc -N` does, may get no response.
- Limits such as "at most 4,000" follow from the default values of the [settings](settings.md).
"""


def openapi() -> Schema:
    """Return the OpenAPI document of a service that has an admin key."""
    document: Schema = create_app(Settings(admin_key=SecretStr("k" * 32))).openapi()
    return document


def page() -> str:
    document = openapi()
    groups: dict[str, list[str]] = {}
    overview = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            group = operation["tags"][0]
            groups.setdefault(group, []).append(f"\n### {name}\n\n" + "".join(describe(operation, document)))
            overview.append((f"[`{name}`](#{anchor(name)})", operation["summary"]))
    overview += [("`GET /`", "The web page"), ("`GET /docs`", "Swagger UI")]
    parts = [HEAD, "\n", table(("endpoint", "purpose"), overview)]
    for group, sections in groups.items():
        parts += [f"\n## {group[0].upper()}{group[1:]}\n", *sections]
    return "".join(parts)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    characters = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return characters.replace(" ", "-")


def describe(operation: Schema, document: Schema) -> Iterator[str]:
    """Yield the description, parameters, body and responses of one operation."""
    if operation.get("description"):
        yield f"{operation['description'].strip()}\n"
    # The head of the page describes the parameters that operations share.
    if parameters := [parameter for parameter in operation.get("parameters", []) if "$ref" not in parameter]:
        rows = [
            (
                code(parameter["name"]),
                parameter["in"],
                kind(parameter["schema"], document),
                "required" if parameter.get("required") else shown(parameter["schema"].get("default")),
                parameter.get("description") or parameter["schema"].get("description", ""),
            )
            for parameter in parameters
        ]
        yield "\n" + table(("parameter", "in", "type", "default", "description"), rows)
    if body := operation.get("requestBody"):
        yield from describe_body(body["content"], document)
    responses = [
        (status, "; ".join(response_types(response, document)), response.get("description", ""))
        for status, response in operation["responses"].items()
    ]
    yield "\n" + table(("status", "body", "description"), responses)
    described = {"ErrorBody", "InferenceError"}
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            schema = resolve(content.get("schema", {}), document)
            title = schema.get("title", "the answer")
            if schema.get("properties") and title not in described:
                described.add(title)
                yield f"\nFields of `{title}`:\n\n" + fields(schema, document)


def describe_body(content: Schema, document: Schema) -> Iterator[str]:
    for media, media_type in content.items():
        schema = resolve(media_type.get("schema", {}), document)
        yield f"\nBody `{media}`"
        described = sentence(schema.get("description"))
        yield f": {described}\n" if described else "\n"
        if schema.get("properties"):
            yield "\n" + fields(schema, document)
        text = json.dumps(media_type.get("example"), ensure_ascii=False)
        if "example" in media_type and len(text) <= LONGEST_EXAMPLE:
            yield f"\n```json\n{text}\n```\n"


def response_types(response: Schema, document: Schema) -> Iterator[str]:
    for media, content in response.get("content", {}).items():
        title = resolve(content.get("schema", {}), document).get("title", "")
        yield code(media) + (f" {code(title)}" if title and " " not in title else "")


def resolve(schema: Schema, document: Schema) -> Schema:
    """Return the schema that a reference refers to. Return any other schema unchanged."""
    while "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def fields(schema: Schema, document: Schema) -> str:
    """Return a table of the fields of an object. Fields of nested objects have names such as ``outer.inner``."""
    rows = list(field_rows(schema, document, ""))
    headers = ("field", "type", "default", "description")
    return table(headers, rows)


def field_rows(schema: Schema, document: Schema, prefix: str, depth: int = 0) -> Iterator[tuple[str, ...]]:
    required = schema.get("required", ())
    for name, own in schema["properties"].items():
        field = resolve(own, document)
        default = "required" if name in required else shown(field.get("default"))
        own_kind = (kind_or_null if name in required else kind)(field, document)
        yield code(prefix + name), own_kind, default, field.get("description", "")
        inner, mark = nested(field, document)
        if inner and depth < 3:
            yield from field_rows(inner, document, f"{prefix}{name}{mark}.", depth + 1)


def shown(value: Any) -> str:
    return "" if value is None else code(json.dumps(value, ensure_ascii=False))


def nested(field: Schema, document: Schema) -> tuple[Schema | None, str]:
    """Return two values: the schema of the object in a field; "[]" if the field is a list of objects, otherwise "".

    If the field contains no object, the schema is None.
    """
    for choice in (field, *(resolve(option, document) for option in field.get("anyOf", ()))):
        if choice.get("properties"):
            return choice, ""
        if choice.get("type") == "array" and resolve(choice.get("items", {}), document).get("properties"):
            return resolve(choice["items"], document), "[]"
    return None, ""


LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


def kind(schema: Schema, document: Schema) -> str:
    """Return the type of a schema as a text for readers, such as ``array of string``."""
    schema = resolve(schema, document)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        words = [kind(choice, document) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "enum" in schema:
        return ", ".join(code(json.dumps(choice)) for choice in schema["enum"])
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    name = schema.get("type", "any")
    if name == "array":
        item = kind_or_null(schema.get("items", {}), document)
        name = f"array of ({item})" if item.endswith(" or null") else f"array of {item}"
    limits = [text.format(number(schema[key])) for key, text in LIMITS.items() if key in schema]
    return f"{name} ({', '.join(limits)})" if limits else str(name)


def kind_or_null(schema: Schema, document: Schema) -> str:
    """Return ``kind``, followed by "or null" if the value can be null.

    A field that is not required needs no such note: instead of null, it can be left out.
    """
    nullable = any(choice.get("type") == "null" for choice in resolve(schema, document).get("anyOf", ()))
    return f"{kind(schema, document)} or null" if nullable else kind(schema, document)


def number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < LARGE else f"{value:g}"
