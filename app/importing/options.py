"""The options of an import, for the command line and the admin API. This module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.store import ModelName

Task = Literal["infer", "classify"]
Interpolation = Literal["bilinear", "bicubic"]


class AddOptions(BaseModel):
    """What the file of a network does not contain. Commas separate list items, except in ``labels``."""

    model_config = ConfigDict(defer_build=True)  # most commands do not need the class

    name: ModelName | None = Field(None, description="name of the model", examples=["resnet"])
    title: str | None = Field(None, max_length=1000, description="one sentence about the model")
    licence: str | None = Field(None, max_length=1000, description="licence of the network")
    source: str | None = Field(None, max_length=1000, description="where the network comes from")
    task: Task = Field(
        "infer",
        description="task of the network besides tensor requests under `/v2`. `infer` means no other task.",
    )
    labels: str | None = Field(None, description="for `classify`: the labels, one per line")
    size: int | None = Field(None, description="for `classify`: height and width of the input images in pixels")
    resize: int | None = Field(
        None,
        description="for `classify`: length to which the shorter side is scaled before the centre is cropped",
    )
    interpolation: Interpolation | None = Field(None, description="for `classify`: filter with which images are scaled")
    mean: str | None = Field(None, description="for `classify`: mean of each channel, for pixels from 0 to 1")
    std: str | None = Field(None, description="for `classify`: standard deviation of each channel")
    softmax: bool = Field(True, description="for `classify`: whether the network returns logits")
    input: str | None = Field(None, description="for `classify`: name of the input tensor")
    output: str | None = Field(None, description="for `classify`: name of the output tensor")
