"""Requests and runs must fulfil the conditions that ``torch.export`` states for the sizes of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.imported.programs import export
from torch import Tensor, nn
from torch.export import Dim

from app import store
from app.errors import BadValue
from app.importing.add import Description, add
from app.importing.pt2_graph import BadProgram, InputSpec
from app.importing.pt2_guards import read_guards
from app.networks.imported import ImportedSizes
from app.networks.imported.guards import MAX_CHARACTERS, read_guard
from app.store import Card
from app.tasks import TASKS

Function = Callable[..., Tensor]
AUTO = {0: Dim.AUTO, 1: Dim.AUTO}
NAMED = {0: Dim("batch", max=64), 1: Dim("length", max=100)}


class Computes(nn.Module):
    """A network that computes one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ComputesTwo(Computes):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(x, y)


def median(x: Tensor) -> Tensor:
    count, x = x.shape[1], x.sort(1).values
    return (x[:, count // 2 - 1] + x[:, count // 2]) / 2 if count % 2 == 0 else x[:, count // 2]


@pytest.fixture
def add_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Card]:
    def add_network(network: nn.Module, *inputs: Tensor, sizes: Any, **options: Any) -> Card:
        monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
        (tmp_path / "net.pt2").write_bytes(export(network, *inputs, sizes=sizes, **options))
        return add(tmp_path / "store", tmp_path / "net.pt2", Description("net"), 2**24)

    return add_network


def result(folder: Path, *inputs: Tensor) -> list[Any]:
    """Return the output of the imported network. Raises BadValue if it does not accept the inputs."""
    predictor: Any = TASKS["infer"].load(store.read_version(folder / "store", "net", 1), torch.device("cpu"))
    item = predictor.parse_tensors(dict(zip(predictor.inputs, (each.numpy() for each in inputs), strict=True)))
    (output,) = predictor.predict([item])[0].values()
    return output.tolist()


@pytest.mark.parametrize(
    ("function", "sizes", "batched", "right", "wrong", "message"),
    [
        (median, AUTO, True, torch.ones(1, 4), torch.ones(1, 3), r"\[1, 3\], expected x\.shape\[1\] % 2 == 0"),
        (
            lambda x: x * 2 if x.shape[0] * x.shape[1] > 10 else x,  # so rows affect each other
            NAMED,
            False,
            torch.ones(4, 3),
            torch.ones(1, 3),
            r"\[1, 3\], expected x\.shape\[1\] \* x\.shape\[0\] > 10",
        ),
    ],
    ids=["even", "rows"],
)
def test_other_sizes_than_the_program_was_traced_for_are_rejected(
    function: Function,
    sizes: Any,
    batched: bool,
    right: Tensor,
    wrong: Tensor,
    message: str,
    add_network: Callable[..., Card],
    tmp_path: Path,
) -> None:
    assert add_network(Computes(function), torch.ones(2, 12), sizes={"x": sizes}).sizes["batched"] is batched
    assert result(tmp_path, right) == function(right).tolist()
    with pytest.raises(BadValue, match=message):
        result(tmp_path, wrong)


def test_the_import_finds_sizes_that_fulfil_the_guards(add_network: Callable[..., Card], tmp_path: Path) -> None:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return x[:, : y.shape[1]] + y if x.shape[1] > y.shape[1] + 3 else y

    rows = Dim("rows", max=64)
    sizes = {"x": {0: rows, 1: Dim("m", min=6, max=50)}, "y": {0: rows, 1: Dim("n", max=46)}}
    card = add_network(ComputesTwo(compute), torch.ones(2, 9), torch.ones(2, 4), sizes=sizes)
    shapes = ImportedSizes(**card.sizes).dummy_shapes(2)
    assert (card.sizes["batched"], shapes["x"][1] > shapes["y"][1] + 3) == (True, True)
    assert result(tmp_path, torch.ones(1, 6), torch.ones(1, 2)) == [[2, 2]]
    with pytest.raises(BadValue, match=r"expected .*y\.shape\[1\]"):
        result(tmp_path, torch.ones(1, 6), torch.ones(1, 3))


def test_conditions_in_the_graph_are_checked_too(add_network: Callable[..., Card], tmp_path: Path) -> None:
    options = {"prefer_deferred_runtime_asserts_over_guards": True}
    add_network(Computes(median), torch.ones(2, 12), sizes={"x": AUTO}, **options)
    assert result(tmp_path, torch.ones(1, 4)) == [1]
    with pytest.raises(BadValue, match="the program does not allow these sizes: Runtime assertion failed"):
        result(tmp_path, torch.ones(1, 3))


def test_guards_of_torch_are_read() -> None:
    inputs = [InputSpec("x", "float32", ("n", "m", 3)), InputSpec("batch_Mask_0", "float32", ("n", "k"))]
    texts = [
        "L['x'].size()[0] == L['batch']['Mask'][0].size()[0]",  # both sizes have the same name
        "L['x'].size()[2] == 3",
        "math.trunc(0.5*torch.sym_float(L['x'].size()[1])) >= 2 and not (L['x'].size()[1] < 3)",
        "(L['batch']['Mask'][0].size()[1] % (L['x'].size()[1] // 4)) == 0 or max(1, L['x'].size()[1]) > 20",
        "torch.sym_float(L['x'].size()[1]) ** 0.5 > 3.0",
    ]
    guards = read_guards(texts, inputs)
    assert guards[1:] == [
        "batch_Mask_0.shape[1] % (x.shape[1] // 4) == 0 or max(1, x.shape[1]) > 20",
        "torch.sym_float(x.shape[1]) ** 0.5 > 3.0",
    ]

    def held(m: int, k: int) -> list[bool]:
        return [read_guard(guard).holds({"x": (1, m, 3), "batch_Mask_0": (1, k)}) for guard in guards]

    assert held(8, 6) == [True, True, False]
    assert held(9, 7) == [True, False, False]
    assert held(3, 7) == [False, False, False]  # 7 % (3 // 4) has no value
    assert held(10, 6) == [True, True, True]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "L['x'].size()[0].__class__ == 1",
        "L['x'].size()[0] == 'a'",
        "(lambda: 1)() == L['x'].size()[0]",
        "[1 for _ in L['x'].size()] == []",
        "math.factorial(L['x'].size()[0]) > 1",
        "max(L['x'].size()[0], default=1) > 1",
        "1 << L['x'].size()[0] > 1",
        "L['y'].size()[0] > 1",
        "L['x'].size()[1] > 1",
        "L['x'].stride()[0] > 1",
        "L[x].size()[0] > 1",
        "L['x'].size()[0] >",
        "1 == 2",
        "-" * 200 + "L['x'].size()[0]",
        "(" * 3000 + "1" + ")" * 3000,
        "1" * (MAX_CHARACTERS + 1),
    ],
)
def test_other_texts_are_no_guards(text: str) -> None:
    with pytest.raises(BadProgram, match="condition"):
        read_guards([text], [InputSpec("x", "float32", ("n",))])


@pytest.mark.parametrize("text", ["x.shape[0] ** 64 ** 3 > 1", "10 ** 60 ** x.shape[0] > 1", "1 // (x.shape[0] - 9)"])
def test_a_guard_without_a_value_is_broken(text: str) -> None:
    assert not read_guard(text).holds({"x": (9,)})


@pytest.mark.parametrize("guards", [["x.shape[2] > 1"], ["y.shape[0] > 1"], ["import os"], [1], 1, ["1 == 1"]])
def test_a_card_has_only_valid_guards(guards: Any) -> None:
    with pytest.raises(TypeError, match=r"guard|object|condition"):
        ImportedSizes({"x": [1, "n"]}, {}, batched=False, max_rows=1, guards=guards)
    assert ImportedSizes({"x": [1, "n"]}, {}, batched=False, max_rows=1).guards == []  # as on older cards
