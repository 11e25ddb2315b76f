"""Rivals: the runtimes that a user would export the network to, from one and the same ONNX file.

They get the fused reference form, as ``sodfast export`` writes it, at a fixed size: what a user
who knows his size would give them. Packages: requirements/bench.txt.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import torch
from cases import Case, Work

from variants import Variant
from variants.eager import folded


def model_alone(case: Case) -> bool:
    return case.kind == "model" and not case.training


def onnx_bytes(case: Case, work: Work) -> bytes:
    import onnxscript  # noqa: F401

    logging.disable(logging.WARNING)
    network, (image,), *_ = folded(case, work)
    with torch.no_grad():
        program = torch.onnx.export(
            getattr(network, "network", network), (image,), opset_version=18, dynamo=True,
            verbose=False, input_names=["image"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def checked(case: Case, work: Work, call: Any) -> Work:
    """The call as work, after a look at its result: a rival that is wrong is no rival."""
    network, (image,), *_ = folded(case, work)
    with torch.no_grad():
        expected = network(image)
    got = torch.from_numpy(call(image))
    if not (got - expected).abs().max() <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise RuntimeError("its result is not the network's")
    return Work(call, (image,))


def onnx_runtime(case: Case, work: Work) -> Work:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(
        onnx_bytes(case, work), options, providers=["CPUExecutionProvider"]
    )
    return checked(case, work, lambda x: session.run(None, {"image": x.numpy()})[0])


def openvino(case: Case, work: Work) -> Work:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(io.BytesIO(onnx_bytes(case, work)))
    compiled = core.compile_model(
        model, "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )  # fmt: skip
    request = compiled.create_infer_request()

    def call(x: torch.Tensor) -> Any:
        return request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0]

    return checked(case, work, call)


VARIANTS = [
    Variant("ONNX Runtime", True, "reference", onnx_runtime, model_alone),
    Variant("OpenVINO", True, "reference", openvino, model_alone),
]
