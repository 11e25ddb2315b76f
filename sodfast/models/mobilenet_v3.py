"""MobileNetV3-Large as an encoder: four features, no classifier (Howard et al., ICCV 2019)."""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

# Per unit: kernel, expanded channels, output channels, squeeze and excitation, hard swish
# (else ReLU), stride; at width 1.
UNITS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
TAPS = (2, 5, 11, 14)  # units whose results are the features
FORMS = ("paddle", "torchvision")


class SqueezeExcitation(nn.Module):
    """Scales channels by a gate of their means: two 1x1 convolutions and a hard sigmoid.

    slope: of the hard sigmoid clip(slope * x + 0.5, 0, 1). Shape: (B, channels, H, W).
    """

    def __init__(self, channels: int, squeezed: int, slope: float) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * (self.slope * gate + 0.5).clamp(0, 1)

    def add_to(self, plan: Any, x: Any) -> Any:
        """Add the gate alone to a :class:`sodfast.plan.PlanBuilder`."""
        return plan.gate(x, self.reduce, self.expand, self.slope)


class Unit(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise, squeeze and excitation, 1x1 projection."""

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        excite: bool,
        activation: type[nn.Module],
        form: str,
    ) -> None:
        super().__init__()
        eps = 1e-3 if form == "torchvision" else 1e-5
        self.expand: nn.Module = nn.Identity()
        if form == "paddle" or expanded != in_channels:
            self.expand = nn.Sequential(
                nn.Conv2d(in_channels, expanded, 1, bias=False),
                nn.BatchNorm2d(expanded, eps),
                activation(),
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(
                expanded, expanded, kernel_size, stride, kernel_size // 2, groups=expanded,
                bias=False,
            ),
            nn.BatchNorm2d(expanded, eps),
            activation(),
        )  # fmt: skip
        self.squeeze: nn.Module = nn.Identity()
        if excite:
            if form == "paddle":
                self.squeeze = SqueezeExcitation(expanded, expanded // 4, 0.2)
            else:
                self.squeeze = SqueezeExcitation(expanded, _divisible(expanded // 4), 1 / 6)
        self.project = nn.Sequential(
            nn.Conv2d(expanded, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, eps)
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y

    def add_to(self, plan: Any, x: Any) -> Any:
        """Add the fused unit to a :class:`sodfast.plan.PlanBuilder`."""
        expand = self.expand[0] if isinstance(self.expand, nn.Sequential) else None
        y = plan.depthwise(x, expand, self.depthwise[0], self.depthwise[-1])
        gate = None
        if isinstance(self.squeeze, SqueezeExcitation):
            gate = self.squeeze.add_to(plan, y)
        return plan.conv(y, self.project[0], gate=gate, add=x if self.shortcut else None)


class MobileNetV3Large(nn.Module):
    """MobileNetV3-Large without its last convolution and classifier.

    Two forms are in use, whose weights do not fit each other:

    - "paddle", of PaddleClas, which KD-SCFNet is built on: every unit expands (also the first,
      16 to 16 channels), squeezes to a 4th, and gates with clip(0.2 x + 0.5, 0, 1).
    - "torchvision", also timm's: no expansion where it would not widen, squeezed channels
      rounded to multiples of 8, a gate of slope 1/6, and 1e-3 as the norms' eps (timm's own
      training has 1e-5; its weights load all the same).

    Args:
        width: scales all channels, which are then rounded to multiples of 8.
        form: "paddle" or "torchvision".
        in_channels: of the image.

    Shape: image (B, in_channels, H, W), H and W multiples of 32, to four features at H/4, H/8,
    H/16 and H/32, with ``channels`` channels: (16, 24, 56, 80) at width 0.5.
    """

    def __init__(self, width: float = 1.0, form: str = "paddle", in_channels: int = 3) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be 'paddle' or 'torchvision', not {form!r}")
        self.form = form
        channels = _divisible(16 * width)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels, 1e-3 if form == "torchvision" else 1e-5),
            nn.Hardswish(),
        )
        units = []
        for kernel_size, expanded, out, excite, swish, stride in UNITS:
            out = _divisible(out * width)
            units.append(
                Unit(
                    channels, _divisible(expanded * width), out, kernel_size, stride, excite,
                    nn.Hardswish if swish else nn.ReLU, form,
                )
            )  # fmt: skip
            channels = out
        self.units = nn.ModuleList(units)
        self.channels = tuple(_divisible(UNITS[tap][2] * width) for tap in TAPS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        features = []
        for number, unit in enumerate(self.units):
            x = unit(x)
            if number in TAPS:
                features.append(x)
        return features

    def add_to(self, plan: Any, image: Any) -> list[Any]:
        """Add the fused encoder to a :class:`sodfast.plan.PlanBuilder`."""
        x = plan.conv(image, self.stem[0], self.stem[-1])
        features = []
        for number, unit in enumerate(self.units):
            x = cast(Unit, unit).add_to(plan, x)
            if number in TAPS:
                features.append(x)
        return features


def _divisible(value: float) -> int:
    """The nearest multiple of 8, at least 8 and not under 0.9 of the value."""
    nearest = max(8, int(value + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * value else nearest + 8
