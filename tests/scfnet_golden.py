"""The golden values of SCFNet, its state dicts translated to the names of ours."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sodfast.models.encoder_names import paddle_name
from sodfast.models.scfnet import SCFNet

DECODER = {"mp.cv": "reduce", "de": "fusions", "linear": "heads"}


def theirs(model: SCFNet) -> dict[str, str]:
    """For every entry of our state dict (but batch counters) the original's name."""
    found = {}
    for name in model.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        first, *rest = name.split(".")
        if first == "encoder":
            found[name] = "bkbone." + paddle_name(".".join(rest))
            continue
        if first == "reduce":
            place = [f"mp.cv{int(rest[0]) + 1}", *rest[1:]]
        elif first == "deepen":
            place = ["cv1", *rest]
        elif first == "fusions":  # ours from deep to shallow, theirs from shallow to deep
            number = {"conv_high": 1, "conv_low": 2, "conv_out": 3}[rest[1]]
            place = [f"de{3 - int(rest[0])}", f"cv{number}", *rest[2:]]
        else:
            place = [f"linear{int(rest[0]) + 2}", *rest[1:]]
        leaf = {"running_mean": "_mean", "running_var": "_variance"}
        found[name] = ".".join((*place[:-1], leaf.get(place[-1], place[-1])))
    return found


def translated(model: SCFNet, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our names to the golden tensors whose names begin with `prefix`; those that are there."""
    pairs = theirs(model).items()
    return {ours: tensors[prefix + name] for ours, name in pairs if prefix + name in tensors}


def load(model: SCFNet, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Gives the model the golden state dict of that prefix, all of it."""
    state = translated(model, tensors, prefix)
    left = [key for key in tensors if key.startswith(prefix)]
    assert len(state) == len(left), "names do not match"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


def read(shared: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "scfnet.safetensors")
