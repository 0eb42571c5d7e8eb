"""Read and write ``models_store/``: cards, weights, rollouts and archives. Pickle files are never loaded.

``app.store.version`` needs torch. The other modules do not import torch, because many commands read only cards.
"""

from app.store.card import (
    CARD,
    UNKNOWN_CHARACTER,
    Ancestor,
    Card,
    HolidayCalendar,
    Int64,
    KnownCovariate,
    KnownCovariates,
    Metric,
    ModelName,
    Reading,
    SeriesTraits,
    Speed,
    StoreError,
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
