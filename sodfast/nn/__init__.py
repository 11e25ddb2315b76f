"""The layers people import: convolutions between scales, and the blocks CSNet is made of.

Every layer takes a list with one tensor per scale (a single tensor stands for one scale) and
returns a list; channel counts are a sequence with one number per scale, or an int for one.
"""

from .blocks import CrossStageFusion, DilatedBank, GOctConvBNAct, ILBlock
from .layers import GOctConv, NormAct, SimplifiedGOctConv

__all__ = [
    "CrossStageFusion",
    "DilatedBank",
    "GOctConv",
    "GOctConvBNAct",
    "ILBlock",
    "NormAct",
    "SimplifiedGOctConv",
]
