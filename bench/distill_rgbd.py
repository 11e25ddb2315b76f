"""Dynamic distillation with noise elimination where a share of the depth maps is damaged.

    python bench/distill_rgbd.py -o OUT [--seeds 3] [--fixed 0.3 0.5 0.7] [--set KEY=VALUE]

Makes synthetic scenes with depth (`sodfast data synth --depth --damage 0.3`), trains a teacher, a
wider CSNet, with cross-entropy, and then for each seed the student of the recipe rgbd-csnet in
several ways, all with the same pictures in the same order, the same number of steps and the same
settings:

    cross-entropy               the truth alone
    fixed s                     s of the teacher, 1 − s of the truth, whatever the picture
    dynamic                     θ from how good teacher and student are on the picture (Eq. 3)
    dynamic, noise elimination  and 0.01 where the teacher's IoU is at most 0.5 (Eq. 6)

Nothing is held out or selected: the last epoch counts. Each network is scored at the end on
other scenes of the same kind, by the conventions of `sodfast eval`, together and apart by whether
the depth map is damaged. What the threshold caught is counted in the last epoch of each run with
it: of the pictures whose α was at most the threshold, how many have a damaged depth map
(precision), and how many of those that have one it caught (recall), also by the kind of damage.

Writes OUT/table.md and OUT/table.json after every run, and OUT/sheet.png. A run that is done is
not run again, one that was killed is resumed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # this tree's sodfast, whichever is installed

from tqdm import tqdm  # noqa: E402

from sodfast import Predictor, count, load  # noqa: E402
from sodfast.data.folders import find_pairs  # noqa: E402
from sodfast.data.grey import read_grey  # noqa: E402
from sodfast.data.synth import write_scenes  # noqa: E402
from sodfast.data.synth_depth import DAMAGES, damage_of, read_damage  # noqa: E402
from sodfast.evaluate import evaluate_network  # noqa: E402
from sodfast.metrics import Scores  # noqa: E402
from sodfast.pictures import read_image  # noqa: E402
from sodfast.recipe import Recipe, load_recipe  # noqa: E402
from sodfast.runlog import read_log, read_teaching  # noqa: E402
from sodfast.train import train  # noqa: E402
from sodfast.weights import atomic_write  # noqa: E402

RECIPE = "rgbd-csnet"
TRAIN_SEED, VAL_SEED = 7001, 7002  # of the scenes
TEACHER = ["loss=bce", "held_out=0.0", "seed=101"]
ROWS, CELL, GAP = 8, 130, 6  # of the sheet
FIGURES = {"max_f": "max-F", "mean_f": "mean F", "weighted_f": "weighted F", "mae": "MAE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", required=True, metavar="OUT")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--fixed", type=float, nargs="*", default=[0.5], metavar="S")
    parser.add_argument("--scenes", type=int, default=1200, metavar="N", help="to learn from")
    parser.add_argument("--val-scenes", type=int, default=400, metavar="N", help="to score on")
    parser.add_argument("--damage", type=float, default=0.3, metavar="SHARE")
    parser.add_argument("--teacher-width", type=float, default=1.5, metavar="W")
    parser.add_argument("--teacher-epochs", type=int, default=20, metavar="N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all"
    )
    parser.add_argument("--cache", metavar="DIR", help="where decoded pictures are kept")
    arguments = parser.parse_args()
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    cache = arguments.cache or out / "cache"
    data = scenes(out / "scenes", arguments.scenes, TRAIN_SEED, arguments.damage)
    val = scenes(out / "val-scenes", arguments.val_scenes, VAL_SEED, arguments.damage)

    wide = [f"config.width={arguments.teacher_width}", f"epochs={arguments.teacher_epochs}"]
    teacher = out / "teacher" / "weights.safetensors"
    once(out / "teacher", load_recipe(RECIPE, [*arguments.set, *TEACHER, *wide]), data, cache, None)
    rows = [row(out, "teacher", 0, val)]
    report(out, rows, arguments)
    first = load_recipe(RECIPE, arguments.set).seed
    for seed in range(first, first + arguments.seeds):
        for arm, settings in arms(arguments.fixed).items():
            own = [*arguments.set, "held_out=0.0", f"seed={seed}", *settings]
            place, recipe = out / folder(arm, seed), load_recipe(RECIPE, own)
            once(place, recipe, data, cache, teacher if recipe.loss == "dkd" else None)
            rows.append(row(out, arm, seed, val))
            report(out, rows, arguments)
    draw(out, list(arms(arguments.fixed)), val, first)
    print((out / "table.md").read_text(encoding="utf-8"))


def arms(fixed: list[float]) -> dict[str, list[str]]:
    """Each way of learning, and its settings."""
    return {
        "cross-entropy": ["loss=bce"],
        **{f"fixed {s:g}": [f"dkd.fixed_weight={s}"] for s in fixed},
        "dynamic": ["dkd.threshold=0.0"],
        "dynamic, noise elimination": [],
    }


def scenes(folder: Path, n: int, seed: int, damage: float) -> Path:
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")  # of a run that was killed
        shutil.rmtree(part, ignore_errors=True)
        with tqdm(total=n, unit="scene", desc=folder.name, disable=None) as bar:
            write_scenes(part, n, seed, depth=True, size=160, step=bar.update, damage=damage)
        part.rename(folder)
    wanted = {f"{i:06d}": damage_of(seed, i, damage) for i in range(n)}
    listed = folder / "damage.csv"
    if not listed.is_file() or read_damage(listed) != wanted:
        sys.exit(f"{folder} holds other scenes than these {n}: choose another -o")
    return folder


def folder(arm: str, seed: int) -> str:
    return arm if not seed else f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def once(place: Path, recipe: Recipe, data: Path, cache: Path, teacher: Path | None) -> None:
    if (place / "results.json").is_file():
        then = read_log(place, "start")[-1]["recipe"]
        changed = [key for key, value in recipe.as_dict().items() if then.get(key) != value]
        if changed:
            sys.exit(f"{place} was run with other settings ({', '.join(changed)})")
        return
    print(place.name, file=sys.stderr)
    train(recipe, data, place, resume=True, cache_folder=cache, teacher=teacher)


def row(out: Path, arm: str, seed: int, val: Path) -> dict[str, Any]:
    """The scores of a run, computed once (scores.json in its folder)."""
    place = out / folder(arm, seed)
    known = place / "scores.json"
    if known.is_file():
        return dict(json.loads(known.read_text(encoding="utf-8")))
    damage = read_damage(val / "damage.csv")
    weights = place / "weights.safetensors"
    evaluation = evaluate_network(Predictor(weights), val)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "params": count(load(weights))["params"]}
    for part, wanted in (("all", None), ("intact", False), ("damaged", True)):
        scores = Scores()
        for scored in evaluation.maps:
            if wanted is None or bool(damage[scored.name]) == wanted:
                scores.add(scored.scores)
        if scores.images:
            figures = scores.figures()["pysodmetrics"]
            found[part] = {name: figures[name] for name in FIGURES}
    steps = read_log(place, "step")
    if len(steps) > 1:
        spent = steps[-1]["seconds"] - steps[0]["seconds"]
        found["seconds_per_step"] = spent / (steps[-1]["step"] - steps[0]["step"])
    found["steps"] = read_log(place, "start")[-1]["steps"]
    recipe = read_log(place, "start")[-1]["recipe"]
    if recipe["loss"] == "dkd":
        found["caught"] = caught(place, read_damage(out / "scenes" / "damage.csv"), recipe)
    with atomic_write(known) as file:
        file.write(json.dumps(found, indent=1).encode())
    return found


def caught(place: Path, damage: dict[str, str], recipe: dict[str, Any]) -> dict[str, Any]:
    """What the threshold would catch, or did, in the last epoch of a run."""
    lines = read_teaching(place)
    per_epoch = read_log(place, "start")[-1]["steps"] // recipe["epochs"]
    last = lines[-per_epoch:]
    alpha = {n: a for line in last for n, a in zip(line["names"], line["alpha"])}
    theta = [t for line in last for t in line["theta"]]
    threshold = recipe["dkd"].get("threshold") or 0.5
    low = {name for name, value in alpha.items() if value <= threshold}
    bad = {name for name in alpha if damage[name]}
    return {
        "pictures": len(alpha),
        "damaged": len(bad),
        "caught": len(low),
        "precision": len(low & bad) / len(low) if low else None,
        "recall": len(low & bad) / len(bad) if bad else None,
        "recall_by_kind": {
            kind: statistics.fmean([n in low for n in bad if damage[n] == kind] or [0])
            for kind in DAMAGES
        },
        "mean_theta": statistics.fmean(theta),
        "mean_alpha_intact": statistics.fmean([a for n, a in alpha.items() if n not in bad] or [0]),
        "mean_alpha_damaged": statistics.fmean([alpha[n] for n in bad] or [0]),
    }


def report(out: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """table.json and table.md of the runs that are done."""
    recipe = load_recipe(RECIPE, arguments.set)
    parts = [part for part in ("all", "intact", "damaged") if part in rows[0]]
    lines = [
        f"{time.strftime('%Y-%m-%d')}: {arguments.scenes} scenes, {arguments.damage:.0%} of the "
        f"depth maps damaged, at {recipe.size} × {recipe.size}; {arguments.val_scenes} others "
        "scored at their own size (PySODMetrics convention).",
        "",
        "| | seed | parameters | steps | s per step | "
        + " | ".join(FIGURES.values())
        + " | "
        + " | ".join(f"max-F, {part}" for part in parts[1:])
        + " |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(FIGURES) + len(parts) - 1),
    ]

    def cells(entries: list[dict[str, Any]]) -> str:
        places = [("all", name) for name in FIGURES] + [(part, "max_f") for part in parts[1:]]
        return " | ".join(
            f"{statistics.fmean(e[part][name] for e in entries):.4f}" for part, name in places
        )

    for entry in rows:
        lines.append(
            f"| {entry['arm']} | {entry['seed'] or ''} | {entry['params']:,} | {entry['steps']} | "
            f"{entry.get('seconds_per_step', float('nan')):.3f} | {cells([entry])} |"
        )
    for arm in arms(arguments.fixed):
        own = [entry for entry in rows if entry["arm"] == arm]
        if own:
            lines.append(f"| **{arm}** | mean of {len(own)} | | | | {cells(own)} |")
    taught = [entry for entry in rows if "caught" in entry]
    if taught:
        lines += [
            "",
            "What α ≤ 0.5 caught in the last epoch (only with noise elimination does it matter):",
            "",
            "| | seed | damaged | caught | precision | recall | "
            + " | ".join(f"recall, {kind}" for kind in DAMAGES)
            + " | α, intact | α, damaged | θ |",
            "|---|" + "---:|" * (8 + len(DAMAGES)),
        ]
    for entry in taught:
        found = entry["caught"]
        rates = [found["precision"], found["recall"], *found["recall_by_kind"].values()]
        rates += [found[f"mean_{k}"] for k in ("alpha_intact", "alpha_damaged", "theta")]
        lines.append(
            f"| {entry['arm']} | {entry['seed']} | {found['damaged']} of {found['pictures']} | "
            f"{found['caught']} | "
            + " | ".join("–" if rate is None else f"{rate:.3f}" for rate in rates)
            + " |"
        )
    for name, text in (("table.md", "\n".join(lines)), ("table.json", json.dumps(rows, indent=1))):
        with atomic_write(out / name) as file:
            file.write(text.encode() + b"\n")


def draw(out: Path, names: list[str], val: Path, seed: int) -> None:
    """sheet.png: photo, depth, truth and each network's map; the first scenes of each damage."""
    from PIL import Image, ImageDraw, ImageFont

    damage = read_damage(val / "damage.csv")
    pairs = find_pairs(val, depth=True)
    chosen = [
        p for kind in ("", *DAMAGES) for p in [q for q in pairs if damage[q.name] == kind][:2]
    ]
    places = [out / "teacher", *(out / folder(arm, seed) for arm in names)]
    predictors = [Predictor(place / "weights.safetensors") for place in places]
    titles = ["photo", "depth", "truth", "teacher", *names]
    size = (GAP + len(titles) * (CELL + GAP), 24 + len(chosen[:ROWS]) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        short = title.replace("dynamic, noise elimination", "dynamic, noise el.")
        pen.text((GAP + column * (CELL + GAP), 5), short, "black", ImageFont.load_default(13))
    for number, pair in enumerate(chosen[:ROWS]):
        assert pair.depth is not None
        cells = [read_image(pair.image), read_grey(pair.depth), read_grey(pair.mask)]
        cells += [predictor(pair.image, pair.depth) for predictor in predictors]
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell)
            picture.thumbnail((CELL, CELL))
            x = GAP + column * (CELL + GAP) + (CELL - picture.width) // 2
            sheet.paste(picture, (x, 24 + number * (CELL + GAP) + (CELL - picture.height) // 2))
    with atomic_write(out / "sheet.png") as file:
        sheet.save(file, format="PNG")


if __name__ == "__main__":
    main()
