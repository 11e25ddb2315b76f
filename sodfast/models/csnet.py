"""CSNet: salient object detection with 100K parameters (ECCV 2020, TPAMI 2021)."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sodfast.nn import CrossStageFusion, GOctConv, ILBlock
from sodfast.nn.blocks import DILATIONS

from .image import PREPROCESSING, check_image, preprocessing_for

BASE_CHANNELS = 20  # stage 0 and 1 at width 1, both scales together
MULTIPLES = (1, 1, 2, 4, 4)  # of the base channels, per stage
BLOCKS = (1, 3, 4, 6, 4)  # ILBlocks per stage
FUSED_STAGES = (2, 3, 4)
FUSED_CHOICES = ((4,), (3, 4), (2, 3, 4), (1, 2, 3, 4))  # TPAMI table 5
SIZE_MULTIPLE = 16  # stage 4's low resolution is a 16th of the input's


class CSNet(nn.Module):
    """CSNet: five stages of ILBlocks and a cross-stage fusion; about 94K to 789K parameters.

    Args:
        width: scales every unpruned channel count; the papers' ×k.
        split: high : low resolution channels in every block, for example (1, 0), (3, 1),
            (1, 1), (1, 3) or (0, 1).
        in_channels: of the image; 4: RGB and depth.
        channels: an explicit configuration (what pruning yields) instead of width and split:
            ``{"stages": [[[8, 10]], [[9, 10], …], …], "fuse": [12, 24, 24],
            "bank": [[1, 2, 2, 2, 4], …], "merge": 60}`` with five stages of blocks, per block
            the channels at high and low resolution (one number: high only; the last block of
            every fused stage must have one), the fusion's channels per scale, the bank's per
            scale and dilation 1, 2, 4, 8, 16 (0 = absent), and those of the merged feature.
        weight_gain: the authors' learning-rate trick, 100 in their training; see
            :class:`sodfast.nn.SimplifiedGOctConv`.
        fused_stages: the stages whose features are fused (TPAMI table 5): (4,), (3, 4),
            (2, 3, 4) or (1, 2, 3, 4). The first of them has the resolution of the fusion: an
            8th, a 4th, half or all of the image's.

    Shape: image (B, in_channels, H, W), H and W multiples of 16, to logits (B, 1, H, W); the
    sigmoid is the caller's.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
    """

    name = "csnet"
    size_multiple = SIZE_MULTIPLE

    def __init__(
        self,
        width: float = 1.0,
        split: Sequence[float] = (1, 1),
        in_channels: int = 3,
        channels: dict[str, Any] | None = None,
        weight_gain: float = 1.0,
        fused_stages: Sequence[int] = FUSED_STAGES,
    ) -> None:
        super().__init__()
        if channels is None:
            channels = csnet_channels(width, split, fused_stages)
        elif width != 1.0 or tuple(split) != (1, 1):
            raise ValueError(
                f"width={width} and split={tuple(split)} have no meaning when channels are given"
            )
        self.fused_stages = _checked_stages(fused_stages)
        channels = _checked(channels, self.fused_stages)
        self.preprocessing: dict[str, Any] = preprocessing_for(PREPROCESSING, in_channels)
        # Width and split are resolved into channels here, so that the file says what it holds.
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": channels,
            "weight_gain": weight_gain,
            "fused_stages": list(self.fused_stages),
        }
        self.stages = make_stages(channels["stages"], in_channels, weight_gain)
        self.fusion = CrossStageFusion(
            [channels["stages"][stage][-1][0] for stage in self.fused_stages],
            channels["fuse"],
            channels["bank"],
            channels["merge"],
            weight_gain=weight_gain,
        )
        self.head = GOctConv(channels["merge"], 1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, self.config["in_channels"], SIZE_MULTIPLE)
        xs = [image]
        features = []
        for stage, blocks in enumerate(self.stages):
            xs = blocks(xs)
            if stage in self.fused_stages:
                features.append(xs[0])
        logits = self.head(self.fusion(features))[0]
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)

    def add_to(self, plan: Any, image: Any) -> Any:
        """Add the fused network to a :class:`sodfast.plan.PlanBuilder`."""
        xs = [image]
        features = []
        for stage, blocks in enumerate(self.stages):
            for block in blocks.children():
                xs = cast(Any, block).add_to(plan, xs)
            if stage in self.fused_stages:
                features.append(xs[0])
        (logits,) = self.fusion.add_to(plan, features, self.head)
        return plan.upsample(logits)


def make_stages(
    stages: Sequence[Sequence[Sequence[int]]],
    in_channels: int,
    weight_gain: float,
    block_class: type[nn.Module] = ILBlock,
) -> nn.ModuleList:
    """The feature extractor: a Sequential of blocks per stage.

    Args:
        stages: channels per stage, block and scale.
        in_channels: of the image.
        weight_gain: of the blocks' depthwise layers.
        block_class: called like :class:`sodfast.nn.ILBlock`.
    """
    previous: Sequence[int] = (in_channels,)
    modules = []
    for stage, block_channels in enumerate(stages):
        blocks = []
        for block, out in enumerate(block_channels):
            down = block == 0 and stage >= 2  # halves the resolution
            kernel_size = 3 if down or stage == 0 else 1
            blocks.append(block_class(previous, out, kernel_size, 2 if down else 1, weight_gain))
            previous = out
        modules.append(nn.Sequential(*blocks))
    return nn.ModuleList(modules)


def csnet_channels(
    width: float = 1.0,
    split: Sequence[float] = (1, 1),
    fused_stages: Sequence[int] = FUSED_STAGES,
) -> dict[str, Any]:
    """The unpruned channel configuration at a width, a high : low split and fused stages.

    Raises:
        ValueError: a width that leaves no channels, a split that is no ratio, or stages that
            cannot be fused.
    """
    fused_stages = _checked_stages(fused_stages)
    stages = stage_channels(width, split, fused_stages)
    # A third of the feature, but of stage 1 a quarter: TPAMI table 1 prints 5, 13, 26 and 26
    # for 20, 40, 80 and 80. (A third of 20 would be 6; that it is a quarter at other widths
    # too is our inference.)
    fuse = [stages[stage][-1][0] // (4 if stage == 1 else 3) for stage in fused_stages]
    return {"stages": stages, "fuse": fuse, "bank": bank_channels(fuse), "merge": sum(fuse)}


def stage_channels(
    width: float, split: Sequence[float], one_scale: Sequence[int]
) -> list[list[list[int]]]:
    """The unpruned channels per stage, block and scale.

    The last blocks of the stages in ``one_scale`` have the high resolution only.
    """
    base = round(BASE_CHANNELS * width)
    if base < 2:
        raise ValueError(f"width must be at least 0.1, not {width}")
    if len(split) != 2 or min(split) < 0 or sum(split) <= 0:
        raise ValueError(f"split must be (high, low), from 0 on and not both 0: {tuple(split)}")
    stages = []
    for stage, (multiple, blocks) in enumerate(zip(MULTIPLES, BLOCKS)):
        total = multiple * base
        high = round(total * split[0] / sum(split))
        stages.append([[high, total - high] for _ in range(blocks)])
        if stage in one_scale:
            stages[-1][-1] = [total]
    return stages


def bank_channels(fuse: Sequence[int]) -> list[list[int]]:
    """A dilated bank's channels per scale and dilation: a fifth each, the rest to the largest."""
    bank = []
    for count in fuse:
        share = count // len(DILATIONS)
        bank.append([share] * (len(DILATIONS) - 1) + [count - share * (len(DILATIONS) - 1)])
    return bank


