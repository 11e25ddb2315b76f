"""Does distillation help? A narrow CSNet with labels alone against labels and a teacher's maps.

    python bench/distill_csnet.py --data DUTS-TR --val ECSSD -o OUT [--seeds 3] [--set KEY=VALUE]

One half of the training pairs (by the hash of their names) keeps its labels, of the other half
only the photos are used. A teacher, CSNet x1 at 112 x 112, learns from the labelled half. Then for
each seed the student of the recipe kd-csnet learns three times, with the same settings, pictures
per step and number of steps (within an epoch, labels alone never fewer):

    labels alone            batches of labelled pictures
    labels alone, LOSS      the same with the loss that the teacher's maps have below
    distilled               batches half of labelled pictures, half of unlabelled ones with the
                            teacher's maps as their truth

What a run keeps is its best epoch on a held-out part of the labelled half; the validation set is
only scored at the end, at the networks' own size (`sodfast.validation.validate`). Writes
OUT/table.md, OUT/table.json and OUT/sheet.png (photo, truth, teacher and these).
A run that is done is not run again, one that was killed is resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # this tree's sodfast, whichever is installed

from sodfast import Predictor, count, load  # noqa: E402
from sodfast.data.cache import open_data  # noqa: E402
from sodfast.data.folders import find_pairs  # noqa: E402
from sodfast.data.grey import read_grey  # noqa: E402
from sodfast.distill import distill  # noqa: E402
from sodfast.pictures import read_image  # noqa: E402
from sodfast.recipe import Recipe, load_recipe  # noqa: E402
from sodfast.runlog import read_log  # noqa: E402
from sodfast.train import train  # noqa: E402
from sodfast.validation import validate  # noqa: E402
from sodfast.weights import atomic_write  # noqa: E402

ROWS, CELL, GAP = 8, 160, 6  # of the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="training pairs")
    parser.add_argument("--val", required=True, metavar="DIR", help="pairs that are scored")
    parser.add_argument("-o", "--output", required=True, metavar="OUT")
    parser.add_argument("--teacher", metavar="W", help="weights instead of training one")
    parser.add_argument("--teacher-epochs", type=int, default=16, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="use N training pairs only")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting"
    )
    parser.add_argument("--cache", metavar="DIR", help="where decoded pictures are kept")
    arguments = parser.parse_args()
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    labelled, unlabelled = split(arguments.data, out, arguments.limit)
    first = load_recipe("kd-csnet", arguments.set)
    options: dict[str, Any] = {"resume": True, "cache_folder": arguments.cache}

    teacher = Path(arguments.teacher or out / "teacher" / "weights.safetensors")
    if arguments.teacher is None:
        wider = ["config.width=1.0", "size=112", f"epochs={arguments.teacher_epochs}"]
        changes = [*arguments.set, *wider]
        recipe = load_recipe("kd-csnet", changes)
        once(out / "teacher", lambda: train(recipe, labelled, out / "teacher", **options))

    # An epoch is a pass over the unlabelled pictures there, over the labelled ones here. Where
    # the steps do not come out equal, labels alone gets the few more.
    kept, others = (len(path.read_text().splitlines()) for path in (labelled, unlabelled))
    kept -= round(first.held_out * kept)
    steps = first.epochs * (others // round(first.batch_size * first.unlabelled_part))
    alone_epochs = math.ceil(steps / (kept // first.batch_size))
    for seed in range(first.seed, first.seed + arguments.seeds):
        changes = [*arguments.set, f"seed={seed}"]
        alone, control, taught = arms_of(first)
        for arm, loss in ((alone, first.loss), (control, first.distill_loss)):
            recipe = load_recipe("kd-csnet", [*changes, f"epochs={alone_epochs}", f"loss={loss}"])
            place = folder(out, arm, seed)
            once(place, lambda: train(recipe, labelled, place, **options))  # noqa: B023
        recipe, place = load_recipe("kd-csnet", changes), folder(out, taught, seed)
        once(place, lambda: distill(recipe, teacher, unlabelled, place, labelled, **options))  # noqa: B023
        report(out, arguments, teacher, seed - first.seed + 1)
    draw(out, arguments, teacher)
    print((out / "table.md").read_text(encoding="utf-8"))


def arms_of(recipe: Recipe) -> tuple[str, str, str]:
    return "labels alone", f"labels alone, {recipe.distill_loss}", "distilled"


def split(data: str, out: Path, limit: int | None) -> tuple[Path, Path]:
    """Writes the two halves as lists: image and mask per line, and image per line."""
    pairs = sorted(find_pairs(data), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    pairs = pairs[:limit]
    half = len(pairs) // 2
    lists = out / "labelled.txt", out / "unlabelled.txt"
    texts = (
        "".join(f"{p.image.resolve()}\t{p.mask.resolve()}\n" for p in pairs[:half]),
        "".join(f"{p.image.resolve()}\n" for p in pairs[half:]),
    )
    for path, text in zip(lists, texts):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_write(path) as file:
                file.write(text.encode())
    return lists


def folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}"


def once(place: Path, run: Callable[[], Any]) -> None:
    if not (place / "results.json").is_file():
        print(place.name, file=sys.stderr)
        run()


def report(out: Path, arguments: argparse.Namespace, teacher: Path, seeds: int) -> None:
    """table.json and table.md of the seeds that are done."""
    recipe = load_recipe("kd-csnet", arguments.set)
    runs = [("teacher", 0, teacher, out / "teacher")]
    for seed in range(recipe.seed, recipe.seed + seeds):
        for arm in arms_of(recipe):
            place = folder(out, arm, seed)
            runs.append((arm, seed, place / "weights.safetensors", place))
    known = {}
    if (out / "table.json").is_file():
        known = {(r["arm"], r["seed"]): r for r in json.loads((out / "table.json").read_text())}
    rows = []
    for arm, seed, weights, place in runs:
        if (arm, seed) not in known:
            model = load(weights)
            side = int(model.preprocessing["size"][0])  # type: ignore[index]
            cache = open_data(arguments.val, side, arguments.cache)
            row: dict[str, Any] = {"arm": arm, "seed": seed, "params": count(model)["params"]}
            row["size"], row["pairs"] = side, len(cache)
            row.update(validate(model, cache, np.arange(len(cache)), side))
            steps = read_log(place, "step") if place.is_dir() else []
            if len(steps) > 1:
                spent = steps[-1]["seconds"] - steps[0]["seconds"]
                row["steps"] = read_log(place, "start")[-1]["steps"]
                row["seconds_per_step"] = spent / (steps[-1]["step"] - steps[0]["step"])
            known[arm, seed] = row
        rows.append(known[arm, seed])
    lines = [
        f"{time.strftime('%Y-%m-%d')}; {rows[0]['pairs']} pairs scored (SalMetric convention, at "
        "each network's size).",
        "",
        "| | seed | parameters | size | steps | s per step | max-F | MAE |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        pace = f"{row['seconds_per_step']:.3f}" if "seconds_per_step" in row else ""
        lines.append(
            f"| {row['arm']} | {row['seed'] or ''} | {row['params']:,} | {row['size']} | "
            f"{row.get('steps', '')} | {pace} | {row['max_f']:.4f} | {row['mae']:.4f} |"
        )
    for arm in arms_of(recipe):
        own = [row for row in rows if row["arm"] == arm]
        means = [statistics.fmean(row[name] for row in own) for name in ("max_f", "mae")]
        lines.append(f"| **{arm}** | mean | | | | | {means[0]:.4f} | {means[1]:.4f} |")
    for name, text in (("table.md", "\n".join(lines)), ("table.json", json.dumps(rows, indent=1))):
        with atomic_write(out / name) as file:
            file.write(text.encode() + b"\n")


def draw(out: Path, arguments: argparse.Namespace, teacher: Path) -> None:
    """sheet.png: a row per picture, chosen by the hash of its name."""
    from PIL import Image, ImageDraw, ImageFont

    recipe, val = load_recipe("kd-csnet", arguments.set), arguments.val
    arms = arms_of(recipe)
    pairs = sorted(find_pairs(val), key=lambda p: hashlib.sha256(p.name.encode()).digest())[:ROWS]
    weights = [teacher, *(folder(out, arm, recipe.seed) / "weights.safetensors" for arm in arms)]
    predictors = [Predictor(path) for path in weights]
    titles = ["photo", "truth", "teacher", *arms]
    sheet = Image.new(
        "RGB", (GAP + len(titles) * (CELL + GAP), 24 + len(pairs) * (CELL + GAP)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((GAP + column * (CELL + GAP), 5), title, "black", ImageFont.load_default(13))
    for row, pair in enumerate(pairs):
        photo = read_image(pair.image)
        cells = [photo, read_grey(pair.mask), *(predictor(photo) for predictor in predictors)]
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell)
            picture.thumbnail((CELL, CELL))
            x = GAP + column * (CELL + GAP) + (CELL - picture.width) // 2
            sheet.paste(picture, (x, 24 + row * (CELL + GAP) + (CELL - picture.height) // 2))
    with atomic_write(out / "sheet.png") as file:
        sheet.save(file, format="PNG")


if __name__ == "__main__":
    main()
