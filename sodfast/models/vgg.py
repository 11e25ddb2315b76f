"""VGG-16 and VGG-19 as encoders: four features, no classifier (Simonyan and Zisserman, 2015)."""

from torch import Tensor, nn

_WIDTHS = (64, 128, 256, 512, 512)  # per stage
_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """VGG without batch normalisation, as it was published.

    ``features`` is numbered as in torchvision and timm. Initialised as there: Kaiming normal,
    fan-out.

    Args:
        depth: 16 or 19.
        in_channels: of the image.

    Shape: image (B, in_channels, H, W), H and W multiples of 16, to four features, the last
    results of stages 2 to 5 before they are pooled: (B, 128, H/2, W/2), (B, 256, H/4, W/4),
    (B, 512, H/8, W/8), (B, 512, H/16, W/16).
    """

    channels = _WIDTHS[1:]

    def __init__(self, depth: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"depth must be 16 or 19, not {depth}")
        layers: list[nn.Module] = []
        self._taps = []
        for stage, (width, count) in enumerate(zip(_WIDTHS, _CONVOLUTIONS[depth])):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                conv = nn.Conv2d(in_channels, width, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
                layers += [conv, nn.ReLU()]
                in_channels = width
            if stage:
                self._taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, found = image, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._taps:
                found.append(x)
        return found
