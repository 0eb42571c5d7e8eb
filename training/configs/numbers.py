"""The types of hyperparameters and of options, which pydantic checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Described(BaseModel):
    """A class whose fields are options or numbers of a command. The text below a field is its help.

    An option of the type ``bool | None`` has two forms, such as --refit and --no-refit. A ``bool`` that is True by
    default has only the second.
    """

    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True)
