"""Plans: a fused network as one op call, and as a file that runs without Python.

A model that can be a plan has a method ``add_to(plan, image)``, which adds its steps to a
:class:`PlanBuilder` and returns the features of its result, or raises NotImplementedError where a
plan has no such step; csrc/plan/format.h describes the file, csrc/cpu/maps.h the steps.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .models.image import check_image
from .ops._backend import _KERNELS, choose, register
from .preprocess import check_preprocessing
from .weights import atomic_write, flush_denormals

__all__ = ["Plan", "PlanBuilder", "load_plan"]

_MAGIC = b"sodfast\n"
_VERSION, _BYTE_ORDER, _NONE = 1, 0x01020304, 0xFFFFFFFF
_HEADER = struct.Struct("<8sIIQIIIIIIII8f8f")
_BLOCK, _BANK, _UPSAMPLE, _CONV, _DEPTHWISE, _GATE = range(1, 7)
_VECTOR = 0xFF  # the level of a tensor of one number per channel
_MOST_SCALES, _MOST_DILATIONS = 4, 8


class Feature(NamedTuple):
    """A feature map of a plan: its number, its channels, and how often its size is halved.

    One number per channel has the level 255.
    """

    number: int
    channels: int
    level: int


class Step(NamedTuple):
    """A step of a plan: its place in the network, and its multiply-accumulates for each pixel
    of the image."""

    name: str
    macs_per_pixel: float


class PlanBuilder:
    """Collects the steps of a fused network (normalisation folded into the convolutions)."""

    def __init__(self, network: nn.Module, in_channels: int) -> None:
        self._names = {module: name for name, module in network.named_modules()}
        self._features: list[Feature] = []
        self._words: list[int] = []
        self._floats: list[np.ndarray] = []
        self._position = self._deepest = 0
        self.steps: list[Step] = []
        self.image = self._feature(in_channels, 0)

    def block(
        self,
        module: nn.Module,
        xs: Sequence[Feature],
        conv: Any,
        depthwise: Sequence[Any] = (),
        head: Any = None,
    ) -> list[Feature]:
        """Add a gOctConv; then two depthwise layers, or a 1x1 convolution to one channel.

        Args:
            module: what the step is named after.
            xs: one feature per scale.
            conv: a :class:`sodfast.nn.GOctConv`.
            depthwise: none or two :class:`sodfast.nn.SimplifiedGOctConv`.
            head: None, or a 1x1 GOctConv from the one scale of ``conv`` to one channel.
        """
        level = xs[0].level + (conv.stride == 2)
        channels = conv.out_channels if head is None else head.out_channels
        ys = [self._feature(c, level + i) for i, c in enumerate(channels)]
        self._deepest = max(self._deepest, level + max(len(xs), len(ys)) - 1)
        words = [len(xs), *_indices(xs), len(ys), *_indices(ys), conv.kernel_size, conv.stride]
        words += [int(bool(depthwise)), int(head is not None), *self._convolution(conv)]
        for i in range(2):
            words += self._convolution(depthwise[i]) if depthwise else [_NONE] * 3
        words += self._convolution(head)[:2] if head is not None else [_NONE] * 2
        macs = sum(
            rows * columns * conv.kernel_size**2 / 4 ** (level + max(i, j))
            for j, rows in enumerate(conv.out_channels)
            for i, columns in enumerate(conv.in_channels)
        )
        macs += len(depthwise) * sum(9 * y.channels / 4**y.level for y in ys)
        macs += conv.out_channels[0] / 4**level if head is not None else 0
        self._step(_BLOCK, module, words, macs)
        return ys

    def bank(self, module: Any, xs: Sequence[Feature]) -> list[Feature]:
        """Add a :class:`sodfast.nn.DilatedBank`."""
        if len(module.dilations) > _MOST_DILATIONS:
            raise NotImplementedError(f"a plan has no bank of {len(module.dilations)} dilations")
        ys = [self._feature(sum(row), x.level) for row, x in zip(module.out_channels, xs)]
        words = [len(xs), *_indices(xs), *_indices(ys), len(module.dilations)]
        words += _padded(module.dilations, _MOST_DILATIONS)
        rows = [_padded(row, _MOST_DILATIONS) for row in module.out_channels]
        rows += [[0] * _MOST_DILATIONS] * (_MOST_SCALES - len(rows))
        words += [count for row in rows for count in row]
        words += _padded([self._floats_of(weight) for weight in module.weights], _MOST_SCALES)
        words += [self._floats_of(module.bias), self._floats_of(module.slope)]
        macs = sum(9 * x.channels * y.channels / 4**x.level for x, y in zip(xs, ys))
        self._step(_BANK, module, words, macs)
        return ys

    def conv(
        self,
        x: Feature,
        conv: nn.Conv2d,
        activation: nn.Module | None = None,
        *,
        up: Feature | None = None,
        multiply: bool = True,
        gate: Feature | None = None,
        add: Feature | None = None,
    ) -> Feature:
        """Add a 1x1 or 3x3 convolution with activation.

        Args:
            x: the input; the image for a 3x3 only.
            conv: without groups, padded to keep the size; a 3x3 may have stride 2 or a dilation.
            activation: an nn.ReLU, nn.ReLU6 or nn.Hardswish, or None.
            up, multiply: the input is ``x + x up(up)``, or ``x + up(up)``; 3x3 only.
            gate: scales the channels of ``x``; 1x1 only.
            add: is added before the activation; 1x1 only.
        """
        kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        if kernel not in (1, 3) or conv.groups != 1 or conv.padding[0] != kernel // 2 * dilation:
            raise NotImplementedError(f"a plan has no step for {conv}")
        y = self._feature(conv.out_channels, x.level + (stride == 2))
        others = [_NONE if f is None else f.number for f in (up, gate, add)]
        fusion = 0 if up is None else 1 if multiply else 2
        words = [x.number, y.number, kernel, stride, dilation, _activation(activation), fusion]
        words += [*others, self._floats_of(conv.weight), self._floats_of(conv.bias)]
        macs = x.channels * y.channels * kernel**2 / 4**y.level
        self._step(_CONV, conv, words, macs)
        return y

    def depthwise(
        self, x: Feature, expand: nn.Conv2d | None, conv: nn.Conv2d, activation: nn.Module
    ) -> Feature:
        """Add a 1x1 expansion (or None) and a depthwise 3x3 or 5x5, each with activation."""
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        if kernel not in (3, 5) or conv.groups != conv.in_channels:
            raise NotImplementedError(f"a plan has no step for {conv}")
        y = self._feature(conv.out_channels, x.level + (stride == 2))
        words = [x.number, y.number, kernel, stride, _activation(activation)]
        for layer in (expand, conv):
            bias = None if layer is None else _bias(layer)
            words += [self._floats_of(None if layer is None else layer.weight)]
            words += [self._floats_of(bias)]
        macs = kernel**2 * y.channels / 4**y.level
        macs += x.channels * y.channels / 4**x.level if expand is not None else 0
        self._step(_DEPTHWISE, conv, words, macs)
        return y

    def gate(self, x: Feature, reduce: nn.Conv2d, expand: nn.Conv2d, slope: float) -> Feature:
        """Add squeeze and excitation's gate: hard sigmoid of two layers on the channels' means."""
        y = self._feature(x.channels, _VECTOR)
        words = [x.number, y.number, reduce.out_channels]
        tensors = (reduce.weight, _bias(reduce), expand.weight.flatten(1).t(), _bias(expand))
        words += [self._floats_of(tensor) for tensor in (*tensors, torch.tensor([slope]))]
        self._step(_GATE, reduce, words, 0.0)  # its work does not depend on the pixels
        return y

    def upsample(self, x: Feature) -> Feature:
        """Add the bilinear upsampling to the image's size; it makes the plan's result."""
        y = self._feature(x.channels, 0)
        self._words += [_UPSAMPLE, 2, x.number, y.number]
        self.steps.append(Step("upsample", 0.0))
        return y

    def blob(self, preprocessing: dict[str, Any]) -> bytes:
        """The file."""
        entries = np.array([(x.channels, x.level) for x in self._features], "<u4").tobytes()
        words = np.array(self._words, "<u4").tobytes()
        floats = b"".join(array.tobytes() for array in self._floats)
        rest = entries + words + floats
        channels = self.image.channels
        mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
        header = _HEADER.pack(
            _MAGIC, _VERSION, _BYTE_ORDER, _HEADER.size + len(rest), zlib.crc32(rest),
            len(self._features), len(self.steps), len(self._words), self._position,
            *preprocessing["size"], 1 << self._deepest,
            *_padded(_padded(mean, channels)[:channels], 8),
            *_padded(_padded(std, channels, 1.0)[:channels], 8, 1.0),
        )  # fmt: skip
        return header + rest

    def _feature(self, channels: int, level: int) -> Feature:
        self._features.append(Feature(len(self._features), channels, level))
        if level != _VECTOR:
            self._deepest = max(self._deepest, level)
        return self._features[-1]

    def _step(self, kind: int, module: nn.Module, words: list[int], macs: float) -> None:
        self._words += [kind, len(words), *words]
        self.steps.append(Step(self._names.get(module, type(module).__name__), macs))

    def _convolution(self, conv: Any) -> list[int]:
        return [
            self._floats_of(conv.weight),
            self._floats_of(conv.bias),
            self._floats_of(conv.slope),
        ]

    def _floats_of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return _NONE
        values = flush_denormals(tensor.detach().float()).cpu().numpy().astype("<f4").ravel()
        self._floats.append(values)
        position, self._position = self._position, self._position + values.size
        return position


def _activation(module: nn.Module | None) -> int:
    for number, kind in enumerate((type(None), nn.ReLU, nn.Hardswish, nn.ReLU6)):
        if isinstance(module, kind):
            return number
    raise NotImplementedError(f"a plan has no step with {module}")


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _indices(xs: Sequence[Feature]) -> list[int]:
    return _padded([x.number for x in xs], _MOST_SCALES)


def _padded(values: Sequence[Any], length: int, fill: Any = 0) -> list[Any]:
    return [*values, *[fill] * (length - len(values))]


class Plan(nn.Module):
    """A fused network that runs as a plan: the whole of it is one op call on the CPU.

    Made by :func:`sodfast.fuse` and :func:`sodfast.load_plan`. The plan runs float32 on the
    CPU without autograd. Everything else (another device or dtype, the backend "reference")
    runs layer by layer through ``network``; a plan that was loaded from a file has none.

    Shape: image (B, C, H, W) to (B, 1, H, W); H and W must be multiples of what the network
    halves them by.

    Attributes:
        blob: the file's bytes, uint8; not to be changed.
        network: the fused network, layer by layer, or None.
        steps: names and work of the plan's steps; empty for a plan from a file.
    """

    blob: Tensor

    def __init__(
        self, blob: bytes, network: nn.Module | None = None, steps: Sequence[Step] = ()
    ) -> None:
        super().__init__()
        self.network, self.steps = network, tuple(steps)
        self.in_channels, self.size_multiple = 0, 1
        if len(blob) >= _HEADER.size + 4:  # whatever else it is: the op reads it with more care
            (self.in_channels,) = struct.unpack_from("<I", blob, _HEADER.size)
            self.size_multiple = _HEADER.unpack_from(blob)[11]
        self.register_buffer("blob", torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        if self.network is not None and not _runs_as_plan(image):
            return self.network(image)
        check_image(image, self.in_channels, self.size_multiple)
        return torch.ops.sodfast.run_plan(image, self.blob)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a ``.sodfast`` file, whole or not at all.

        :func:`sodfast.load_plan` and the C API (sodfast.h) read it.
        """
        with atomic_write(path) as file:
            file.write(self.blob.cpu().numpy().tobytes())

    def times(self, image: Tensor, repeats: int = 20) -> list[tuple[str, float, float]]:
        """Median milliseconds and GMAC/s of each step, for one image (1, C, H, W), float32.

        Returns:
            (name, ms, GMAC/s) per step; the plan runs ``repeats`` times after a warm-up.
        """
        torch.ops.sodfast.run_plan(image, self.blob)
        seconds = torch.ops.sodfast.time_plan(image, self.blob, repeats).median(0).values.tolist()
        steps = self.steps or [Step(f"step {i}", 0.0) for i in range(1, len(seconds) + 1)]
        pixels = image.shape[-2] * image.shape[-1]
        return [
            (step.name, 1e3 * s, 1e-9 * step.macs_per_pixel * pixels / s if s else 0.0)
            for step, s in zip(steps, seconds)
        ]

    def extra_repr(self) -> str:
        count = f"{len(self.steps)} steps, " if self.steps else ""
        return f"{count}{self.blob.numel()} bytes; float32 on the CPU runs as a plan"


