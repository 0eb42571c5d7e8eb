"""The content of a .pt2 file is never unpickled, evaluated or executed, and wrong files are rejected."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.imported.programs import edited, entries, export, export_cnn, pack
from torch import Tensor, nn

from app import store
from app.importing.add import Description, add
from app.importing.pt2_archive import GRAPH_FILE
from app.networks.imported.exported_program import GRAPH, ExportedProgram, graph_tensor
from app.store import StoreError

MAX_BYTES = 2**24
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Attack:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def cnn() -> bytes:
    return export_cnn()[1]


def rejected(tmp_path: Path, files: dict[str, bytes] | bytes, method: int = zipfile.ZIP_STORED) -> str:
    """Return the message with which a file is rejected."""
    path = tmp_path / "wrong.pt2"
    if isinstance(files, bytes):
        path.write_bytes(files)
    else:
        pack(path, files, method)
    with pytest.raises(StoreError) as caught:
        add(tmp_path / "store", path, Description("wrong"), MAX_BYTES)
    assert not (tmp_path / "store" / "wrong").exists()
    return str(caught.value)


def test_pickled_sample_inputs_are_never_read(cnn: bytes, tmp_path: Path) -> None:
    attack = pickle.dumps(Attack(tmp_path / "executed"))
    path = pack(tmp_path / "net.pt2", {**entries(cnn), "data/sample_inputs/model.pt": attack})
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    assert card.kind == "exported-program"
    assert not (tmp_path / "executed").exists()
    stored = store.read_version(tmp_path / "store", "net", 1).tensors
    assert sorted(stored) == ["conv.bias", "conv.weight", "fc.bias", "fc.weight", GRAPH]


def test_pickles_and_native_code_are_rejected(cnn: bytes, tmp_path: Path) -> None:
    attack = pickle.dumps(Attack(tmp_path / "executed"))

    def pickled(config: Any) -> None:
        config["config"]["fc.bias"]["use_pickle"] = True

    files = edited(cnn, WEIGHTS, pickled)
    name = json.loads(files[WEIGHTS])["config"]["fc.bias"]["path_name"]
    message = rejected(tmp_path, {**files, f"data/weights/{name}": attack})
    assert "'fc.bias' is a pickle, which is never loaded" in message
    for entry in ("data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/weights/model.pt"):
        assert "may be a pickle, which is never loaded" in rejected(tmp_path, {**entries(cnn), entry: attack})
    message = rejected(tmp_path, {**entries(cnn), "data/aotinductor/model/model.so": b"\x7fELF"})
    assert "is native code (AOTInductor), which is never loaded" in message
    assert "not allowed" in rejected(tmp_path, {**entries(cnn), "../../outside": b""})
    assert not (tmp_path / "executed").exists()
    assert "not an ONNX model" in rejected(tmp_path, attack)  # files that do not start like a zip archive
    assert "older torch" in rejected(tmp_path, {"serialized_exported_program.json": b"{}"})
    assert "it is a TorchScript file or a pickle of torch.save" in rejected(tmp_path, {"data.pkl": attack})


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.nonzero.default",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten.relu.out",
        "torch.ops.custom.op.default",
        "torch.ops.quantized.linear.default",
        "torch.ops.higher_order.while_loop",
        "torch.hub.load",
        "torch.load",
        "_operator.attrgetter",
        "_operator.pow",
        "math.comb",
        "builtins.eval",
        "#extension:op",
        "torch.ops.aten.__class__.default",
        "torch.ops.aten.add.__class__",
    ],
)
def test_only_known_operators_are_called(target: str, cnn: bytes, tmp_path: Path) -> None:
    def replace(program: Any) -> None:
        node = next(
            node for node in program["graph_module"]["graph"]["nodes"] if node["target"].endswith("relu.default")
        )
        node["target"] = target

    assert "is not" in rejected(tmp_path, edited(cnn, GRAPH_FILE, replace))


def test_texts_of_the_graph_are_not_evaluated(cnn: bytes, tmp_path: Path) -> None:
    code = f"__import__('os').mkdir({str(tmp_path / 'executed')!r})"

    def insert(program: Any, into_inputs: bool = False, guards: tuple[str, ...] = ()) -> None:
        graph = program["graph_module"]["graph"]
        for name, meta in graph["tensor_values"].items():
            for size in meta["sizes"]:
                if "as_expr" in size and (into_inputs or name != "image"):
                    size["as_expr"]["expr_str"] = code
        program["guards_code"] = list(guards)
        for node in graph["nodes"]:
            node["metadata"] = {"stack_trace": code, "source_fn_stack": code}

    files = edited(cnn, GRAPH_FILE, insert)
    assert add(tmp_path / "store", pack(tmp_path / "net.pt2", files), Description("net"), MAX_BYTES).sizes["batched"]
    files = edited(cnn, GRAPH_FILE, partial(insert, into_inputs=True))
    assert f"input 'image' has the size {code[:200]} in dimension 0" in rejected(tmp_path, files)
    files = edited(cnn, GRAPH_FILE, partial(insert, guards=(code,)))
    assert f"condition {code[:200]!r} cannot be read" in rejected(tmp_path, files)
    assert not (tmp_path / "executed").exists()


def test_sizes_are_checked_before_memory_is_allocated(cnn: bytes, tmp_path: Path) -> None:
    def sized(sizes: list[int], strides: list[int], offset: int = 0) -> Callable[[Any], None]:
        def change(config: Any) -> None:
            meta = config["config"]["fc.weight"]["tensor_meta"]
            meta["sizes"], meta["strides"] = ([{"as_int": each} for each in numbers] for numbers in (sizes, strides))
            meta["storage_offset"] = {"as_int": offset}

        return change

    change = edited(cnn, WEIGHTS, sized([2**40, 36], [0, 1]))
    assert "'fc.weight' exceeds the allowed" in rejected(tmp_path, change)
    assert "'fc.weight' needs" in rejected(tmp_path, edited(cnn, WEIGHTS, sized([3, 36], [36, 1], 1)))
    assert "'fc.weight' has the shape" in rejected(tmp_path, edited(cnn, WEIGHTS, sized([3, 36], [36, -1])))
    assert "is compressed" in rejected(tmp_path, {**entries(cnn), "extra/zeros": bytes(2**20)}, zipfile.ZIP_DEFLATED)
    assert "central directory" in rejected(tmp_path, {f"extra/{'x' * 60000}{i}": b"" for i in range(80)})
    path = tmp_path / "large.pt2"
    path.write_bytes(bytes(2000))
    with pytest.raises(StoreError, match="the maximum is 1,000"):
        add(tmp_path / "store", path, Description("large"), 1000)


def test_damaged_files_are_rejected(cnn: bytes, tmp_path: Path) -> None:
    files = entries(cnn)
    assert "schema_version" in rejected(
        tmp_path, edited(cnn, GRAPH_FILE, lambda each: each.update(schema_version={"major": 9}))
    )
    assert "not JSON" in rejected(tmp_path, {**files, GRAPH_FILE: b"{"})
    assert "not JSON" in rejected(tmp_path, {**files, GRAPH_FILE: b"[" * 100_000})
    assert "wrong entry" in rejected(tmp_path, {**files, GRAPH_FILE: b"[]"})
    assert "is missing" in rejected(tmp_path, {name: each for name, each in files.items() if name != CONSTANTS})
    assert "little" in rejected(tmp_path, {**files, "byteorder": b"big"})
    assert "not a .pt2 archive" in rejected(tmp_path, cnn[:-10])
    far = bytearray(pack(tmp_path / "far.pt2", files).read_bytes())
    far[-5:-3] = b"\xff\xff"  # the stated offset of the list of entries; those of the entries become negative
    assert "cannot be unpacked: its offset is outside the archive" in rejected(tmp_path, bytes(far))


def test_archives_of_other_kinds_are_rejected(cnn: bytes, tmp_path: Path) -> None:
    files = entries(cnn)
    message = rejected(tmp_path, {**files, "models/other.json": b"{}"})
    assert "entry 'models/other.json': a file with one program" in message
    message = rejected(tmp_path, {**files, "data/executorch/model.pte": b""})
    assert "entry 'data/executorch/model.pte' is for ExecuTorch" in message
    assert "entry 'archive_format' should be 'pt2'" in rejected(tmp_path, {**files, "archive_format": b"pt3"})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("root", "message"), [("model", "occurs twice"), ("other", "there is more than one root folder")]
)
def test_a_repeated_entry_or_a_second_root_folder_is_rejected(
    cnn: bytes, tmp_path: Path, root: str, message: str
) -> None:
    path = pack(tmp_path / "twice.pt2", entries(cnn))
    name = "archive_format" if root == "model" else "extra/notes"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/{name}", b"pt2")
    assert message in rejected(tmp_path, path.read_bytes())


class Fills(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.full([2**38], 1.0).sum()


class Averages(nn.Module):
    """A network whose result is one number, but whose operator compares 2**38 values to compute it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum().expand(2**19, 2**19).nanmean()[None]


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.dropout(x, 0.5, training=True)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1)
        return x + self.total


