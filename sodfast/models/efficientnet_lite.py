"""EfficientNet-Lite0 as an encoder: four features, no classifier.

Tan and Le, ICML 2019, in the form that its authors published for small devices: ReLU6, and neither
swish nor squeeze and excitation.
"""

from typing import Any, cast

from torch import Tensor, nn

from .mobilenet_v3 import Unit

# Per stage: kernel, expansion, output channels, stride of its first unit, units.
STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 2, 3),
    (5, 6, 112, 1, 3),
    (5, 6, 192, 2, 4),
    (3, 6, 320, 1, 1),
)
TAPS = (1, 2, 4, 6)  # stages whose results are the features


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its last convolution and classifier; 2.96 M parameters.

    Convolutions are padded alike on all sides. The published weights were trained with more
    padding below and to the right, which, but for the borders, only moves a feature by less than
    one of its pixels; and, as far as we know, on (RGB - 127) / 128, where SCFNet's images have
    another mean and twice the deviation. Training soon makes up for both.

    Args:
        in_channels: of the image.

    Shape: image (B, in_channels, H, W), H and W multiples of 32, to four features at H/4, H/8,
    H/16 and H/32, with ``channels`` channels: (24, 40, 112, 320).
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        channels = 32
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels, 1e-3),
            nn.ReLU6(),
        )
        stages = []
        for kernel_size, expansion, out, stride, count in STAGES:
            units = []
            for number in range(count):
                units.append(
                    Unit(
                        channels, expansion * channels, out, kernel_size,
                        1 if number else stride, False, nn.ReLU6, "torchvision",
                    )
                )  # fmt: skip
                channels = out
            stages.append(nn.Sequential(*units))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(STAGES[tap][2] for tap in TAPS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        features = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in TAPS:
                features.append(x)
        return features

    def add_to(self, plan: Any, image: Any) -> list[Any]:
        """Add the fused encoder to a :class:`sodfast.plan.PlanBuilder`."""
        x = plan.conv(image, self.stem[0], self.stem[-1])
        features = []
        for number, stage in enumerate(self.stages):
            for unit in cast(nn.Sequential, stage):
                x = cast(Unit, unit).add_to(plan, x)
            if number in TAPS:
                features.append(x)
        return features
