"""What is timed of SCFNet on a GPU: the ops on maps, inference, and a step of its distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sodfast
from gpu.works import DTYPES, Work
from sodfast import ops
from sodfast.nn import DynamicDistillationLoss
from sodfast.objective import Objective
from sodfast.recipe import load_recipe

SIDE = 352  # pixels: what SCFNet is tested at
LOSS_BATCH, FUSION_BATCH = 128, 64
THICKNESSES = (13, 1, 31, 3, 7, 21)  # from 13 to 1 while it trains


class Call(nn.Module):
    """A function as a layer that takes a list."""

    def __init__(self, function: Callable[..., Any], *constants: Any) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, xs: list[Tensor]) -> Any:
        return self.function(*xs, *self.constants)


@dataclass(frozen=True)
class MapWork(Work):
    """An op on maps. sizes: of its arguments, which lie in `layout`; the last `constants` of them
    are truths."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    sizes: tuple[tuple[int, ...], ...]
    constants: int = 0
    layout: torch.memory_format = torch.contiguous_format

    @property
    def differentiated(self) -> int:
        return len(self.sizes) - self.constants

    def module(self) -> nn.Module:
        made = self.function(*self.arguments) if isinstance(self.function, type) else None
        return Call(made or self.function, *(() if made else self.arguments))

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, *size) for size in self.sizes]

    def build(self) -> tuple[nn.Module, list[Tensor]]:
        torch.manual_seed(0)
        xs = [torch.randn(s, device="cuda").contiguous(memory_format=self.layout)
              for s in self.shapes()]  # fmt: skip
        return self.module(), [*xs[: self.differentiated], *(
            (x > 0).float() for x in xs[self.differentiated :]
        )]  # fmt: skip

    def values(self) -> int:
        """Numbers that must move at least: arguments and result; in the backward these again, and
        the gradients of the arguments that have one."""
        xs = [torch.empty(shape, device="meta") for shape in self.shapes()]
        with torch.no_grad(), sodfast.use_backend("reference"):
            ys = self.module()(xs)
        read = sum(x.numel() for x in xs)
        written = sum(y.numel() for y in (ys if isinstance(ys, tuple) else (ys,)))
        back = sum(x.numel() for x in xs[: self.differentiated])
        if not self.training:
            return read + written
        if self.function is ops.scfm and self.arguments == (False,):
            # x + up(y): x's gradient is the result's, and y's is made of that alone
            return read + 2 * written + xs[1].numel()
        if self.function is DynamicDistillationLoss:
            # θ takes a pass over an image's maps, which fit a cache, before the one that ends in
            # their gradient: read once, it is written, and read and written to be scaled
            return read + written + 3 * back
        return 2 * (read + written) + back


class NetworkWork(Work):
    """Inference of SCFNet."""

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        fused = sodfast.fuse(sodfast.create_model("scfnet").eval())
        return fused.to(memory_format=torch.channels_last)

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, 3, SIDE, SIDE)]


class Distillation(nn.Module):
    """From pictures to the loss: SCFNet-R50 says what is salient, SCFNet learns it."""

    def __init__(self) -> None:
        super().__init__()
        recipe = load_recipe("kd-scfnet")
        self.student = sodfast.create_model("scfnet", **recipe.config)
        self.teacher = sodfast.fuse(sodfast.create_model("scfnet", encoder="resnet50").eval())
        self.teacher.requires_grad_(False)
        self.objective = Objective(recipe)

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            truth = self.teacher(image).float().sigmoid()
        return self.objective(self.student(image), truth, 0, 0.5)


class DistillationWork(NetworkWork):
    """A step of KD-SCFNet: the teacher, the student, its loss, backward, SGD."""

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return Distillation().train().to(memory_format=torch.channels_last)

    def parts(
        self, module: nn.Module, x: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], torch.optim.Optimizer]:
        trained = [p for p in module.parameters() if p.requires_grad]
        return lambda loss: loss, torch.optim.SGD(trained, 1e-3, momentum=0.9, weight_decay=5e-4)


def scfnet_works(kind: str) -> Iterator[Work]:
    """The cases of a kind. The losses' maps are float32 also in mixed precision."""
    if kind == "op":
        maps = (1, SIDE, SIDE)
        for training in (True, False):
            for k in THICKNESSES:
                batch, label = LOSS_BATCH, f"k {k} {SIDE}²"
                yield MapWork(
                    kind, "boundary", "", label, batch, "fp32", training,
                    ops.boundary, (k,), (maps,),
                )  # fmt: skip
                yield MapWork(
                    kind, "structure_polishing_sums", "", label, batch, "fp32", training,
                    ops.structure_polishing_sums, (k,), (maps, maps), 1,
                )  # fmt: skip
            for dtype in DTYPES:
                for side, ratio, multiply, last in (
                    (88, 2, True, True), (88, 2, True, False), (88, 8, True, True),
                    (88, 2, False, True),
                ):  # fmt: skip
                    label = f"{'x + x up(y)' if multiply else 'x + up(y)'} ×{ratio} {side}²"
                    label += " channels_last" if last else ""
                    layout = torch.channels_last if last else torch.contiguous_format
                    sizes = (16, side, side), (16, side // ratio, side // ratio)
                    yield MapWork(
                        kind, "scfm", "", label, FUSION_BATCH, dtype, training,
                        ops.scfm, (multiply,), sizes, layout=layout,
                    )  # fmt: skip
        yield MapWork(
            kind, "dkd", "", "256²", 32, "fp32", True,
            DynamicDistillationLoss, (), ((1, 256, 256),) * 3, 2,
        )  # fmt: skip
        return
    for dtype in DTYPES:
        if kind == "inference":
            for batch in (64, 1):
                yield NetworkWork(kind, "scfnet", "scfnet", "", batch, dtype, False)
        else:
            yield DistillationWork(kind, "kd-scfnet", "kd-scfnet", "", 128, dtype, True)
