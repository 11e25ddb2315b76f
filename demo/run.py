"""What ``make demo`` runs: layers at work, a network that learns, and maps of photos.

python demo/run.py [--weights FILE] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import layers
import learn
import photos
import torch

import sodfast
from sodfast.predict import Predictor
from sodfast.pretrained import DEFAULT

WIDTH = 78
MARGIN = 0.15  # what the trained network's max-F must be above that of the others


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


def show_learning(output: Path) -> None:
    """Trains, eliminates channels, fine-tunes, and scores on unseen scenes."""
    heading("2 · A network that learns, and slims while it does")
    print(
        f"{learn.SCENES} synthetic scenes; CSNet with dynamic weight decay, then elimination of\n"
        "the channels that it switched off, then fine-tuning. One to two minutes.\n"
    )
    folder = output / "learning"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    start = time.monotonic()
    table = learn.learn(folder)
    before, after = table.get("trained", table["result"]), table["result"]
    print(
        f"\n{before['params']:,} parameters before the elimination, {after['params']:,} after "
        f"({after['params'] / before['params']:.0%}); {time.monotonic() - start:.0f} s"
    )
    if after["params"] == before["params"]:
        print("The clock ended the training before any channel had vanished: a busy machine.")
    print(f"\nOn {learn.UNSEEN} scenes of another seed:\n")
    print(f"  {'':18}{'max-F':>8}{'MAE':>8}")
    scores = {}
    for label, max_f, mae in learn.compare(folder / "run" / "weights.safetensors"):
        scores[label] = max_f
        print(f"  {label:18}{max_f:8.3f}{mae:8.3f}", flush=True)
    print(f"\nweights, log and curves:  {folder / 'run'}")
    trained, *others = scores.values()
    if trained < max(others) + MARGIN:
        raise RuntimeError(f"the network has not learned: less than {MARGIN} above the others")


def show_maps(weights: str, output: Path) -> None:
    """Maps of a few public-domain photos."""
    heading("3 · Saliency maps of real photos")
    sheet = output / "maps.png"
    predictor = Predictor(weights)
    height, width = predictor.size
    print(f"{predictor.name} from {weights}, {height} × {width}\n")
    for name, size, milliseconds in photos.make_sheet(predictor, sheet):
        print(f"  {name:<12}{size:>12}{milliseconds:9.1f} ms")
    print(f"\nphoto | map | cutout:  {sheet}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", default=DEFAULT, help=f"a .safetensors file for the photos ({DEFAULT})"
    )
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
        show_learning(arguments.output)
        show_maps(arguments.weights, arguments.output)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