class Finds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x


class NamedLikeTheProgram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.graph


class Transforms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Fills(), "one run needs 1,099,511,6"),
        (Averages(), "bytes of memory; the maximum is"),
        (Draws(), "two runs on the same input differ"),
        (Counts(), "changes its own weights or buffers"),
        (Finds(), "the result size of 'aten.index.Tensor' is not known from shapes alone"),
        (Casts(), "blocks of torch.autocast are not supported"),
        (NamedLikeTheProgram(), "a weight has the name 'graph', which is reserved for the program; rename it"),
        (Transforms(), "output 'fft_rfft' is of type complex64; allowed types: bool, "),
    ],
)
def test_programs_that_cannot_be_served_are_rejected(module: nn.Module, message: str, tmp_path: Path) -> None:
    assert message in rejected(tmp_path, entries(export(module, torch.ones(2))))


class Normalises(nn.Module):
    """A network in training mode, which computes the mean and variance of the batch, and may store them."""

    def __init__(self, stores: bool) -> None:
        super().__init__()
        self.stores = stores
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            stored = (self.mean, self.variance) if self.stores else (None, None)
            return nn.functional.batch_norm(x, *stored, training=True)


def test_a_network_cannot_update_the_statistics_of_its_batch_normalisation(tmp_path: Path) -> None:
    sizes = {"x": {0: torch.export.Dim("rows", max=64)}}
    message = rejected(tmp_path, export(Normalises(stores=True), torch.ones(8, 3), sizes=sizes))
    assert message == "the network changes its own weights or buffers; export it in evaluation mode"
    (tmp_path / "net.pt2").write_bytes(export(Normalises(stores=False), torch.ones(8, 3), sizes=sizes))
    assert not add(tmp_path / "store", tmp_path / "net.pt2", Description("net"), MAX_BYTES).sizes["batched"]