def _runs_as_plan(image: Tensor) -> bool:
    if image.device.type != "cpu" or image.dtype != torch.float32:
        return False
    return "run_plan" in _KERNELS["cpu"] and choose("run_plan", image) == "cpu"


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Open a ``.sodfast`` file that :meth:`Plan.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no plan, or is damaged; names the file and says what is wrong.
        RuntimeError: the compiled module is not there; a plan has no reference form.
    """
    path = Path(path)
    blob = path.read_bytes()
    if not blob:
        raise ValueError(f"{path}: the file is empty")
    if "run_plan" not in _KERNELS["cpu"]:
        raise RuntimeError(f"{path}: a plan needs the compiled module, which is not there")
    plan = Plan(blob)
    try:
        channels = min(plan.in_channels, 8)
        torch.ops.sodfast.run_plan(torch.empty(0, channels, 1, 1), plan.blob)
    except RuntimeError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    # The op knows plans by their header: it would take a damaged copy of one in use for that.
    if zlib.crc32(blob[_HEADER.size :]) != _HEADER.unpack_from(blob)[4]:
        raise ValueError(f"{path}: the file is damaged: its checksum is wrong")
    return plan


def make_plan(network: nn.Module) -> nn.Module:
    """A fused network as a :class:`Plan` where it can be one; otherwise the network itself."""
    add_to = getattr(network, "add_to", None)
    config = getattr(network, "config", {})
    if add_to is None or "in_channels" not in config:
        return network
    if any(tensor.is_meta for tensor in network.state_dict().values()):  # shapes without numbers
        return network
    builder = PlanBuilder(network, config["in_channels"])
    try:
        add_to(builder, builder.image)
    except NotImplementedError:
        return network
    preprocessing = check_preprocessing(getattr(network, "preprocessing", None))
    return Plan(builder.blob(preprocessing), network, builder.steps)


def _refuse_gradient(*_: Any) -> None:
    raise RuntimeError("sodfast::run_plan has no gradient: a fused network is for inference")


def _fake_run_plan(x: Tensor, blob: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1, *x.shape[2:])


register("run_plan", fake=_fake_run_plan, backward=_refuse_gradient)
