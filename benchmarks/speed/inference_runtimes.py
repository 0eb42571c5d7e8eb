"""Compare the speed of a classifier's forward pass in the service with its speed in other CPU runtimes.

    python -m benchmarks.speed.inference_runtimes                                   # both CIFAR-10 networks
    python -m benchmarks.speed.inference_runtimes cifar10-whitened --rows 64 --threads 2

The runtimes are measured in turn. The comparison includes ONNX Runtime (packages onnxruntime, onnx, onnxscript) and
OpenVINO (package openvino) if these packages are installed. It includes compiled graphs if a C++ compiler is installed.
Each row of the table shows the milliseconds per call (median, minimum, maximum) and the speed relative to the forward
pass in the service. It also shows the largest difference of a probability from the probability in float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app import store
from app.networks.cnn import Classifier, WhitenedNet, probabilities
from app.tasks.classification import ImageClassifier
from benchmarks.support.servers import ROOT
from benchmarks.support.throughput_limits import newest

Forward = Callable[[Tensor], Tensor]  # uint8 images -> logits
MEASUREMENT_SECONDS = 0.3


def eager(network: Classifier, example: Tensor, threads: int) -> Forward:
    """Return the forward pass in float32, layer by layer."""
    return network.forward


def in_bfloat16(network: Any, example: Tensor, threads: int) -> Forward:
    """Return the forward pass with the large convolutions in bfloat16.

    Raises AttributeError for a network that does not support bfloat16.
    """
    network.to_bfloat16()
    return network.forward


def folded(network: Classifier, example: Tensor, threads: int) -> Forward:
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


def frozen(network: Classifier, example: Tensor, threads: int) -> Forward:
    """Return the forward pass of a TorchScript graph that is traced, frozen, and optimised for inference."""
    graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(network, example)))
    return lambda images: graph(images)


def compiled(network: Classifier, example: Tensor, threads: int) -> Forward:
    """Return the forward pass of the network, compiled by torch.compile with frozen weights."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    graph = torch.compile(network)
    graph(example)
    return lambda images: graph(images)


def onnxruntime(network: Classifier, example: Tensor, threads: int) -> Forward:
    """Return the forward pass in ONNX Runtime. PyTorch exports the network to ONNX."""
    import onnxruntime

    with torch.enable_grad():  # without gradients, LeNet uses operators that ONNX does not have
        program: Any = torch.onnx.export(network, (example,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(network: Classifier, example: Tensor, threads: int, precision: str = "f32") -> Forward:
    """Return the forward pass in OpenVINO, which converts the network from a TorchScript trace."""
    import openvino

    with torch.enable_grad():
        model = openvino.convert_model(torch.jit.trace(network, example, check_trace=False))
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    call = openvino.Core().compile_model(model, "CPU", hints)
    return lambda images: torch.from_numpy(call(images.numpy())[0])


def openvino_bfloat16(network: Classifier, example: Tensor, threads: int) -> Forward:
    """Return the forward pass in OpenVINO with bfloat16."""
    return openvino(network, example, threads, "bf16")


RUNTIMES: dict[str, Callable[[Classifier, Tensor, int], Forward]] = {
    "single precision": eager,
    "bfloat16 convolutions": in_bfloat16,
    "batch norm folded": folded,
    "TorchScript, frozen": frozen,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "OpenVINO, bfloat16": openvino_bfloat16,
}


def milliseconds_per_call(forward: Forward, images: Tensor) -> float:
    """Return the mean duration of a call in milliseconds."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < MEASUREMENT_SECONDS:
        forward(images)
        calls += 1
    return 1000 * elapsed / calls


def compare(version: store.Version, rows: int, threads: int, rounds: int) -> None:
    """Measure all runtimes with one network and one batch size, and print the table."""
    images = torch.randint(0, 256, (rows, *version.card.inputs[0].shape[1:]), dtype=torch.uint8)
    network: Any = version.network()
    network.to(memory_format=network.order)
    served = ImageClassifier(version, torch.device("cpu"))
    forwards: dict[str, Forward] = {"served": served.network.forward}
    print(f"\n**{version.label}, {rows} images, {threads} thread{'s' * (threads > 1)}**\n")
    for name, prepare in RUNTIMES.items():
        try:
            forwards[name] = prepare(copy.deepcopy(network), images, threads)
            forwards[name](images)
        except Exception as error:  # exporters and compilers raise various errors; skip this runtime
            forwards.pop(name, None)
            print(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}", file=sys.stderr)
    expected = probabilities(network(images))
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            times[name].append(milliseconds_per_call(forward, images))
    print("| runtime | ms | min–max | relative speed | largest difference |\n|---|--:|--:|--:|--:|")
    base = statistics.median(times["served"])
    for name, measurements in times.items():
        median = statistics.median(measurements)
        difference = float((probabilities(forwards[name](images)) - expected).abs().max())
        spread = f"{min(measurements):.3g}–{max(measurements):.3g}"
        print(f"| {name} | {median:.3g} | {spread} | {base / median:.2f} | {difference:.0e} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["cifar10-lenet", "cifar10-whitened"], help="names of classifiers")
    parser.add_argument("--rows", default="1,8,64", help="images in a batch (default: 1,8,64)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each runtime (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each runtime (default: %(default)s)")
    parser.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder with the classifiers")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # exporters and TorchScript print deprecation warnings
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name in options.names:
        for rows in map(int, options.rows.split(",")):
            compare(newest(options.store, name), rows, options.threads, options.rounds)


if __name__ == "__main__":
    main()