def test_a_varying_size_is_a_name_or_a_multiple_of_a_name(tmp_path: Path) -> None:
    network = nn.Conv1d(2, 3, 3, stride=2)
    length = torch.export.Dim("length", min=2, max=100)
    content = export(network, torch.zeros(1, 2, 8), sizes={"input": {2: 4 * length}})
    (tmp_path / "net.pt2").write_bytes(content)
    assert add(tmp_path / "store", tmp_path / "net.pt2", Description("net"), MAX_BYTES).inputs[0].shape == [1, 2, -1]
    message = rejected(tmp_path, export(network, torch.zeros(1, 2, 9), sizes={"input": {2: 4 * length + 1}}))
    assert re.fullmatch(r"input 'input' has the size Add\(Mul\(4, \w+\), 1\) in dimension 2; .* as k or 4\*k", message)


class Rounds(nn.Module):
    """A network with float32 outputs. A mean of all rows simulates rounding errors that depend on the batch size."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.float() + 0.005 * x.mean(0)


@pytest.mark.parametrize(("dtype", "batched"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_rows_may_differ_by_the_rounding_of_the_weights(tmp_path: Path, dtype: torch.dtype, batched: bool) -> None:
    path = tmp_path / "net.pt2"
    sizes = {"x": {0: torch.export.Dim("rows", max=64)}}
    path.write_bytes(export(Rounds(dtype), torch.ones(2, 3), sizes=sizes))
    assert add(tmp_path / "store", path, Description("net"), MAX_BYTES).sizes["batched"] is batched


class SharesMemory(nn.Module):
    """A network with two weights that are overlapping parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(6.0)
        self.register_buffer("first", base[:4])
        self.register_buffer("last", base[2:])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first + 10 * self.last