def _checked_stages(fused_stages: Sequence[int]) -> tuple[int, ...]:
    if tuple(fused_stages) not in FUSED_CHOICES:
        choices = ", ".join(str(choice) for choice in FUSED_CHOICES)
        raise ValueError(f"fused_stages must be one of {choices}, not {tuple(fused_stages)}")
    return tuple(fused_stages)


def _checked(channels: dict[str, Any], fused_stages: Sequence[int]) -> dict[str, Any]:
    """A channel configuration as plain lists of ints, or a ValueError that names the place."""
    if set(channels) != {"stages", "fuse", "bank", "merge"}:
        raise ValueError(
            f"channels must have stages, fuse, bank and merge, not {', '.join(sorted(channels))}"
        )
    stages = check_stages(channels["stages"], fused_stages)
    return {"stages": stages, **check_fusion(channels, len(fused_stages))}


def check_stages(given: Any, one_scale: Sequence[int]) -> list[list[list[int]]]:
    """``channels["stages"]`` as plain lists of ints, or a ValueError that names the place."""
    stages = [[list(block) for block in stage] for stage in given]
    if len(stages) != len(BLOCKS) or not all(stages):
        raise ValueError(f"channels['stages'] must be {len(BLOCKS)} lists of blocks: {stages}")
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage):
            most = 1 if s in one_scale and b == len(stage) - 1 else 2
            _check_counts(block, f"channels['stages'][{s}][{b}]", range(1, most + 1))
    return stages


def check_fusion(channels: dict[str, Any], scales: int) -> dict[str, Any]:
    """fuse, bank and merge of channels as plain lists of ints, or a ValueError."""
    fuse, bank, merge = channels["fuse"], channels["bank"], channels["merge"]
    _check_counts(fuse, "channels['fuse']", (scales,))
    if len(bank) != scales:
        raise ValueError(f"channels['bank'] must have {scales} scales: {bank}")
    _check_counts([c for row in bank for c in row], "channels['bank']", (scales * len(DILATIONS),))
    _check_counts([merge], "channels['merge']", (1,))
    return {"fuse": list(fuse), "bank": [list(row) for row in bank], "merge": merge}


def _check_counts(counts: Sequence[int], name: str, lengths: Sequence[int]) -> None:
    if len(counts) not in lengths:
        allowed = " or ".join(str(length) for length in lengths)
        raise ValueError(f"{name} must hold {allowed} numbers, not {list(counts)}")
    if any(not isinstance(count, int) or count < 0 for count in counts):
        raise ValueError(f"{name} must be integers from 0 on, not {list(counts)}")
    if sum(counts) == 0:
        raise ValueError(f"{name} has no channel at all")
