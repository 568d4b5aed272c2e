"""Pictures of images in rows, with a caption below each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from torch_emc2.runs.lettering import fitted, lettered, wrapped

__all__ = ["PLAIN", "Tile", "draw_rows", "thumbnail"]

PLAIN = "#8a8a8a"

# In inches.
_SIDE, _SPACE, _LINE, _MARGIN = 1.2, 0.14, 0.15, 0.12
_FONT = 8


class Tile(NamedTuple):
    """An image, None where there is none; what is written below it, a line each; and the colour of its frame."""

    image: Tensor | None
    lines: Sequence[str]
    frame: str = PLAIN


@lettered()
def draw_rows(
    rows: Sequence[Sequence[Tile]],
    title: str,
    out: str | Path,
    *,
    legend: Mapping[str, str] | None = None,
    first: int = 0,
) -> None:
    """Draw images in rows as a PNG.

    Args:
        rows: images, uint8 (c, h, w) with c of 1 or 3.
        title: what the picture shows.
        out: the file to write.
        legend: what frames of a colour mean.
        first: so many images of each row stand apart.
    """
    columns, lines = max(len(row) for row in rows), max(len(tile.lines) for row in rows for tile in row)
    gap = 0.25 if first else 0.0
    width = max(2 * _MARGIN + columns * (_SIDE + _SPACE) - _SPACE + gap, 5.0)
    step = _SIDE + 0.06 + lines * _LINE + _SPACE
    shown = wrapped(title, width - 2 * _MARGIN, 11)
    below = 0.2 * shown.count("\n")
    header = below + (0.62 if legend else 0.46)
    height = header + len(rows) * step
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - 0.16 / height, shown, fontsize=11, va="top", parse_math=False)
    if legend:
        figure.legend(
            handles=[
                Patch(facecolor="none", edgecolor=colour, linewidth=2, label=name) for name, colour in legend.items()
            ],
            loc="upper left",
            bbox_to_anchor=((_MARGIN - 0.06) / width, 1 - (0.3 + below) / height),
            ncols=len(legend),
            fontsize=_FONT,
            frameon=False,
            handlelength=1.2,
            borderaxespad=0,
        )
    for i, row in enumerate(rows):
        top = height - header - i * step
        for j, tile in enumerate(row):
            left = _MARGIN + j * (_SIDE + _SPACE) + (gap if j >= first else 0)
            axes = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
            _draw_image(axes, tile)
            for number, line in enumerate(tile.lines):
                figure.text(
                    (left + _SIDE / 2) / width,
                    (top - _SIDE - 0.06 - number * _LINE) / height,
                    fitted(line, _SIDE, _FONT),
                    fontsize=_FONT,
                    ha="center",
                    va="top",
                    parse_math=False,
                )
    figure.savefig(out, format="png", dpi=150)


def thumbnail(image: Tensor) -> Tensor:
    """Shrink an image (c, h, w) to about 256 pixels at its longer side; it costs little memory in a picture then."""
    step = max(1, max(image.shape[1:]) // 256)
    height, width = (max(1, side // step) for side in image.shape[1:])
    return adaptive_avg_pool2d(image.float(), (height, width)).round().to(torch.uint8)


def _draw_image(axes: Any, tile: Tile) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=tile.frame, linewidth=2.5)
    if tile.image is None:
        axes.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=_FONT, color=PLAIN, transform=axes.transAxes)
    else:
        axes.imshow(thumbnail(tile.image).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())  # grey to RGB
