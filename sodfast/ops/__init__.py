"""The ops as functions: those of goctconv take a list with one tensor per scale and return one.

Each runs on a compiled kernel where one serves the device and dtype, and on its reference in
plain torch otherwise; see :func:`sodfast.use_backend` and :func:`sodfast.info`.
"""

from .boundary import (
    boundary,
    boundary_reference,
    structure_polishing_sums,
    structure_polishing_sums_reference,
)
from .decay import adam_decay_, adam_decay_reference_, decay_, decay_reference_
from .dkd import dkd_loss, dkd_loss_reference, dkd_theta, dkd_theta_reference
from .goctconv import (
    goctconv,
    goctconv_measured,
    goctconv_measured_reference,
    goctconv_reference,
)
from .goctconv_depthwise import goctconv_depthwise, goctconv_depthwise_reference
from .goctconv_dilated import goctconv_dilated, goctconv_dilated_reference
from .goctconv_norm_act import (
    goctconv_norm_act,
    goctconv_norm_act_reference,
    goctconv_update_stats_,
    goctconv_update_stats_reference_,
)
from .goctconv_norm_depthwise import (
    goctconv_norm_depthwise,
    goctconv_norm_depthwise_reference,
)
from .ilblock import ilblock, ilblock_reference
from .scfm import scfm, scfm_reference

__all__ = [
    "adam_decay_",
    "adam_decay_reference_",
    "boundary",
    "boundary_reference",
    "decay_",
    "decay_reference_",
    "dkd_loss",
    "dkd_loss_reference",
    "dkd_theta",
    "dkd_theta_reference",
    "goctconv",
    "goctconv_depthwise",
    "goctconv_depthwise_reference",
    "goctconv_dilated",
    "goctconv_dilated_reference",
    "goctconv_measured",
    "goctconv_measured_reference",
    "goctconv_norm_act",
    "goctconv_norm_act_reference",
    "goctconv_norm_depthwise",
    "goctconv_norm_depthwise_reference",
    "goctconv_reference",
    "goctconv_update_stats_",
    "goctconv_update_stats_reference_",
    "ilblock",
    "ilblock_reference",
    "scfm",
    "scfm_reference",
    "structure_polishing_sums",
    "structure_polishing_sums_reference",
]
