"""The ops of the goctconv family, on layers of CSNet at 224x224.

Inference is one image through the layer of the fused network, so that the convolutions come
with their epilogue (bias and PReLU). Training is forward and backward of a batch of 8.
"""

from functools import partial

from networks import layer_work

from cases import Case

INFERENCE = {
    "goctconv": (
        ("csnet-x2-L", "stages.0.0.conv1"),  # 3x3 on the image
        ("csnet-x2-L", "stages.1.1.conv1"),  # 1x1, two scales, full resolution
        ("csnet-x2-L", "stages.2.0.conv1"),  # 3x3, stride 2
        ("csnet-x1-L", "stages.3.1.conv1"),
        ("csnet-x2", "stages.3.1.conv1"),  # unpruned: the widest
        ("csnet-x2-L", "fusion.mix.conv"),  # 3 scales to 3
        ("csnet-x2-L", "fusion.merge.conv"),  # 3 scales to 1
    ),
    "goctconv_depthwise": (
        ("csnet-x2-L", "stages.1.1.conv2"),
        ("csnet-x2-L", "stages.3.1.conv2"),
        ("csnet-x1-L", "stages.4.1.conv2"),  # the smallest: what a call costs
    ),
    "goctconv_dilated": (("csnet-x2-L", "fusion.bank"),),
    "goctconv_norm_act": (("csnet-x2-L", "stages.1.1.norm1"),),
}
TRAINING = {
    "goctconv": (
        ("csnet-x1", "stages.0.0.conv1"),
        ("csnet-x1", "stages.1.1.conv1"),
        ("csnet-x1", "stages.2.0.conv1"),
        ("csnet-x1", "stages.3.1.conv1"),
    ),
    "goctconv_depthwise": (("csnet-x1", "stages.1.1.conv2"), ("csnet-x1", "stages.3.1.conv2")),
    "goctconv_dilated": (("csnet-x1", "fusion.bank"),),
    "goctconv_norm_act": (("csnet-x1", "stages.1.1.norm1"), ("csnet-x1", "stages.3.1.norm1")),
}

CASES = [
    Case("op", op, f"{network} {layer}", training, partial(layer_work, network, layer, training))
    for op in INFERENCE
    for training, layers in ((False, INFERENCE), (True, TRAINING))
    for network, layer in layers[op]
]
