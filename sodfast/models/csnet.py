"""CSNet: salient object detection with 100K parameters (ECCV 2020, TPAMI 2021)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sodfast.nn import CrossStageFusion, GOctConv, ILBlock
from sodfast.nn.blocks import DILATIONS

BASE_CHANNELS = 20  # stage 0 and 1 at width 1, both scales together
BLOCKS = (1, 3, 4, 6, 4)  # ILBlocks per stage
FUSED_STAGES = (2, 3, 4)
SIZE_MULTIPLE = 16  # stage 4's low resolution is a 16th of the input's

# ImageNet statistics, RGB in 0–1; the size of the papers' tables.
PREPROCESSING = {
    "size": [224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "resample": "bilinear",
}


class CSNet(nn.Module):
    """CSNet: five stages of ILBlocks and a cross-stage fusion; about 94K to 789K parameters.

    Args:
        width: scales every unpruned channel count; the papers' ×k.
        split: high : low resolution channels in every block, for example (1, 0), (3, 1),
            (1, 1), (1, 3) or (0, 1).
        in_channels: of the image.
        channels: an explicit configuration (what pruning yields) instead of width and split:
            ``{"stages": [[[8, 10]], [[9, 10], …], …], "fuse": [12, 24, 24],
            "bank": [[1, 2, 2, 2, 4], …], "merge": 60}`` with five stages of blocks, per block
            the channels at high and low resolution (one number: high only; the last blocks of
            stages 2, 3 and 4 must have one), the fusion's channels per scale, the bank's per
            scale and dilation 1, 2, 4, 8, 16 (0 = absent), and those of the merged feature.
        weight_gain: the authors' learning-rate trick, 100 in their training; see
            :class:`sodfast.nn.SimplifiedGOctConv`.

    Shape: image (B, in_channels, H, W), H and W multiples of 16, to logits (B, 1, H, W); the
    sigmoid is the caller's.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
    """

    name = "csnet"

    def __init__(
        self,
        width: float = 1.0,
        split: Sequence[float] = (1, 1),
        in_channels: int = 3,
        channels: dict[str, Any] | None = None,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__()
        if channels is None:
            channels = csnet_channels(width, split)
        elif width != 1.0 or tuple(split) != (1, 1):
            raise ValueError(
                f"width={width} and split={tuple(split)} have no meaning when channels are given"
            )
        channels = _checked(channels)
        self.preprocessing: dict[str, Any] = copy.deepcopy(PREPROCESSING)
        # Width and split are resolved into channels here, so that the file says what it holds.
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": channels,
            "weight_gain": weight_gain,
        }

        previous: Sequence[int] = (in_channels,)
        stages = []
        for stage, block_channels in enumerate(channels["stages"]):
            blocks = []
            for block, out in enumerate(block_channels):
                down = block == 0 and stage >= 2  # halves the resolution
                kernel_size = 3 if down or stage == 0 else 1
                blocks.append(ILBlock(previous, out, kernel_size, 2 if down else 1, weight_gain))
                previous = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.fusion = CrossStageFusion(
            [channels["stages"][stage][-1][0] for stage in FUSED_STAGES],
            channels["fuse"],
            channels["bank"],
            channels["merge"],
            weight_gain=weight_gain,
        )
        self.head = GOctConv(channels["merge"], 1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        _check_image(image, self.config["in_channels"])
        xs = [image]
        features = []
        for stage, blocks in enumerate(self.stages):
            xs = blocks(xs)
            if stage in FUSED_STAGES:
                features.append(xs[0])
        logits = self.head(self.fusion(features))[0]
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)


def csnet_channels(width: float = 1.0, split: Sequence[float] = (1, 1)) -> dict[str, Any]:
    """The unpruned channel configuration at a width and a high : low split.

    Raises:
        ValueError: a width that leaves no channels, or a split that is no ratio.
    """
    base = round(BASE_CHANNELS * width)
    if base < 2:
        raise ValueError(f"width must be at least 0.1, not {width}")
    if len(split) != 2 or min(split) < 0 or sum(split) <= 0:
        raise ValueError(f"split must be (high, low), from 0 on and not both 0: {tuple(split)}")

    def block(total: int) -> list[int]:
        high = round(total * split[0] / sum(split))
        return [high, total - high]

    stages = [[block(base)] * BLOCKS[0], [block(base)] * BLOCKS[1]]
    for stage, multiple in zip(FUSED_STAGES, (2, 4, 4)):
        total = multiple * base
        # The last block has the high resolution only: it is the fusion's input.
        stages.append([block(total)] * (BLOCKS[stage] - 1) + [[total]])
    fuse = [stage[-1][0] // 3 for stage in stages[2:]]
    bank = []
    for count in fuse:
        share = count // len(DILATIONS)
        bank.append([share] * 4 + [count - 4 * share])  # the rest to the largest dilation
    return {"stages": stages, "fuse": fuse, "bank": bank, "merge": sum(fuse)}


def _checked(channels: dict[str, Any]) -> dict[str, Any]:
    """A channel configuration as plain lists of ints, or a ValueError that names the place."""
    if set(channels) != {"stages", "fuse", "bank", "merge"}:
        raise ValueError(
            f"channels must have stages, fuse, bank and merge, not {', '.join(sorted(channels))}"
        )
    stages = [[list(block) for block in stage] for stage in channels["stages"]]
    if len(stages) != len(BLOCKS) or not all(stages):
        raise ValueError(f"channels['stages'] must be {len(BLOCKS)} lists of blocks: {stages}")
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage):
            most = 1 if s in FUSED_STAGES and b == len(stage) - 1 else 2
            _check_counts(block, f"channels['stages'][{s}][{b}]", range(1, most + 1))
    fuse, bank, merge = channels["fuse"], channels["bank"], channels["merge"]
    _check_counts(fuse, "channels['fuse']", (len(FUSED_STAGES),))
    if len(bank) != len(FUSED_STAGES):
        raise ValueError(f"channels['bank'] must have {len(FUSED_STAGES)} scales: {bank}")
    _check_counts([c for row in bank for c in row], "channels['bank']", (15,))
    _check_counts([merge], "channels['merge']", (1,))
    bank = [list(row) for row in bank]
    return {"stages": stages, "fuse": list(fuse), "bank": bank, "merge": merge}


def _check_counts(counts: Sequence[int], name: str, lengths: Sequence[int]) -> None:
    if len(counts) not in lengths:
        allowed = " or ".join(str(length) for length in lengths)
        raise ValueError(f"{name} must hold {allowed} numbers, not {list(counts)}")
    if any(not isinstance(count, int) or count < 0 for count in counts):
        raise ValueError(f"{name} must be integers from 0 on, not {list(counts)}")
    if sum(counts) == 0:
        raise ValueError(f"{name} has no channel at all")


def _check_image(image: Tensor, channels: int) -> None:
    if image.dim() != 4 or image.shape[1] != channels:
        raise ValueError(f"image must be (B, {channels}, H, W), not {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not height or not width:
        near = [
            sorted({max(1, n // SIZE_MULTIPLE + up) * SIZE_MULTIPLE for up in (0, n % 16 > 0)})
            for n in (height, width)
        ]
        raise ValueError(
            f"image is {height}x{width}, but height and width must be multiples of "
            f"{SIZE_MULTIPLE}; the nearest sizes are "
            + ", ".join(f"{h}x{w}" for h in near[0] for w in near[1])
        )
