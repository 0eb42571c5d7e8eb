"""Reject ONNX files with divisions of integers that may overflow.

If a network divides the smallest integer by -1, the processor raises an exception that ends the process. onnxruntime
does not check for this. So the dividend or the divisor must not depend on the values of inputs, unless they are floats.
Nodes in the subgraphs of other nodes and in functions are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from app.importing.pt2_graph import BadProgram
from app.networks.imported.onnx_format import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    MODEL_GRAPH,
    NODE_OPERATOR,
    VALUE_NAME,
    last_text,
    messages,
)
from app.networks.imported.onnx_network import MODEL, OnnxNetwork

NODE_INPUT, NODE_OUTPUT = 1, 2
TENSOR_NAME = 8
INTEGERS = ("tensor(int32)", "tensor(int64)")  # types for which the division may overflow


def reject_overflowing_divisions(network: OnnxNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Raise BadProgram if the values of inputs may make a division of integers overflow."""
    names = divisions(tensors[MODEL].numpy().data)
    for name, kind in network.value_types(names).items():
        if kind in INTEGERS:
            raise BadProgram(
                f"operator 'Div' with the result {name!r} divides integers by a value that depends on an input; "
                "divide floats, or use Mod"
            )


def divisions(content: memoryview) -> list[str]:
    """Return the results of the divisions of which both operands depend on the values of inputs."""
    (graph,) = messages(content, MODEL_GRAPH)
    constants = {last_text(tensor, TENSOR_NAME) for tensor in messages(graph, GRAPH_INITIALIZER)}
    varying = {last_text(value, VALUE_NAME) for value in messages(graph, GRAPH_INPUT)} - constants
    found = []
    for node in messages(graph, GRAPH_NODE):
        operator = last_text(node, NODE_OPERATOR)
        inputs, outputs = (
            [bytes(name).decode() for name in messages(node, number)] for number in (NODE_INPUT, NODE_OUTPUT)
        )
        if operator == "Div" and varying.issuperset(inputs):
            found += outputs
        if operator not in ("Shape", "Size", "Constant") and (
            varying.intersection(inputs) or operator in ("If", "Scan")
        ):
            varying.update(outputs)
    return found
