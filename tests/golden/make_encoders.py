"""Writes encoders.json: what other people's ResNet-50 and Res2Net-50 make of fixed weights.

Run once, in an environment of its own with timm, transformers, torch and numpy:

    python tests/golden/make_encoders.py

timm 1.0.31 (resnet50, res2net50d), transformers 5.23.0 (ResNetModel), torch 2.13.0. Weights,
statistics and the image come from a formula (``fill`` below, which the test has too), in
float64; per feature the file holds shape, mean, standard deviation, first and largest value.
(timm imports torchvision, which these networks do not use: an empty stub will do.)
"""

import json
from pathlib import Path

import numpy as np
import torch


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that look random but depend on the tensor's torchvision or timm name alone."""
    start = sum(ord(letter) * (i + 1) << 20 for i, letter in enumerate(name))
    # Integer arithmetic modulo 2^64: the same to the bit everywhere.
    x = (np.arange(int(np.prod(shape)), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x >> np.uint64(40)).astype(np.float64) / 2**23 - 1  # from -1 to 1
    if len(shape) == 4:
        x *= np.sqrt(6 / np.prod(shape[1:]))
    elif name.endswith(("running_var", "weight")):
        x = 1 + x / 2
    else:
        x /= 4
    return torch.from_numpy(x.reshape(shape))


def summary(features: list[torch.Tensor]) -> list[dict]:
    return [
        {
            "shape": list(y.shape),
            "mean": y.mean().item(),
            "std": y.std().item(),
            "first": y.flatten()[0].item(),
            "max": y.max().item(),
        }
        for y in features
    ]


@torch.no_grad()
def main() -> None:
    import timm
    from transformers import ResNetConfig, ResNetModel

    image = fill("image", (1, 3, 64, 96)) * 4
    found, names = {}, []
    for name in ("resnet50", "res2net50d"):
        model = timm.create_model(name, pretrained=False, features_only=True).double().eval()
        state = model.state_dict()
        model.load_state_dict(
            {key: fill(key, x.shape) if x.dim() else x for key, x in state.items()}
        )
        found[f"timm {name}"] = summary(model(image)[1:])
        names = names or list(state)
    model = ResNetModel(ResNetConfig()).double().eval()
    model.load_state_dict(
        {
            key: fill(timm_name(key), x.shape) if x.dim() else x
            for key, x in model.state_dict().items()
        }
    )
    found["transformers ResNetModel"] = summary(
        list(model(image, output_hidden_states=True).hidden_states[1:])
    )
    assert {timm_name(key) for key in model.state_dict()} == set(names)
    path = Path(__file__).with_name("encoders.json")
    networks = [
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(f) for f in features) + "\n ]"
        for name, features in found.items()
    ]
    path.write_text("{\n" + ",\n".join(networks) + "\n}\n")


def timm_name(key: str) -> str:
    """transformers' name of a tensor of ResNet-50 in timm's words."""
    words = key.split(".")
    conv, leaf = words[-2] == "convolution", words[-1]
    if words[0] == "embedder":
        return f"{'conv1' if conv else 'bn1'}.{leaf}"
    block = f"layer{int(words[2]) + 1}.{words[4]}"
    if words[5] == "shortcut":
        return f"{block}.downsample.{0 if conv else 1}.{leaf}"
    return f"{block}.{'conv' if conv else 'bn'}{int(words[6]) + 1}.{leaf}"


if __name__ == "__main__":
    main()
