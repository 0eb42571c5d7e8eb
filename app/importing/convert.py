"""Convert the programs of ``torch.export`` to ONNX files."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.utils import _pytree

from app.exporting.files import ExportRefused, check_outputs, to_model
from app.importing.files import BadModel


def convert(path: Path, folder: Path) -> Path:
    """Write a ``.pt2`` file as an ONNX file with the same inputs and outputs, and return its path.

    ``torch.export.load`` may run code from the file.

    Raises:
        BadModel: the file is not a program, or torch cannot convert an operator.
    """
    with warnings.catch_warnings(action="ignore"):  # torch warns about its own code
        try:
            program = torch.export.load(path)
        except Exception as error:  # torch raises exceptions of many classes
            raise BadModel(f"{path.name} is not a program of torch.export: {_cause(error)}") from None
        try:
            names = _output_names(program)
            model = to_model(program, names)
        except ImportError as error:
            raise BadModel(f".pt2 files need the package {error.name!r}, which the extra [onnx] installs") from None
        except Exception as error:
            raise BadModel(f"torch cannot convert {path.name} to ONNX: {_cause(error)}") from None
        target = folder / f"{path.stem}.onnx"
        model.save(target)  # writes large weights as external data, because an ONNX file has at most 2 GiB
        if program.example_inputs:
            args, kwargs = program.example_inputs
            with torch.inference_mode():
                outputs = _pytree.tree_leaves(program.module()(*args, **kwargs))
            expected = dict(zip(names or [each.name for each in model.model.graph.outputs], outputs, strict=True))
            try:
                check_outputs(str(target), _pytree.tree_leaves((args, kwargs)), expected, path.name)
            except ExportRefused as error:
                raise BadModel(str(error)) from None
    return target


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return the keys of the outputs if the program returns a dictionary, or else the names that torch gives them."""
    spec = program.call_spec.out_spec
    if spec is not None and spec.type is dict and all(child.is_leaf() for child in spec.children()):
        return [str(key) for key in spec.context]
    return [str(name) for name in program.graph_signature.user_outputs]


def _cause(error: BaseException) -> str:
    """Return the first line of the exception that caused ``error``."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
