"""The ops as Triton kernels: what torch.ops.sodfast runs where the backend is "triton".

One file per family, with the names and arguments of csrc/ops.cpp. They take float32, float16 and
bfloat16 and compute in float32; launch on the current stream; add without atomics, in an order
that depends on the shapes alone; and are configured by functions of the shape, not by trial.
"""

from .boundary import (
    boundary,
    boundary_backward,
    structure_polishing_sums,
    structure_polishing_sums_backward,
)
from .decay import adam_decay_, decay_
from .dkd import dkd_loss, dkd_loss_backward, dkd_theta
from .goctconv import goctconv, goctconv_grad_input, goctconv_grad_weight
from .goctconv_depthwise import (
    goctconv_depthwise,
    goctconv_depthwise_grad_input,
    goctconv_depthwise_grad_weight,
)
from .goctconv_dilated import (
    goctconv_dilated,
    goctconv_dilated_grad_input,
    goctconv_dilated_grad_weight,
)
from .goctconv_norm_act import (
    goctconv_norm_act,
    goctconv_norm_act_backward,
    goctconv_update_stats_,
)
from .scfm import scfm, scfm_backward

__all__ = [
    "adam_decay_",
    "boundary",
    "boundary_backward",
    "decay_",
    "dkd_loss",
    "dkd_loss_backward",
    "dkd_theta",
    "goctconv",
    "goctconv_depthwise",
    "goctconv_depthwise_grad_input",
    "goctconv_depthwise_grad_weight",
    "goctconv_dilated",
    "goctconv_dilated_grad_input",
    "goctconv_dilated_grad_weight",
    "goctconv_grad_input",
    "goctconv_grad_weight",
    "goctconv_norm_act",
    "goctconv_norm_act_backward",
    "goctconv_update_stats_",
    "scfm",
    "scfm_backward",
    "structure_polishing_sums",
    "structure_polishing_sums_backward",
]
