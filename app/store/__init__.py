"""Read and write ``models_store/``: cards, weights, rollouts and archives. Pickle files are never loaded.

``app.store.version`` needs torch. The other modules do not import torch, because many commands read only cards.
"""

from app.store.card import (
    CARD,
    INT64_LIMIT,
    UNKNOWN_CHARACTER,
    Card,
    HolidayCalendar,
    Int64,
    KnownCovariate,
    KnownCovariates,
    Metric,
    ModelName,
    SeriesTraits,
    Speed,
    StoreError,
    StrictModel,
    TaskName,
    TensorSpec,
    VersionNotFound,
    VersionNumber,
    card_text,
    check_name,
    parse_card,
    shorten,
)
from app.store.rollout import LATEST, Canary, Roles, Rollout
from app.store.store import WEIGHTS, Check, RolloutRefused, Store

__all__ = [
    "CARD",
    "INT64_LIMIT",
    "LATEST",
    "UNKNOWN_CHARACTER",
    "WEIGHTS",
    "Canary",
    "Card",
    "Check",
    "HolidayCalendar",
    "Int64",
    "KnownCovariate",
    "KnownCovariates",
    "Metric",
    "ModelName",
    "Roles",
    "Rollout",
    "RolloutRefused",
    "SeriesTraits",
    "Speed",
    "Store",
    "StoreError",
    "StrictModel",
    "TaskName",
    "TensorSpec",
    "VersionNotFound",
    "VersionNumber",
    "card_text",
    "check_name",
    "parse_card",
    "shorten",
]
