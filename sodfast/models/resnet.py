"""ResNet-50 as an encoder: four features, no classifier (He et al., CVPR 2016)."""

from torch import Tensor, nn
from torch.nn import functional as F

ENCODER_CHANNELS = (256, 512, 1024, 2048)  # of the features, as of every such network
_BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each with batch normalisation, and a shortcut; ReLU.

    The stride is that of the 3x3 convolution, as in torchvision's weights (in the paper it is
    that of the first 1x1).
    """

    fusable_pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class Encoder(nn.Module):
    """What ResNet-50 and its relatives share: a stem, a max-pool and four layers of blocks.

    Parameters are named as in torchvision and timm. Initialised as there: Kaiming normal,
    fan-out.

    Args:
        stem: the image to 64 channels at half its resolution, without normalisation.
        block_class: called with (in_channels, width, stride), gives 4 * width channels.

    Shape: image (B, in_channels, H, W), H and W multiples of 32, to four features (B, 256,
    H/4, W/4), (B, 512, H/8, W/8), (B, 1024, H/16, W/16), (B, 2048, H/32, W/32).
    """

    channels = ENCODER_CHANNELS

    def __init__(self, stem: nn.Module, block_class: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for number, (out_channels, blocks) in enumerate(zip(ENCODER_CHANNELS, _BLOCKS), 1):
            layer = []
            for block in range(blocks):
                stride = 2 if block == 0 and number > 1 else 1
                layer.append(block_class(in_channels, out_channels // 4, stride))
                in_channels = out_channels
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.max_pool2d(x, 3, 2, padding=1)
        features = []
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
            features.append(x)
        return features


class ResNet50(Encoder):
    """ResNet-50 without its classifier; 23,508,032 parameters. Shape: see :class:`Encoder`."""

    fusable_pairs = (("conv1", "bn1"),)

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False), Bottleneck)
