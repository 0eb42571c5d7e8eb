"""Compare the speed of a network's forward pass in the service with its speed in other CPU runtimes.

    python -m benchmarks.speed.inference_runtimes                                   # both CIFAR-10 networks
    python -m benchmarks.speed.inference_runtimes cifar10-whitened --rows 64 --threads 2
    python -m benchmarks.speed.inference_runtimes shakespeare-rnn@1 sine-lstm --rows 1,16

A forward pass is one of these:

- classifiers: the logits of ``rows`` images
- networks for text: one generation step of ``rows`` texts
- networks for one kind of series: forecasts of 48 steps for ``rows`` series

The runtimes are measured in turn. The comparison includes ONNX Runtime (packages onnxruntime, onnx, onnxscript) and
OpenVINO (package openvino) if these packages are installed. It includes compiled graphs if a C++ compiler is installed.
Each row of the table shows the milliseconds per call (median, minimum, maximum) and the speed relative to the forward
pass in the service. It also shows the largest difference of an output from the output in float32. The outputs are
probabilities, or standardised forecasts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.networks.cnn import WhitenedNet, probabilities
from app.store import Store
from app.store.version import Version
from app.tasks.classification import ImageClassifier
from benchmarks.support.servers import ROOT
from benchmarks.support.throughput_limits import newest
from benchmarks.support.workloads import HORIZON

Inputs = tuple[Tensor, ...]
Forward = Callable[..., Any]  # input tensors -> an output tensor, or a tuple whose first element is the output
MEASUREMENT_SECONDS = 0.3


class OneStep(nn.Module):
    """One generation step of a network for text.

    The inputs are characters [N] and the state [N, layers, hidden]. The outputs are logits [N, V] and the next state.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        logits, state = self.network(characters.unsqueeze(1), state)
        return logits.squeeze(1), state


class FixedHorizon(nn.Module):
    """Forecasts of ``HORIZON`` steps, given standardised windows [N, window]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows: Tensor) -> Tensor:
        forecasts: Tensor = self.network(windows, HORIZON)
        return forecasts


@dataclass(frozen=True)
class Case:
    """A network with its inputs. ``served`` is the forward pass of the service, and ``compared`` converts an output."""

    network: nn.Module
    inputs: Inputs
    served: Forward
    compared: Callable[[Tensor], Tensor]


def case(version: Version, rows: int) -> Case:
    """Return the case of a version. Raises SystemExit for a network that this benchmark does not support."""
    network: Any = version.network()
    task, generator = version.card.task, torch.Generator().manual_seed(0)
    if task == "classify":
        images = torch.randint(
            0, 256, (rows, *version.card.inputs[0].shape[1:]), dtype=torch.uint8, generator=generator
        )
        network.to(memory_format=network.memory_format)
        served = ImageClassifier(version, torch.device("cpu")).network.forward
        return Case(network, (images,), served, probabilities)
    if task == "continue":
        characters = torch.randint(network.sizes.vocabulary, (rows,), generator=generator)
        steps = network.for_generation()

        def step(characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            hidden, state = steps.read(characters, state)
            return steps.logits(hidden), state

        return Case(
            OneStep(network).eval(), (characters, network.zero_state(rows)), step, lambda logits: logits.softmax(1)
        )
    if task == "forecast" and hasattr(network, "free_running"):
        windows = torch.randn(rows, network.sizes.window, generator=generator)
        forward = FixedHorizon(network).eval()
        return Case(forward, (windows,), forward, lambda forecasts: forecasts)
    raise SystemExit(f"{version.label}: this benchmark does not support the network {version.card.kind}")


def output(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple | list) else result
    return tensor


def eager(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass in float32, layer by layer."""
    return network.forward


