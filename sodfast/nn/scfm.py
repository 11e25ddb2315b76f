"""SCFM, the semantics-guided contextual fusion module of KD-SCFNet (section 3.2)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sodfast import ops

__all__ = ["SCFM", "ConvBNReLU"]

FORMS = ("code", "paper")


class ConvBNReLU(nn.Sequential):
    """3x3 convolution with bias, batch normalisation and ReLU.

    Initialised as the authors do: Kaiming normal, fan-in, no bias.

    Args:
        in_channels, out_channels: of the convolution.
        dilation: pixels between its taps; the resolution stays.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        init_decoder(conv)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def add_to(self, plan: Any, x: Any, up: Any = None, multiply: bool = True) -> Any:
        """Add the fused layer to a :class:`sodfast.plan.PlanBuilder`; up: as of its ``conv``."""
        return plan.conv(x, self[0], self[-1], up=up, multiply=multiply)


def init_decoder(conv: nn.Conv2d) -> None:
    """Kaiming normal, fan-in; the bias is zero."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class SCFM(nn.Module):
    r"""Fuses a low, a higher and the deepest feature; the deeper ones say where the object is.

    .. math:: a = c_1(f_h + f_h \cdot \uparrow f_d), \quad
              b = c_2(f_l + f_l \cdot \uparrow f_h), \quad
              y = c_3(b + \uparrow a)

    with c a 3x3 convolution, batch normalisation and ReLU, and ↑ bilinear upsampling
    (align_corners=False). Products, sums and upsampling are one op, :func:`sodfast.ops.scfm`.

    Args:
        channels: of all three features and of the result.
        form: "code": as above, which is how the published figures came about. "paper": as the
            text has it, a = c₁(f_h · ↑f_d) + f_h and b = c₂(f_l · ↑f_d) + f_l.

    Shape: low (B, C, H, W), high and deep (B, C, any, any) to (B, C, H, W).

    Raises:
        ValueError: an unknown form.
    """

    def __init__(self, channels: int, form: str = "code") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be 'code' or 'paper', not {form!r}")
        self.form = form
        self.conv_high = ConvBNReLU(channels, channels)
        self.conv_low = ConvBNReLU(channels, channels)
        self.conv_out = ConvBNReLU(channels, channels)

    def forward(self, low: Tensor, high: Tensor, deep: Tensor) -> Tensor:
        if self.form == "code":
            a = self.conv_high(ops.scfm(high, deep))
            b = self.conv_low(ops.scfm(low, high))
        else:
            a = self.conv_high(high * _resize(deep, high)) + high
            b = self.conv_low(low * _resize(deep, low)) + low
        return self.conv_out(ops.scfm(b, a, multiply=False))

    def add_to(self, plan: Any, low: Any, high: Any, deep: Any) -> Any:
        """Add the fused module to a :class:`sodfast.plan.PlanBuilder`."""
        if self.form != "code":
            raise NotImplementedError(f"a plan has no SCFM of form {self.form!r}")
        a = self.conv_high.add_to(plan, high, deep)
        b = self.conv_low.add_to(plan, low, high)
        return self.conv_out.add_to(plan, b, a, multiply=False)

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