def test_weights_may_be_parts_of_one_tensor(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(export(SharesMemory(), torch.ones(4)))
    add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    (output,) = store.read_version(tmp_path / "store", "net", 1).network().run({"x": torch.zeros(4).numpy()}).values()
    assert output.tolist() == [20, 31, 42, 53]


class DoublesInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


def test_a_network_may_change_its_input_in_place(tmp_path: Path) -> None:
    sizes = {"x": {0: torch.export.Dim("rows", max=64)}}
    path = tmp_path / "doubles.pt2"
    path.write_bytes(export(DoublesInPlace(), torch.ones(2, 3), sizes=sizes))
    assert add(tmp_path / "store", path, Description("doubles"), MAX_BYTES).sizes["batched"] is True


def test_a_graph_cannot_change_its_weights_while_it_is_served(tmp_path: Path) -> None:
    node = {"op": "aten.add_.Tensor", "args": [{"value": "w"}, {"value": "x"}], "kwargs": {}, "outputs": "y"}
    graph = {"inputs": ["x"], "weights": {"w": "w"}, "nodes": [node], "outputs": [["y", "y"]]}
    program = ExportedProgram({GRAPH: graph_tensor(graph), "w": torch.zeros(2)})
    before = program.weight_versions()
    program.run({"x": torch.ones(2).numpy()})
    assert program.weight_versions() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [["y", "z"]]}, "'z' is used before it is defined"),
        ({"weights": {"w": "v"}}, "there is no weight 'v'"),
        ({"weights": {}}, "'w' is not used"),
        ({"inputs": ["x", "x"]}, "'x' is defined twice"),
        ({"nodes": [{"op": "aten.add_.Tensor"}]}, "wrong entry"),
        ({"nodes": [{"op": "torch.load", "args": [], "kwargs": {}, "outputs": "y"}]}, "'torch.load' is not allowed"),
    ],
)
def test_wrong_graphs_are_rejected(change: dict[str, Any], message: str) -> None:
    node = {"op": "aten.add.Tensor", "args": [{"value": "w"}, {"value": "x"}], "kwargs": {}, "outputs": "y"}
    graph = {"inputs": ["x"], "weights": {"w": "w"}, "nodes": [node], "outputs": [["y", "y"]]}
    assert ExportedProgram({GRAPH: graph_tensor(graph), "w": torch.zeros(2)})
    with pytest.raises(ValueError, match=message):
        ExportedProgram({GRAPH: graph_tensor({**graph, **change}), "w": torch.zeros(2)})


class Segments(nn.Module):
    """A network that returns a dictionary, as those of torchvision and Hugging Face do."""

    def __init__(self, result: Callable[[Tensor], dict[str, Tensor | None]]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return self.result(x)


@pytest.mark.parametrize(
    "result",
    [
        lambda x: OrderedDict(out=x * 2, aux=x + 1),
        lambda x: {"loss": None, "out": x * 2, "aux": x + 1},
    ],
)
def test_the_keys_of_a_dictionary_name_the_outputs(
    result: Callable[[Tensor], dict[str, Tensor | None]], tmp_path: Path
) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(export(Segments(result), torch.ones(2)))
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    assert [output.name for output in card.outputs] == ["out", "aux"]


class FindsLargest(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return points.amax(0)


@pytest.mark.parametrize(("low", "high", "limits"), [(None, 20_000, [1, 20_000]), (2, 2**40, [2, 2**20])])
def test_the_number_of_rows_is_limited_by_the_file_if_rows_affect_each_other(
    low: int | None, high: int, limits: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "net.pt2"
    sizes = {"points": {0: torch.export.Dim("n", min=low, max=high)}}
    path.write_bytes(export(FindsLargest(), torch.ones(5, 3), sizes=sizes))
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    assert (card.sizes["batched"], list(card.sizes["ranges"].values())) == (False, [limits])


class Aggregates(nn.Module):
    """A graph network that adds the values of the neighbours of each node."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ x


def test_a_size_in_two_dimensions_does_not_count_rows(tmp_path: Path) -> None:
    nodes = torch.export.Dim("nodes", min=2, max=5000)
    path = tmp_path / "net.pt2"
    sizes = {"x": {0: nodes}, "adjacency": {0: nodes, 1: nodes}}
    path.write_bytes(export(Aggregates(), torch.ones(7, 5), torch.ones(7, 7), sizes=sizes))
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    assert (card.sizes["batched"], list(card.sizes["ranges"].values())) == (False, [[2, 5000]])
    assert card.outputs[0].shape == [-1, 5]


class Repeats(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = x * 2
        return first, first, x * 3, first


def test_each_output_has_its_own_name_even_if_it_is_returned_twice(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(export(Repeats(), torch.ones(2)))
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    outputs = store.read_version(tmp_path / "store", "net", 1).network().run({"x": torch.ones(2).numpy()})
    expected = {"mul": 2, "mul_2": 2, "mul_1": 3, "mul_3": 2}
    assert {name: output[0] for name, output in outputs.items()} == expected
    assert [output.name for output in card.outputs] == list(expected)


@pytest.mark.parametrize("size", [torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC])
def test_a_size_without_stated_limits_may_be_1(size: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(export(DoublesInPlace(), torch.ones(2, 3), sizes={"x": {0: size, 1: size}}))
    card = add(tmp_path / "store", path, Description("net"), MAX_BYTES)
    assert (card.sizes["batched"], [low for low, _ in card.sizes["ranges"].values()]) == (True, [1])
