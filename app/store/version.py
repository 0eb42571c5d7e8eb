"""A version with its weights: reading, verifying, and building the network. Pickle files are never loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from app.networks import KINDS, Kind, build, is_imported
from app.store.card import CARD, Card, StoreError

WEIGHTS = "model.safetensors"
REPEATED = ("layers", "members")  # sizes that count modules; each module has its own weights


class SkipInit(TorchFunctionMode):
    """A mode of torch that skips the initialisation of weights.

    Tensors on the meta device have no values to initialise. Without this mode, torch would import its compiler to
    initialise them, which takes a second and 67 MiB per process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]  # torch passes the arguments of these functions by name
        return (torch.empty if func in (torch.zeros, torch.ones) else func)(*args, **kwargs)


@dataclass(frozen=True)
class Version:
    """A verified version. Its card is valid, and its weights have the hash on the card.

    The weights are finite, except those of imported networks, which may contain infinity and NaN.
    """

    folder: Path
    card: Card
    tensors: dict[str, Tensor]

    @property
    def label(self) -> str:
        """The version as ``name@version``, for error messages."""
        return f"{self.card.name}@{self.card.version}"

    def path_of(self, file: str) -> str:
        """Return ``name/version/file``, the path of a file in the store, for error messages."""
        return f"{self.card.name}/{self.card.version}/{file}"

    def network(self) -> Any:
        """Return the network with its weights, in evaluation mode.

        Raises:
            StoreError: the kind is unknown, the card has another task, or the weights do not fit the sizes.
        """
        card = self.card
        if card.kind not in KINDS:
            raise StoreError(f"{self.path_of(CARD)}: kind is {card.kind!r}, expected one of {', '.join(KINDS)}")
        kind = KINDS[card.kind]
        if is_imported(card.kind):
            return self._imported_network(kind)
        if card.task != kind.task:
            raise StoreError(f"{self.path_of(CARD)}: task is {card.task!r}, expected {kind.task!r}")
        # check these sizes against the weights first, because a network with large wrong sizes would take much memory
        for key in REPEATED:
            if isinstance(count := card.sizes.get(key), int) and count > len(self.tensors):
                raise StoreError(f"{self.path_of(CARD)}: {key} is {count}, and there are {len(self.tensors)} tensors")
        try:
            with torch.device("meta"), SkipInit():
                expected = {
                    key: tuple(tensor.shape) for key, tensor in build(card.kind, card.sizes).state_dict().items()
                }
        except Exception as error:  # torch and Python raise exceptions of many classes for wrong sizes
            raise StoreError(f"{self.path_of(CARD)}: sizes {card.sizes} do not make a {card.kind}: {error}") from error
        actual = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        for key in sorted(expected.keys() | actual.keys()):
            if expected.get(key) != actual.get(key):
                raise StoreError(
                    f"{self.path_of(WEIGHTS)}: tensor {key!r} has shape {actual.get(key, 'none: it is missing')}, "
                    f"expected {expected.get(key, 'no such tensor')}"
                )
        network = build(card.kind, card.sizes)
        network.load_state_dict(self.tensors)
        return network.eval().requires_grad_(False)

    def _imported_network(self, kind: Kind) -> Any:
        """Return an imported network. Raises StoreError if it is invalid."""
        try:
            kind.sizes(**self.card.sizes)
        except TypeError as error:
            raise StoreError(f"{self.path_of(CARD)}: sizes do not fit: {error}") from error
        try:
            return kind.network(self.tensors)
        except ValueError as error:
            raise StoreError(f"{self.path_of(WEIGHTS)}: {error}") from error


def decode_version(folder: Path, card: Card, weights: bytes) -> Version:
    """Verify the content of a weights file and return the version. Raises StoreError if it is invalid."""
    path = f"{card.name}/{card.version}/{WEIGHTS}"
    digest = hashlib.sha256(weights).hexdigest()
    if digest != card.weights_sha256:
        raise StoreError(f"{path}: sha256 is {digest}, expected {card.weights_sha256} as on the card")
    try:
        tensors = load(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch lacks
        raise StoreError(f"{path} is not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if is_imported(card.kind):  # an imported graph may mask values with infinity
            continue
        finite = torch.isfinite(tensor.float())  # float64 values that are too large for float32 are not finite here
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise StoreError(f"{path}: tensor {key!r} has {bad} non-finite values, expected none")
    return Version(folder, card, tensors)


def encode_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a weights file with these tensors."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the weights file that ``Store.publish`` would write."""
    return hashlib.sha256(encode_weights(tensors)).hexdigest()
