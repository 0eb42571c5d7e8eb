"""Convolutions with Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loops import winograd
from training.loops.winograd import Winograd


@pytest.fixture
def compiled() -> None:
    if winograd.library() is None:
        pytest.skip("no C compiler")


def convolution(images: int, channels: int, filters: int, height: int, width: int) -> tuple[Tensor, nn.Conv2d]:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    return torch.randn(images, channels, height, width).requires_grad_(), layer


def results(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of a sum of it with random factors."""
    y = layer(x)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, layer.weight), factors)]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "shape", [(3, 64, 72, 15, 15), (5, 64, 64, 7, 9), (2, 64, 8, 3, 3), (1, 72, 64, 1, 1), (64, 64, 64, 16, 12)]
)
def test_outputs_and_gradients_are_those_of_a_convolution(shape: tuple[int, int, int, int, int]) -> None:
    x, layer = convolution(*shape)
    with Winograd():
        computed = results(layer, x)
    assert type(computed[0].grad_fn).__name__ == "_ConvolutionBackward"
    expected = results(layer.double(), x.detach().double().requires_grad_())
    for value, correct in zip(computed, expected, strict=True):
        assert value.shape == correct.shape
        assert (value - correct).abs().max() < 5e-5 * correct.abs().max()


@pytest.mark.usefixtures("compiled")
def test_a_large_batch_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = convolution(7, 64, 64, 15, 15)
    with Winograd():
        whole = results(layer, x)
        monkeypatch.setattr(winograd, "WORKSPACE", 4 * 36 * 16 * 128 * 3)  # three images, or two with gradients
        parts = results(layer, x)
    for value, correct in zip(parts, whole, strict=True):
        torch.testing.assert_close(value, correct, rtol=1e-4, atol=1e-4 * correct.abs().max().item())


def test_other_convolutions_do_not_change() -> None:
    x, layer = convolution(2, 64, 64, 5, 5)
    others = [
        (nn.Conv2d(64, 64, 3, padding=1), x),
        (nn.Conv2d(64, 64, 3, bias=False), x),
        (nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False), x),
        (nn.Conv2d(64, 60, 3, padding=1, bias=False), x),
        (nn.Conv2d(64, 64, 3, padding=1, groups=8, bias=False), x),
        (nn.Conv2d(64, 64, 3, padding=1, bias=False).double(), x.double()),
        (nn.Conv2d(64, 64, 5, padding=2, bias=False), x),
        (layer, x.detach()),
    ]
    with torch.autocast("cpu", torch.bfloat16), Winograd():
        assert layer(x).dtype == torch.bfloat16
    for other, images in others:
        with Winograd():
            computed = other(images)
        assert torch.equal(computed, other(images))
        assert type(computed.grad_fn).__name__ != "_ConvolutionBackward"


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    winograd.library.cache_clear()
    yield
    winograd.library.cache_clear()


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_nothing_changes() -> None:
    x, layer = convolution(2, 64, 64, 5, 5)
    with Winograd():
        computed = layer(x)
    assert winograd.library() is None
    assert torch.equal(computed, layer(x))


@pytest.mark.usefixtures("without_compiler")
def test_with_a_compiler_that_fails_nothing_changes(tmp_path: Path) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    assert winograd.library() is None
