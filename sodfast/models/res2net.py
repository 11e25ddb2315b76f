"""Res2Net-50 as an encoder: four features, no classifier (Gao et al., TPAMI 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resnet import Encoder

SCALES = 4  # groups of channels in a block
BASE_WIDTH = 26  # channels of a group where ResNet's bottleneck has 64


class Res2Bottleneck(nn.Module):
    """Bottleneck whose 3x3 works on four groups of channels one after the other.

    Every group but the last is convolved after the result of the group before was added to it,
    so that one block holds receptive fields of several sizes. The last group passes. In the
    first block of a layer nothing is added, and the last group is average-pooled instead.
    """

    fusable_pairs = (("conv1", "bn1"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        group = width * BASE_WIDTH // 64
        self.first = stride != 1 or in_channels != out_channels
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, group * SCALES, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(group * SCALES)
        self.convs = nn.ModuleList(
            nn.Conv2d(group, group, 3, stride, padding=1, bias=False) for _ in range(SCALES - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(group) for _ in range(SCALES - 1))
        self.conv3 = nn.Conv2d(group * SCALES, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if self.first:
            # The average pool before the convolution keeps what a stride of 2 would skip.
            pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
            self.downsample = nn.Sequential(
                pool,
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        groups = F.relu(self.bn1(self.conv1(x))).chunk(SCALES, dim=1)
        done: list[Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns):
            if done and not self.first:
                group = group + done[-1]
            done.append(F.relu(bn(conv(group))))
        last = F.avg_pool2d(groups[-1], 3, self.stride, padding=1) if self.first else groups[-1]
        y = self.bn3(self.conv3(torch.cat([*done, last], dim=1)))
        return F.relu(y + self.downsample(x))


class Res2Net50(Encoder):
    """Res2Net-50, 26 channels x 4 scales, without its classifier; 23,669,352 parameters.

    The "v1b" form: a stem of three 3x3 convolutions, and average pooling in the shortcuts (timm
    calls it res2net50d). It is the one that gives the paper's total: with the 7x7 stem of the
    first form CSF would have 36.51 M parameters, not 36.53 M. Weights of that form do not fit.

    Shape: see :class:`sodfast.models.resnet.Encoder`.
    """

    def __init__(self, in_channels: int = 3) -> None:
        stem = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
        )
        super().__init__(stem, Res2Bottleneck)
