"""Exported programs may call common operators whose result has a known size and depends on their arguments only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.imported.programs import export
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from app import store
from app.importing.add import Description, add
from app.networks.imported.operators import find_operator


class Computes(nn.Module):
    """A network that computes one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "network",
    [
        Computes(lambda x: x * torch.vdot(x[0], x[1])),
        Computes(lambda x: torch.diff(x, dim=1)),
        Computes(lambda x: torch.cross(x, x.flip(0), dim=1)),
        Computes(lambda x: torch.linalg.cross(x, x.flip(0))),
        Computes(lambda x: torch.heaviside(x, torch.ones(()))),
        Computes(lambda x: x * torch.hann_window(3)),
        Computes(lambda x: x * torch.hann_window(3, periodic=False)),
        parametrizations.spectral_norm(nn.Linear(3, 4)),
        parametrizations.weight_norm(nn.Linear(3, 4)),
        parametrizations.weight_norm(nn.Linear(3, 4), dim=1),
        parametrizations.weight_norm(nn.Linear(3, 4), dim=-1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_an_imported_operator_gives_the_result_of_torch(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    x = torch.randn(2, 3)
    (tmp_path / "net.pt2").write_bytes(export(network, x))
    (spec,) = add(tmp_path / "store", tmp_path / "net.pt2", Description("net"), 2**24).inputs
    stored = store.read_version(tmp_path / "store", "net", 1).network()
    (output,) = stored.run({spec.name: x.numpy()}).values()
    with torch.inference_mode():
        np.testing.assert_allclose(output, network(x).numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["div", "div_", "divide", "divide_"])
def test_an_overflow_of_a_division_is_an_error(name: str, dtype: torch.dtype) -> None:
    """The operator of torch itself ends the process."""
    low = torch.iinfo(dtype).min
    for overload, divisor in (("Tensor_mode", torch.tensor([-1, 2], dtype=dtype)), ("Scalar_mode", -1)):
        divide = find_operator(f"aten.{name}.{overload}")
        with pytest.raises(ValueError, match=f"the smallest {str(dtype).removeprefix('torch.')} was divided by -1"):
            divide(torch.tensor([low, 7], dtype=dtype), divisor, rounding_mode="trunc")
        halves = divide(torch.tensor([low + 1, 7], dtype=dtype), divisor, rounding_mode="trunc")
        assert halves.tolist() == [-low - 1, 3 if overload == "Tensor_mode" else -7]


def test_a_weight_norm_does_not_read_beyond_its_gains() -> None:
    """The operator of torch itself reads beyond the end of ``g``, and crashes the process."""
    compute = find_operator("aten._weight_norm.default")
    with pytest.raises(RuntimeError, match="must match the size"):
        compute(torch.ones(4000, 3), torch.ones(2, 1), 0)
    assert compute(torch.ones(4000, 4), torch.ones(1, 1), 0).unique().tolist() == [0.5]
