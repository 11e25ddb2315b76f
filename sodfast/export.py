"""A network for other runtimes: ONNX, torch.export's .pt2, and plans (.sodfast).

ONNX and .pt2 hold the fused network in its reference form: plain convolutions, pooling,
resizing and PReLU, with a dynamic batch and size. What is written has been run and compared
with the source first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data.synth import make_scene
from .fuse import fuse
from .ops._backend import use_backend
from .pictures import read_picture
from .plan import Plan
from .preprocess import check_preprocessing, to_input
from .weights import atomic_write

__all__ = ["FORMATS", "export"]

FORMATS = (".onnx", ".pt2", ".sodfast")
OPSET = 18
_TOLERANCE = 1e-4
_LARGEST_SIDE = 8192  # pixels


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    photos: Sequence[str | os.PathLike[str]] = (),
) -> float:
    """Write a network for another runtime, after comparing it with the source.

    Args:
        model: from :func:`sodfast.load` or :func:`sodfast.create_model`.
        path: ends in .onnx (needs the packages onnx, onnxscript and onnxruntime), .pt2 or
            .sodfast. The first two take (B, C, H, W) float32 named "image", any B, H and W
            (multiples of what the network needs), and give "logits", (B, 1, H, W).
        photos: pictures to compare on, at the network's size and at others; without any,
            synthetic scenes.

    Returns:
        The largest difference of a logit from the source's, relative to the largest logit or 1,
        whichever is larger.

    Raises:
        ValueError: an unknown ending, a model that cannot be exported so, or a result that
            differs by more than 1e-4; nothing is written then.
        ModuleNotFoundError: a package that the format needs is missing; names it.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the name must end in {', '.join(FORMATS)}")
    fused = fuse(model.cpu().float())
    network = fused.network if isinstance(fused, Plan) and fused.network is not None else fused
    inputs = _inputs(model, photos)
    with torch.no_grad(), use_backend("reference"):
        expected = [model.eval()(x) for x in inputs]
    data, run = _WRITERS[path.suffix](fused, network, getattr(model, "size_multiple", 16))
    worst = 0.0
    for x, y in zip(inputs, expected):
        scale = max(1.0, float(y.abs().max()))
        worst = max(worst, float((run(x) - y).abs().max()) / scale)
    if not worst <= _TOLERANCE:
        raise ValueError(
            f"{path}: not written, because its logits differ from the source's by {worst:.2g}"
        )
    with atomic_write(path) as file:
        file.write(data)
    return worst


def _inputs(model: nn.Module, photos: Sequence[str | os.PathLike[str]]) -> list[Tensor]:
    """Images as the network gets them: one by one at its own size, two at a larger and two at
    an oblong one."""
    preprocessing = check_preprocessing(getattr(model, "preprocessing", None))
    multiple = getattr(model, "size_multiple", 16)
    height, width = preprocessing["size"]
    scenes = [make_scene(0, i, 224) for i in range(4)]
    pictures = [read_picture(photo).rgb for photo in photos] or [scene[0] for scene in scenes]
    channels = getattr(model, "config", {}).get("in_channels", 3)

    def prepared(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
        depth = None
        if len(preprocessing["mean"]) == 4:  # a scene's, or of a photo its brightness
            known = [scene[2] for scene in scenes if scene[0] is rgb]
            depth = known[0] if known else rgb.mean(2).astype(np.uint8)
        x = to_input(rgb, preprocessing, size, depth)
        rest = channels - x.shape[1]
        return torch.cat([x, x.mean(1, keepdim=True).expand(-1, rest, -1, -1)], 1)

    pair = [pictures[0], pictures[-1]]
    sizes = [(height + multiple, width + 2 * multiple), (5 * multiple, 9 * multiple)]
    return [
        *(prepared(rgb, (height, width)) for rgb in pictures),
        *(torch.cat([prepared(rgb, size) for rgb in pair]) for size in sizes),
    ]


def _program(network: nn.Module, multiple: int) -> Any:
    """The network as a torch.export program with dynamic batch and size."""
    from torch.export import Dim, export

    most = _LARGEST_SIDE // multiple
    height, width = (multiple * Dim(name, min=1, max=most) for name in ("rows", "columns"))
    channels = getattr(network, "config", {}).get("in_channels", 3)
    example = torch.zeros(2, channels, 4 * multiple, 6 * multiple)
    shapes = ({0: Dim("batch", min=1, max=4096), 2: height, 3: width},)
    return export(network, (example,), dynamic_shapes=shapes, strict=False)


Written = tuple[bytes, Callable[[Tensor], Tensor]]


def _pt2(fused: nn.Module, network: nn.Module, multiple: int) -> Written:
    buffer = io.BytesIO()
    with torch.no_grad(), use_backend("reference"):
        torch.export.save(_program(network, multiple), buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda x: loaded(x).detach()


def _onnx(fused: nn.Module, network: nn.Module, multiple: int) -> Written:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"ONNX needs the package {error.name!r}: pip install 'sodfast[export]'"
        ) from error
    with torch.no_grad(), use_backend("reference"), _quiet():
        program = torch.onnx.export(
            _program(network, multiple), opset_version=OPSET, dynamo=True, verbose=False,
            input_names=["image"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    data = program.model_proto.SerializeToString()
    onnx.checker.check_model(data, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])

    return data, run


def _sodfast(fused: nn.Module, network: nn.Module, multiple: int) -> Written:
    if not isinstance(fused, Plan):
        raise ValueError("this model has no plan, so there is no .sodfast file of it")
    return fused.blob.numpy().tobytes(), torch.no_grad()(fused)


_WRITERS = {".onnx": _onnx, ".pt2": _pt2, ".sodfast": _sodfast}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells at length what it could not simplify; nobody can act on it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
