"""A network that learns: scenes from a generator, training, elimination, unseen scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import sodfast
from sodfast.data.synth import make_scene, write_scenes
from sodfast.metrics import SalMetric
from sodfast.predict import Predictor
from sodfast.preprocess import to_input
from sodfast.prune import estimate_statistics
from sodfast.recipe import Recipe, load_recipe
from sodfast.train import train

SCENES, UNSEEN = 800, 200
SEED, UNSEEN_SEED = 1, 2  # scenes of another seed share nothing with those it learned from
PIXELS = 96

Map = Callable[[np.ndarray], np.ndarray]  # a picture (H, W, 3) to its map (H, W), both uint8


def recipe() -> Recipe:
    return load_recipe(Path(__file__).with_name("recipe.toml"))


def learn(folder: Path) -> dict[str, dict[str, float]]:
    """Makes the scenes and trains on them; the table of `sodfast train`. RUN is folder/run."""
    with tqdm(total=SCENES, unit="scene", desc="scenes") as bar:
        write_scenes(folder / "scenes", SCENES, SEED, size=PIXELS, step=bar.update)
    return train(
        recipe(), folder / "scenes", folder / "run", device="cpu", cache_folder=folder / "cache"
    )


def untrained() -> nn.Module:
    """The recipe's network before its first step, with the statistics of a batch of scenes."""
    torch.manual_seed(recipe().seed)
    model = sodfast.create_model(recipe().model, **recipe().config)
    size = (recipe().size, recipe().size)
    scenes = [make_scene(SEED, index, PIXELS)[0] for index in range(32)]
    estimate_statistics(
        model, [torch.cat([to_input(scene, model.preprocessing, size) for scene in scenes])]
    )
    return model


def centred_gaussian(picture: np.ndarray) -> np.ndarray:
    """The map that knows nothing but where objects usually are."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    u, v = (x - (width - 1) / 2) / (width / 3), (y - (height - 1) / 2) / (height / 3)
    return (255 * np.exp(-(u**2 + v**2) / 2)).astype(np.uint8)


def compare(weights: Path) -> Iterator[tuple[str, float, float]]:
    """Yields name, max-F and MAE (SalMetric) on scenes that nothing has been trained on."""
    rivals: dict[str, Map] = {
        "trained, pruned": Predictor(weights),
        "untrained": Predictor(untrained(), size=recipe().size),
        "centred Gaussian": centred_gaussian,
    }
    scenes = [make_scene(UNSEEN_SEED, index, PIXELS)[:2] for index in range(UNSEEN)]
    for name, rival in rivals.items():
        metric = SalMetric()
        for picture, truth in tqdm(scenes, unit="scene", desc=name, leave=False):
            metric.add(rival(picture), truth)
        result = metric.result()
        yield name, float(result.max_f), float(result.mae)
