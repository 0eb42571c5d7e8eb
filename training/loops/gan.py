"""What the trainings of generators share: the loop of the game, and looking at what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from app.tasks.image_generation import sheet
from training.configs import GanConfig
from training.loops import distributed
from training.run import Run, permutation

MOST_SHEETS = 25  # pictures of samples that a run leaves, one an epoch or fewer


def play(run: Run, game: Any, images: Tensor, labels: Tensor | None, config: GanConfig, epochs: int) -> None:
    """The whole game on uint8 images [N, C, S, S], of labels [N] where the game has some."""
    run.track(
        generator=game.generator,
        discriminator=game.discriminator,
        average=game.average,
        generating=game.generating,
        telling=game.telling,
    )
    per_epoch = len(images) // config.batch
    total, shuffled = epochs * per_epoch, -1
    sheets = max(1, epochs // MOST_SHEETS)
    for step in run.steps(total):
        epoch, place = divmod(step, per_epoch)
        if shuffled != epoch:
            shuffled, order = epoch, permutation(len(images), run.options.seed, "epoch", epoch)
        batch = order[place * config.batch : (place + 1) * config.batch]
        real = images[batch].float() / 127.5 - 1
        rate = config.learning_rate * min(1.0, (1 - step / total) / 0.3)  # to 0 over the last 30 %
        given = (real,) if labels is None else (real, labels[batch])
        told, fooled = game.update(*given, step, rate)
        if place == per_epoch - 1:
            run.log(epoch=epoch + 1, discriminator_loss=told.item(), generator_loss=fooled.item())
            if (epoch + 1) % sheets == 0 and distributed.rank() == 0:
                save_sheet(run.folder / f"epoch-{epoch + 1:03}.png", game.shown(), None if labels is None else 10)


def save_sheet(path: Path, images: np.ndarray, columns: int | None = None) -> Path:
    """Images [N, channels, side, side], uint8 -> a sheet of them, twice the size, as nearly square as may be."""
    drawn = sheet(images, columns=columns)
    picture = Image.fromarray(drawn[0] if len(drawn) == 1 else drawn.transpose(1, 2, 0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
    return path
