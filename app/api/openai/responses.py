"""Response schemas of the OpenAI-compatible endpoints, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.api.responses import ResponseModel


class CompletionLogprobs(ResponseModel):
    """Log-probabilities. Each list has one entry for each character of the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionText(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["length", "stop"] | None = Field(description="null in a stream until the text ends")


class CompletionUsage(ResponseModel):
    prompt_tokens: int = Field(description="number of characters of the prompts, or bytes if the network reads bytes")
    completion_tokens: int = Field(description="the same for the generated texts")
    total_tokens: int


class Completion(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Unix time in seconds")
    model: str
    system_fingerprint: str = Field(description="`name@version` of the model")
    choices: list[CompletionText] = Field(description="the `n` texts of each prompt")
    usage: CompletionUsage | None = Field(None, description="left out of a stream without `include_usage`")


class ImageData(ResponseModel):
    b64_json: str = Field(description="PNG file in base64")
    revised_prompt: str | None = Field(None, description="the label of the image; left out for models without labels")


class ImageGenerationResponse(ResponseModel):
    created: int = Field(description="Unix time in seconds")
    data: list[ImageData]
    size: str = Field(description="width and height in pixels, such as `28x28`")
    output_format: Literal["png"]
    background: Literal["opaque"]
    model: str
    version: int
    seed: int
