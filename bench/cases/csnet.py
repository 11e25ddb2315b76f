"""CSNet: one image through the networks as pruned by the authors; a training step of ×1."""

from functools import partial

from networks import network_work

from cases import Case

CASES = [
    *(
        Case("model", "csnet", network, False, partial(network_work, network, training=False))
        for network in ("csnet-x1-L", "csnet-x2-L")
    ),
    # Eager torch takes seconds and gigabytes for it.
    Case(
        "model", "csnet-train", "csnet-x1", True, partial(network_work, "csnet-x1", training=True),
        slow=True,
    ),
]  # fmt: skip
