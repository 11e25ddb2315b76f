"""CSNet's feature extractor alone, of ILBlocks or of OctConv throughout (TPAMI table 6)."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sodfast.nn import GOctConv, ILBlock

from .csnet import SIZE_MULTIPLE, check_stages, make_stages, stage_channels
from .image import PREPROCESSING, check_image, preprocessing_for


class OctConvBlock(ILBlock):
    """ILBlock whose two depthwise layers are 3x3 OctConv: every scale to every scale.

    Arguments and shapes as of :class:`sodfast.nn.ILBlock`; ``weight_gain`` is that of the
    depthwise layers and has nothing left to act on.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        kernel_size: int = 1,
        stride: int = 1,
        weight_gain: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        for name in ("conv2", "conv3"):
            self.add_module(name, GOctConv(out_channels, out_channels, 3))

    def add_to(self, plan: Any, xs: Sequence[Any]) -> list[Any]:
        """Add the fused block to a :class:`sodfast.plan.PlanBuilder`."""
        for conv in (self.conv1, self.conv2, self.conv3):
            xs = plan.block(conv, xs, conv)
        return list(xs)


class Extractor(nn.Module):
    """CSNet without the cross-stage fusion: ILBlocks and a 1x1 convolution; 179,501 parameters.

    Args:
        width, split, in_channels, weight_gain: as of :class:`sodfast.models.CSNet`.
        channels: an explicit configuration instead of width and split: ``{"stages": …}`` as of
            CSNet.

    Shape: image (B, in_channels, H, W), H and W multiples of 16, to logits (B, 1, H, W),
    upsampled from an 8th of the resolution.

    Raises:
        ValueError: an impossible configuration, or an image of the wrong rank or size.
    """

    name = "extractor"
    size_multiple = SIZE_MULTIPLE
    block_class: type[nn.Module] = ILBlock
    # The papers do not say where a stage ends in one scale when nothing is fused, and the
    # parameters are the same. With the last stage alone the work is the table's (within 2 %);
    # with stages 2 to 4, as in CSNet, it would be 9 % more at 5/5.
    one_scale: tuple[int, ...] = (4,)

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
            channels = {"stages": stage_channels(width, split, self.one_scale)}
        elif width != 1.0 or tuple(split) != (1, 1):
            raise ValueError(
                f"width={width} and split={tuple(split)} have no meaning when channels are given"
            )
        if set(channels) != {"stages"}:
            raise ValueError(f"channels must have stages alone, not {', '.join(sorted(channels))}")
        stages = check_stages(channels["stages"], one_scale=(4,))
        self.preprocessing: dict[str, Any] = preprocessing_for(PREPROCESSING, in_channels)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": {"stages": stages},
            "weight_gain": weight_gain,
        }
        self.stages = make_stages(stages, in_channels, weight_gain, self.block_class)
        self.head = GOctConv(stages[-1][-1], 1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, self.config["in_channels"], SIZE_MULTIPLE)
        xs = [image]
        for blocks in self.stages:
            xs = blocks(xs)
        logits = self.head(xs)[0]
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)

    def add_to(self, plan: Any, image: Any) -> Any:
        """Add the fused network to a :class:`sodfast.plan.PlanBuilder`."""
        xs = [image]
        for blocks in self.stages:
            for block in blocks.children():
                xs = cast(Any, block).add_to(plan, xs)
        (logits,) = plan.block(self.head, xs, self.head)
        return plan.upsample(logits)


class Vanilla(Extractor):
    """:class:`Extractor` of OctConv throughout: every 3x3 crosses scales; 1,456,781 parameters.

    What the papers compare the ILBlock with. Arguments, shapes and errors as of Extractor.
    """

    name = "vanilla"
    block_class = OctConvBlock
    # The table's 3.31 G again tell; with the last stage alone it would be 14 % less.
    one_scale = (2, 3, 4)
