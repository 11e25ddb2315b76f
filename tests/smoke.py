"""Smoke test of an installed sodfast, from outside the source tree: what a user gets works.

    python smoke.py SOURCE_TREE

It needs no pytest, prints a line per step, and stops with an error at the first that fails.
SODFAST_REQUIRE=cpu (backends separated by commas) makes a missing backend an error.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

INTERPRETED = """
import torch, sodfast
x, weight = torch.rand(1, 2, 4, 4), torch.rand(2, 1, 3, 3)
found = sodfast.ops.goctconv_depthwise([x], weight)
torch.testing.assert_close(found, sodfast.ops.goctconv_depthwise_reference([x], weight))
print("the Triton kernels, interpreted: ok")
"""


def outside(path: Path, tree: Path) -> bool:
    return tree not in path.resolve().parents


def main(tree: Path) -> None:
    if not outside(Path.cwd() / "here", tree):
        raise SystemExit(f"run this outside of {tree}: it would prove nothing in there")

    import torch

    import sodfast

    package = Path(sodfast.__file__)
    if not outside(package, tree):
        raise SystemExit(f"sodfast comes from the source tree, not from the wheel: {package}")
    print(f"sodfast {sodfast.__version__}, torch {torch.__version__}")
    print(sodfast.info())

    required = [name for name in os.environ.get("SODFAST_REQUIRE", "").split(",") if name]
    if "cpu" in required:
        compiled = importlib.import_module("sodfast._C")
        if not outside(Path(compiled.__file__ or ""), tree):
            raise SystemExit(f"sodfast._C comes from the source tree: {compiled.__file__}")
    for name in required:
        if name in sodfast.ops._backend.BACKENDS:  # others are built for the tests alone
            sodfast.use_backend(name)  # an error if it cannot run
    sodfast.use_backend(None)
    if "triton-interpreted" in required:
        subprocess.run(
            [sys.executable, "-c", INTERPRETED],
            env={**os.environ, "TRITON_INTERPRET": "1", "SODFAST_BACKEND": "triton"},
            check=True,
        )

    torch.manual_seed(0)
    block = sodfast.nn.ILBlock((6, 5), (7, 4))
    xs = [torch.randn(2, 6, 32, 32), torch.randn(2, 5, 16, 16)]
    sum(y.square().mean() for y in block(xs)).backward()
    if not all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters()):
        raise SystemExit("a training step through ILBlock left no finite gradients")
    print("a training step through ILBlock: ok")

    model = sodfast.create_model("csnet").eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        logits = model(image)
        with sodfast.use_backend("reference"):
            torch.testing.assert_close(model(image), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sodfast.fuse(model)(image), logits, atol=1e-4, rtol=1e-4)
    print(f"CSNet, reference, fused: {tuple(logits.shape)}, equal")

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "csnet.safetensors"
        sodfast.save(model, weights)
        with torch.inference_mode():
            torch.testing.assert_close(sodfast.load(weights)(image), logits)
        print("save and load: ok")

        from PIL import Image

        photo = Path(folder) / "photo.png"
        Image.linear_gradient("L").convert("RGB").save(photo)
        command = Path(sys.executable).with_name("sodfast")
        subprocess.run([command, "models"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [command, "predict", photo, "-o", Path(folder) / "maps", "--weights", weights],
            check=True,
        )
        made = list((Path(folder) / "maps").iterdir())
        if len(made) != 1 or Image.open(made[0]).size != (256, 256):
            raise SystemExit(f"sodfast predict left {made} instead of one map of 256x256")
        elsewhere = Path(folder) / "elsewhere"
        elsewhere.mkdir()
        subprocess.run([command, "predict", photo], check=True, cwd=elsewhere)
        if not (elsewhere / "maps" / "photo.png").is_file():
            raise SystemExit("sodfast predict without any file named left no map")
    print("the sodfast command: ok")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve())
