"""A map of embeddings: near one another in the plane what is near in the embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patheffects import withStroke
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch.nn.functional import normalize

from torch_emc2.files import whole_file
from torch_emc2.runs.gallery import Gallery, open_gallery, refuse_images_name
from torch_emc2.runs.lettering import fitted, lettered
from torch_emc2.runs.tiles import thumbnail

__all__ = ["Map", "draw_map", "map_of"]

_MOST = 5000  # images of which t-SNE takes a minute
_LEAST = 5
_COLOURS = [to_hex(colour) for colour in color_sequences["tab20"]]
_COLOURS = [*_COLOURS[:14:2], *_COLOURS[16::2], *_COLOURS[1:14:2], *_COLOURS[17::2]]  # strong ones first, no grey
_MANY = {"class": "classes", "cluster": "clusters"}
_NONE = "#c8c8c8"
_SIDE, _BESIDE = 8.5, (3, 0.5)  # inches: of the map's longer side, and for legend and title
_LABEL = 0.17, 0.05  # of the map's longer side: the room of a group's name
_LABEL_INCHES = 1.2
_NAMED = 10  # groups, the largest; more names would leave no room for pictures
_THUMBNAIL = 0.034  # of the map's longer side: no two are nearer
_UNDER_LABEL = (_LABEL[0] + _THUMBNAIL) / 2, (_LABEL[1] + _THUMBNAIL) / 2
_AROUND = np.array(sorted(product(np.arange(-5, 6) / 50, repeat=2), key=lambda by: by[0] ** 2 + by[1] ** 2))


class Map(NamedTuple):
    """Images in the plane.

    Attributes:
        gallery: the images, or a random choice of many.
        places: (n, 2).
        groups: n names of classes, or of clusters where no image has a class; None for none.
        of: how many images there were.
        kind: "class" or "cluster".
    """

    gallery: Gallery
    places: np.ndarray
    groups: Sequence[str | None]
    of: int
    kind: str


def map_of(source: Path, *, by: Literal["class", "cluster"] = "class", seed: int = 0) -> Map:
    """Lay out a table of embeddings, or the images that a run was trained on, by t-SNE of the directions.

    Where there are no classes, or where they are not asked for, HDBSCAN finds clusters of the embeddings.

    Raises:
        ValueError: the source is neither, or has too few images.
    """
    gallery = open_gallery(source)
    total = len(gallery)
    if total < _LEAST:
        raise ValueError(f"{source} has {total} images, at least {_LEAST} make a map: embed more")
    if total > _MOST:
        picks = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:_MOST]
        gallery = gallery.subset(picks.sort().values)
    unit = normalize(gallery.embeddings, dim=1).numpy()
    if np.allclose(unit, unit[0], atol=1e-6):  # of which t-SNE makes nothing but NaN, or a crash
        raise ValueError(f"all {total} embeddings of {source} have one direction: has training collapsed?")
    main = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
    places = TSNE(perplexity=min(30, len(main) / 4), init="pca", random_state=seed).fit_transform(main)
    if by == "class" and any(label is not None for label in gallery.labels):
        return Map(gallery, places, gallery.labels, total, "class")
    found = _clusters(main)
    by_size = [cluster for cluster, _ in Counter(found[found >= 0].tolist()).most_common()]
    groups = [None if cluster < 0 else f"cluster {by_size.index(cluster) + 1}" for cluster in found.tolist()]
    return Map(gallery, places, groups, total, "cluster")


def _clusters(main: np.ndarray) -> np.ndarray:
    """(n,) the cluster of each image, -1 for none, by its first principal components (n, k).

    More than two ``min_samples`` make one cluster of nearly all: on digits' pixels it would mix their classes.
    """
    sizes = {"min_cluster_size": max(_LEAST, len(main) // 100), "min_samples": 2}
    found: np.ndarray = HDBSCAN(**sizes, copy=True).fit_predict(main[:, :10])
    return found


@lettered()
def draw_map(found: Map, out: Path) -> None:
    """Draw a map as a PNG: a point an image, of its group's colour, and small images where they have room."""
    refuse_images_name(out, found.gallery)
    places = found.places - found.places.min(0)
    places = places / places.max()
    sizes = Counter(group for group in found.groups if group is not None)
    colour_of = {group: _COLOURS[i] for i, (group, _) in enumerate(sizes.most_common(len(_COLOURS)))}
    colours = [colour_of.get(group, _NONE) if group is not None else _NONE for group in found.groups]
    width, height = np.maximum(_SIDE * places.max(0), (_SIDE * 2 / 3, _SIDE / 3))
    figure = Figure(figsize=(width + _BESIDE[0], height + _BESIDE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(places[:, 0], places[:, 1], c=colours, s=10, linewidths=0)
    axes.set_aspect("equal")
    axes.axis("off")
    pictures = _apart(places)
    labels = _labels(places, found.groups, colour_of, places[pictures])
    for i in pictures:
        covered = _near(places[i], [*labels.values()], _UNDER_LABEL)
        if not covered and (image := found.gallery.image(i)) is not None:
            small = thumbnail(image)
            box = OffsetImage(small.expand(3, -1, -1).permute(1, 2, 0).numpy(), zoom=18 / max(small.shape[1:]))
            frame = {"edgecolor": colours[i], "linewidth": 1.5}
            axes.add_artist(AnnotationBbox(box, places[i], pad=0.06, bboxprops=frame))
    for group, at in labels.items():
        text = fitted(group, _LABEL_INCHES, 13, "bold")
        axes.annotate(
            text, tuple(at), color=colour_of[group], fontsize=13, fontweight="bold", ha="center", va="center",
            parse_math=False, path_effects=[withStroke(linewidth=4, foreground="white")], zorder=10,
        )  # fmt: skip
    _legend(figure, axes, found, colour_of, sizes)
    some = f"a random {len(places)} of {found.of} images" if len(places) < found.of else f"{found.of} images"
    axes.set_anchor("N")  # the title at the top, beside the legend
    axes.set_title(
        f"{some}: near one another by cosine similarity\n(t-SNE; distances across the map mean little)", fontsize=11
    )
    with whole_file(out) as file:
        figure.savefig(file, format="png", dpi=110)


def _legend(figure: Figure, axes: Axes, found: Map, colour_of: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Say of each colour what it stands for, and how many images have it."""
    handles = [
        axes.scatter([], [], c=colour, s=40, label=f"{fitted(group, 1.6, 9)} ({sizes[group]})")
        for group, colour in colour_of.items()
    ]
    alone, rest = len(found.groups) - sum(sizes[group] for group in colour_of), len(sizes) - len(colour_of)
    if alone:
        words = f"{rest} smaller {_MANY[found.kind]}" if rest else f"no {found.kind}"
        handles.append(axes.scatter([], [], c=_NONE, s=40, label=f"{words} ({alone})"))
    legend = figure.legend(
        handles=handles, loc="outside right upper", fontsize=9, frameon=False, title=f"{found.kind} (images)"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _apart(places: np.ndarray) -> list[int]:
    """Return some places, in no order, that are not nearer to one another than a small image is wide."""
    kept: list[int] = []
    for i in np.random.default_rng(0).permutation(len(places)).tolist():
        if not kept or np.abs(places[kept] - places[i]).max(1).min() > _THUMBNAIL:
            kept.append(i)
    return kept


def _labels(
    places: np.ndarray, groups: Sequence[str | None], named: Iterable[str], pictures: np.ndarray
) -> dict[str, np.ndarray]:
    """Return where the names of groups stand: in the middle, or near it where there is no picture.

    None lies on another; the legend has those that find no room, and small groups where there are many.
    """
    labels: dict[str, np.ndarray] = {}
    for group in islice(named, _NAMED):
        own = places[[name == group for name in groups]]
        if len(own) < _LEAST:
            continue
        middle = own[np.abs(own - np.median(own, 0)).sum(1).argmin()]
        around = (middle + _AROUND)[((middle + _AROUND >= 0) & (middle + _AROUND <= places.max(0))).all(1)]
        alone = [at for at in around if not _near(at, [*labels.values()], _LABEL)]
        free = [at for at in alone if not _near(at, pictures, _UNDER_LABEL)]
        if alone:
            labels[group] = (free or alone)[0]
    return labels


def _near(place: np.ndarray, others: Sequence[np.ndarray] | np.ndarray, room: tuple[float, float]) -> bool:
    """Tell whether any of some places is within the room, across and up, of one."""
    return bool((np.abs(np.reshape(others, (-1, 2)) - place) < room).all(1).any())
