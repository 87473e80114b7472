"""Pictures of samples, curves, and what the experts do.

Letters: N images, S pixels of a side, L blocks, E experts, J spans of steps.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moectl.engine import plot
from moectl.engine.files import write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from moectl.diffusion.model import UNet
    from moectl.diffusion.process import GaussianDiffusion
    from moectl.diffusion.settings import DiffusionSettings

_ROWS, _COLUMNS = 10, 8  # of the picture that a training draws
_STEPS = 20
_STRIP = 16  # images of a network in a comparison


def write_samples(
    path: Path,
    model: "UNet",
    diffusion: "GaussianDiffusion",
    accelerator: "Accelerator",
    classes: int,
    settings: "DiffusionSettings",
) -> None:
    """Draw samples of every class, a row each, from the same noise every time.

    They are made in this process alone, by 20 steps of DPM-Solver++, or as many as there are.
    """
    import torch

    from moectl.diffusion.solvers import denoise, first_noise, guided

    labels = torch.arange(min(classes, _ROWS)).repeat_interleave(_COLUMNS)
    seeds = range(len(labels))
    ask = guided(model, labels.to(accelerator.device), 1.0)
    noise = first_noise(seeds, settings.data.image_size).to(accelerator.device)
    with accelerator.autocast():
        steps = min(_STEPS, diffusion.steps)
        images = denoise(ask, diffusion, noise, seeds, sampler="dpmpp", steps=steps)
    write_grid(path, images, _COLUMNS)


def write_grid(path: Path, images: "Tensor", columns: int = 0) -> None:
    """Write images (N, 3, S, S) in -1 to 1 side by side as a PNG; about square if not told."""
    from torchvision.utils import make_grid

    from moectl.diffusion.features import to_bytes

    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(to_bytes(images).cpu(), nrow=columns, padding=2, pad_value=255)
    write_png(path, enlarged(grid))


def write_strip(path: Path, images: "Tensor") -> None:
    """Write the first images (N, 3, S, S) in a row, pixel by pixel, to lie beside others."""
    from torchvision.utils import make_grid

    from moectl.diffusion.features import to_bytes

    strip = make_grid(to_bytes(images[:_STRIP]), nrow=_STRIP, padding=1, pad_value=255)
    write_png(path, strip)


def side_by_side(path: Path, strips: Mapping[str, Path]) -> None:
    """Draw the strips of several networks below each other, from the same noise, with their names.

    Args:
        path: the PNG file.
        strips: name to the picture that `write_strip` wrote.
    """
    from matplotlib.image import imread

    from moectl.engine import figure as drawing

    figure = drawing.new_figure(10, 0.4 + 0.75 * len(strips))
    for number, (name, strip) in enumerate(strips.items(), 1):
        axes = figure.add_subplot(len(strips), 1, number)
        axes.imshow(imread(strip), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(name, fontsize=9, loc="left", parse_math=False, pad=2)
    drawing.write_png(figure, path)


def losses(path: Path, curves: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Draw the held-out loss of several networks over the epochs, from rows of their metrics."""
    plot.lines(
        path,
        {
            name: (
                [float(row["epoch"]) for row in rows],
                [float(row["val/loss"]) for row in rows],
            )
            for name, rows in curves.items()
        },
        title="Held-out loss",
        x_label="epoch",
        y_label="loss",
        scale="log",
    )


def enlarged(image: "Tensor") -> "Tensor":
    """Repeat the pixels of a small image (3, H, W), so that a person sees them."""
    factor = max(1, 480 // max(image.shape[1:]))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def write_png(path: Path, image: "Tensor") -> None:
    """Write an image (3, H, W) uint8 whole or not at all."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def learning_curve(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Draw the losses over the epochs, the held-out ones of the averaged weights.

    Args:
        path: the PNG file.
        rows: of metrics.csv, those that end an epoch.
    """
    names = {"train/noise_loss": "training", "val/loss": "held out"}
    curves = {
        words: [(float(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
        for name, words in names.items()
    }
    plot.lines(
        path,
        {
            words: ([x for x, _ in points], [y for _, y in points])
            for words, points in curves.items()
        },
        title="Mean squared error of the noise",
        x_label="epoch",
        y_label="loss",
        scale="log",
    )


def loss_by_step(path: Path, curves: Mapping[str, Sequence[float | None]], steps: int) -> None:
    """Draw the loss over the steps of the process, a curve for each name."""
    spans = len(next(iter(curves.values())))
    middles = [(span + 0.5) * steps / spans for span in range(spans)]
    plot.lines(
        path,
        {name: (middles, list(values)) for name, values in curves.items()},
        title="Loss on held-out images",
        x_label="step of the process",
        y_label="loss",
        scale="log",
    )
