"""What ``make demo`` runs: a layer at work, and maps of photos when there are weights.

python demo/run.py [--weights FILE] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import layers
import photos
import torch

import sodfast
from sodfast.predict import Predictor

WIDTH = 78


def heading(text: str) -> None:
    print(f"\n{text}\n{'─' * WIDTH}")


def show_layers() -> None:
    """A table of the layers of demo/layers.py, with a bar for each form's time."""
    heading("1 · Layers that drop into a network of yours")
    print(
        f"Inference, batch 1, {torch.get_num_threads()} threads, medians of "
        f"{layers.ROUNDS} interleaved runs:\n"
    )
    for case in layers.CASES:
        times = layers.measure(case)
        print(f"{case.name}\n  {case.shapes}")
        eager = times.milliseconds["eager torch"]
        for form, milliseconds in times.milliseconds.items():
            bar = "█" * max(1, round(30 * milliseconds / eager))
            print(f"  {form:<14}{milliseconds:8.2f} ms  {eager / milliseconds:5.1f}×  {bar}")
        print(f"  largest difference from eager torch: {times.difference:.0e}\n")
    print("'eager torch' is the same layer in plain torch, which is also what the tests compare")
    print("with. 'ops' are the compiled kernels one by one, as in training; 'fused' is what")
    print("sodfast.fuse(module) returns. Bars longer than the first are slower than torch.")


def show_maps(weights: Path | None, output: Path) -> None:
    """Maps of a few public-domain photos, or how to get them."""
    heading("2 · Saliency maps of real photos")
    if weights is None:
        print("No weights were given, so there is nothing to see here yet: sodfast ships no")
        print("trained weights of its own so far. With a file of yours:\n")
        print("  make demo WEIGHTS=csnet.safetensors")
        print("\nREADME.md says how to make one from a published checkpoint.")
        return
    sheet = output / "maps.png"
    predictor = Predictor(weights)
    height, width = predictor.size
    print(f"{predictor.name} from {weights}, {height} × {width}\n")
    for name, size, milliseconds in photos.make_sheet(predictor, sheet):
        print(f"  {name:<12}{size:>12}{milliseconds:9.1f} ms")
    print(f"\nphoto | map | cutout:  {sheet}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a .safetensors file of sodfast")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "out",
        help="folder for the picture sheet (default: demo/out)",
    )
    arguments = parser.parse_args()
    print(sodfast.info())
    try:
        sodfast.use_backend("cpu")  # the demo is of the compiled kernels, of nothing else
        show_layers()
        show_maps(arguments.weights, arguments.output)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