def in_bfloat16(network: Any, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass with the large convolutions in bfloat16.

    Raises AttributeError for a network that does not support bfloat16.
    """
    network.to_bfloat16()
    forward: Forward = network.forward
    return forward


def folded(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass with each batch norm folded into the convolution before it.

    A max-pooling layer may be between the convolution and the batch norm, because the factors of the batch norm are
    positive. Raises TypeError for a network without batch norm.
    """
    if not isinstance(network, WhitenedNet):
        raise TypeError("the network has no batch norm")
    for group in network.groups:
        for number in ("1", "2"):
            convolution, norm = getattr(group, f"conv{number}"), getattr(group, f"norm{number}")
            fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
            group.set_submodule(f"conv{number}", fused.to(memory_format=torch.channels_last))
            group.set_submodule(f"norm{number}", nn.Identity())
    return network.forward


def frozen(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass of a TorchScript graph that is traced, frozen, and optimised for inference."""
    graph = torch.jit.trace(network, inputs, check_trace=False)
    forward: Forward = torch.jit.optimize_for_inference(torch.jit.freeze(graph))
    return forward


def compiled(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass of the network, compiled by torch.compile with frozen weights."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(network)


def ahead_of_time(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass of the network, compiled ahead of time by AOTInductor."""
    import torch._inductor

    program = torch.export.export(network, inputs)
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/network.pt2")
        forward: Forward = torch._inductor.aoti_load_package(package)
    return forward


def onnxruntime(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass in ONNX Runtime. PyTorch exports the network to ONNX."""
    import onnxruntime

    with torch.enable_grad():  # without gradients, LeNet uses operators that ONNX does not have
        program: Any = torch.onnx.export(network, inputs, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]

    def forward(*tensors: Tensor) -> list[Tensor]:
        values = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, values)]

    return forward


def openvino(network: nn.Module, inputs: Inputs, threads: int, precision: str = "f32") -> Forward:
    """Return the forward pass in OpenVINO, which converts the network from a TorchScript trace."""
    import openvino

    with torch.enable_grad():
        model = openvino.convert_model(torch.jit.trace(network, inputs, check_trace=False))
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    call = openvino.Core().compile_model(model, "CPU", hints)
    return lambda *tensors: torch.from_numpy(call([tensor.numpy() for tensor in tensors])[0])


def openvino_bfloat16(network: nn.Module, inputs: Inputs, threads: int) -> Forward:
    """Return the forward pass in OpenVINO with bfloat16."""
    return openvino(network, inputs, threads, "bf16")


RUNTIMES: dict[str, Callable[[Any, Inputs, int], Forward]] = {
    "single precision": eager,
    "bfloat16 convolutions": in_bfloat16,
    "batch norm folded": folded,
    "TorchScript, frozen": frozen,
    "torch.compile": compiled,
    "AOTInductor": ahead_of_time,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "OpenVINO, bfloat16": openvino_bfloat16,
}


def milliseconds_per_call(forward: Forward, inputs: Inputs) -> float:
    """Return the mean duration of a call in milliseconds."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MEASUREMENT_SECONDS:
        forward(*inputs)
        calls += 1
    return 1000 * elapsed / calls


def compare(version: Version, rows: int, threads: int, rounds: int) -> None:
    """Measure all runtimes with one network and one batch size, and print the table."""
    current = case(version, rows)
    forwards: dict[str, Forward] = {"served": current.served}
    print(f"\n**{version.label}, {rows} row{'s' * (rows > 1)}, {threads} thread{'s' * (threads > 1)}**\n")
    for name, prepare in RUNTIMES.items():
        try:
            forwards[name] = prepare(copy.deepcopy(current.network), current.inputs, threads)
            forwards[name](*current.inputs)
        except Exception as error:  # exporters and compilers raise various errors; skip this runtime
            forwards.pop(name, None)
            message = (str(error).strip().splitlines() or [""])[0]
            print(f"{name}: {type(error).__name__}: {message[:100]}", file=sys.stderr)
    expected = current.compared(output(current.network(*current.inputs)))
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            times[name].append(milliseconds_per_call(forward, current.inputs))
    print("| runtime | ms | min–max | relative speed | largest difference |\n|---|--:|--:|--:|--:|")
    base = statistics.median(times["served"])
    for name, measurements in times.items():
        median = statistics.median(measurements)
        difference = float((current.compared(output(forwards[name](*current.inputs))) - expected).abs().max())
        spread = f"{min(measurements):.3g}–{max(measurements):.3g}"
        print(f"| {name} | {median:.3g} | {spread} | {base / median:.2f} | {difference:.0e} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        default=["cifar10-lenet", "cifar10-whitened"],
        help="models, such as cifar10-lenet or shakespeare-rnn@1",
    )
    parser.add_argument("--rows", default="1,8,64", help="rows of a batch (default: 1,8,64)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each runtime (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each runtime (default: %(default)s)")
    parser.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder of the networks")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # exporters and TorchScript print deprecation warnings
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for model in options.names:
        name, _, number = model.partition("@")
        version = Store(options.store).read(name, int(number)) if number else newest(options.store, name)
        for rows in map(int, options.rows.split(",")):
            compare(version, rows, options.threads, options.rounds)


if __name__ == "__main__":
    main()
