"""The ops as functions: a list with one tensor per scale in, a list out.

Each runs on a compiled kernel where one serves the device and dtype, and on its reference in
plain torch otherwise; see :func:`sodfast.use_backend` and :func:`sodfast.info`.
"""

from .decay import adam_decay_, adam_decay_reference_, decay_, decay_reference_
from .goctconv import goctconv, goctconv_reference
from .goctconv_depthwise import goctconv_depthwise, goctconv_depthwise_reference
from .goctconv_dilated import goctconv_dilated, goctconv_dilated_reference
from .goctconv_norm_act import (
    goctconv_norm_act,
    goctconv_norm_act_reference,
    goctconv_update_stats_,
    goctconv_update_stats_reference_,
)

__all__ = [
    "adam_decay_",
    "adam_decay_reference_",
    "decay_",
    "decay_reference_",
    "goctconv",
    "goctconv_depthwise",
    "goctconv_depthwise_reference",
    "goctconv_dilated",
    "goctconv_dilated_reference",
    "goctconv_norm_act",
    "goctconv_norm_act_reference",
    "goctconv_reference",
    "goctconv_update_stats_",
    "goctconv_update_stats_reference_",
]
