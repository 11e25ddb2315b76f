"""The layers people import: convolutions between scales, the blocks CSNet is made of, SCFM, losses.

Every layer of CSNet takes a list with one tensor per scale (a single tensor stands for one scale)
and returns a list; channel counts are a sequence with one number per scale, or an int for one.
SCFM and the losses take tensors.
"""

from .blocks import CrossStageFusion, DilatedBank, GOctConvBNAct, ILBlock
from .dynamic_distillation import DynamicDistillation, DynamicDistillationLoss
from .layers import GOctConv, NormAct, SimplifiedGOctConv
from .losses import (
    BoundaryDiceLoss,
    DiceLoss,
    MultiLevelLoss,
    ProgressiveBoundary,
    StructurePolishingLoss,
)
from .scfm import SCFM

__all__ = [
    "SCFM",
    "BoundaryDiceLoss",
    "CrossStageFusion",
    "DiceLoss",
    "DilatedBank",
    "DynamicDistillation",
    "DynamicDistillationLoss",
    "GOctConv",
    "GOctConvBNAct",
    "ILBlock",
    "MultiLevelLoss",
    "NormAct",
    "ProgressiveBoundary",
    "SimplifiedGOctConv",
    "StructurePolishingLoss",
]
