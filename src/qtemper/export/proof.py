"""An ONNX file with its proof, or no file."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qtemper.errors import ExportError
from qtemper.export import measures
from qtemper.export.onnx import build_onnx, graph_for
from qtemper.export.report import Report
from qtemper.export.targets import get_target
from qtemper.export.trace import ANY_BATCH
from qtemper.export.verify import against_training, verify
from qtemper.files import write_atomically
from qtemper.modes import float_mode


def export_and_verify(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    target: str = "onnxruntime",
    test: Iterable[tuple[Tensor, Tensor]] = (),
    rounds: int = 30,
) -> Report:
    """Write a model as ONNX after proving what the file computes.

    Args:
        model: prepared, calibrated and trained, on any device; it is not changed.
        example: a batch of real inputs, two at least: scales of 8-bit values are fitted to it, codes compared on it.
        path: of the file; the proof is `<path>.report.json` beside it, or `<path>.failed.json` if there is none.
        target: a name of `targets.TARGETS`.
        test: batches of inputs and labels, for top-1.
        rounds: of timing against the float model; 0 for none.

    Returns:
        The report of a file that is sound.

    Raises:
        ExportError: the target cannot hold the model, or the file failed and was not written; an earlier file of that
            name stays with its own report.
    """
    wanted, path = get_target(target), Path(path)
    if rounds == 1 or rounds < 0:
        raise ExportError(f"rounds must be 0 for no timing, or 2 and more for quartiles, got {rounds}.")
    if path.is_dir():
        raise ExportError(f"{path} is a directory; name the file in it.")
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent} is no directory; make it first, or choose another path.")
    model, example = copy.deepcopy(model).cpu().eval(), example.detach().cpu()
    graph = graph_for(model, example, wanted)
    file = ir.serde.serialize_model(build_onnx(graph, example, wanted)).SerializeToString()
    proto = onnx.load_from_string(file)
    report = verify(proto, graph, example[:32], wanted)
    report.sha256 = hashlib.sha256(file).hexdigest()
    report.sizes = measures.sizes(model, graph, len(file))
    report.in_float = [] if wanted.quant_nodes else measures.left_in_float(model, graph)
    report.counts.append(against_training(graph, model, example[:32], exact=wanted.quant_nodes))
    report.top1 = measures.accuracies(test, model, graph, proto, wanted)
    if rounds and not (wanted.quant_nodes or wanted.signed):
        report.latency = measures.compare_latency(proto, float_onnx(model, example), example[:1], rounds)
    failures, failed = report.failures(), path.with_name(path.name + ".failed.json")
    if failures:
        write_atomically(failed, report.to_json().encode())
        more = f", and {len(failures) - 3} more" if len(failures) > 3 else ""
        remedy = " On a CPU without VNNI use the target onnxruntime, exact everywhere." if wanted.int8 else ""
        raise ExportError(
            f"{path} failed its verification and was not written: {'; '.join(failures[:3])}{more}.{remedy}"
        )
    write_atomically(path, file)
    write_atomically(path.with_name(path.name + ".report.json"), report.to_json().encode())
    failed.unlink(missing_ok=True)
    return report


def float_onnx(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The float network with the latent weights, as torch.onnx exports it: what latency is compared with."""
    with float_mode(model), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(model, (example,), dynamo=True, verbose=False, dynamic_shapes=ANY_BATCH)
    return ir.serde.serialize_model(program.model)
