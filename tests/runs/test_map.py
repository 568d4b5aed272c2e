"""Maps of embeddings: near one another what is near, groups named, all of it in the picture."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import homogeneity_score

from torch_emc2.runs import draw_map, map_of
from torch_emc2.runs import map as module
from torch_emc2.runs.gallery import Gallery
from torch_emc2.runs.map import Map


def table(folder: Path, labels: list[str | None], per: int = 20) -> Path:
    """Write three bundles of directions, their images in red, green and blue."""
    generator = torch.Generator().manual_seed(0)
    z = torch.eye(16)[:3].repeat_interleave(per, 0) + 0.05 * torch.randn(3 * per, 16, generator=generator)
    z *= 10.0 ** (torch.arange(len(z))[:, None] % 5)  # lengths mean nothing
    files = [folder / f"{i}.png" for i in range(len(z))]
    for i, file in enumerate(files):
        Image.new("RGB", (9, 9), [(255, 0, 0), (0, 255, 0), (0, 0, 255)][i // per]).save(file)
    columns = {"path": list(map(str, files)), "embedding": z.tolist()}
    pq.write_table(pa.table(columns | {"label": pa.array(labels, pa.string())}), folder / "e.parquet")
    return folder / "e.parquet"


@pytest.mark.parametrize(("extent", "size"), [((4.0, 1.0), (11.5, 3.3)), ((1.0, 4.0), (8.7, 9.0))])
def test_a_map_is_as_wide_and_high_as_its_images_lie(
    extent: tuple[float, float], size: tuple[float, float], tmp_path: Path
) -> None:
    places = np.random.default_rng(0).uniform(size=(60, 2))
    places = (places - places.min(0)) / np.ptp(places, 0) * extent
    gallery = Gallery(torch.zeros(60, 2), ["x"] * 60, [None] * 60, lambda i: torch.zeros(1, 4, 4, dtype=torch.uint8))
    draw_map(Map(gallery, places, ["a"] * 60, 60, "class"), tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == pytest.approx([110 * inches for inches in size], abs=8)


@pytest.mark.parametrize(("classes", "by"), [(True, "class"), (True, "cluster"), (False, "class")])
def test_what_is_near_is_near_and_has_a_group(classes: bool, by: Any, tmp_path: Path) -> None:
    true = [name for name in ("$x_$", "b" * 100, "c") for _ in range(20)]
    found = map_of(table(tmp_path, true if classes else [None] * 60), by=by)
    with_classes = classes and by == "class"
    assert found.kind == ("class" if with_classes else "cluster")
    apart = np.linalg.norm(found.places[:, None] - found.places[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert [i // 20 for i in apart.argmin(1)] == [i // 20 for i in range(60)]
    if with_classes:
        assert list(found.groups) == true
    else:
        bundles = [{group for group in found.groups[i : i + 20] if group} for i in (0, 20, 40)]
        assert sorted(next(iter(bundle)) for bundle in bundles) == ["cluster 1", "cluster 2", "cluster 3"]
        assert sum(map(len, bundles)) == 3
    draw_map(found, tmp_path / "map.png")
    pixels = np.array(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).sum() > 300


def test_clusters_of_digits_are_of_one_digit_each() -> None:
    pixels, digits = load_digits(return_X_y=True)
    clusters = module._clusters(PCA(50, random_state=0).fit_transform(pixels / np.linalg.norm(pixels, axis=1)[:, None]))
    found = clusters >= 0
    assert found.mean() > 0.7
    assert homogeneity_score(digits[found], clusters[found]) > 0.9


def test_of_many_images_a_random_choice_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 40)
    found = map_of(table(tmp_path, [str(i) for i in range(60)]))
    assert (len(found.gallery), found.of, len(set(found.groups))) == (40, 60, 40)
    i = 17
    assert found.gallery.names[i] == str(tmp_path / f"{found.groups[i]}.png")
    assert torch.equal(found.gallery.image(i)[:, 0, 0] == 255, torch.arange(3) == int(found.groups[i]) // 20)  # type: ignore[index,arg-type]
    Path(found.gallery.names[i]).unlink()
    draw_map(found, tmp_path / "map.png")  # a file that has gone leaves its point


def test_equal_embeddings_are_no_map(tmp_path: Path) -> None:
    columns = {"path": [f"{i}.png" for i in range(6)], "embedding": [[1.0, 2.0]] * 6}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"all 6 embeddings of .* have one direction: has training collapsed"):
        map_of(tmp_path / "e.parquet")


def test_too_few_images_are_no_map(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 images, at least 5 make a map: embed more"):
        map_of(table(tmp_path, ["a"] * 3, per=1))


def test_names_of_groups_do_not_lie_on_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(Axes, "annotate", lambda self, text, at, *args, **kwargs: written.setdefault(text, at))
    places = np.repeat([[0, 0], [1, 1], [0.5, 0.5], [0.51, 0.51], [0.5, 0.9]], 5, axis=0).astype(float)
    places = np.concatenate([places, [[0.2, 0.8]] * 4])
    names = [str(i) for i in range(29)]
    gallery = Gallery(torch.zeros(29, 2), names, [None] * 29, lambda i: torch.zeros(3, 2, 2, dtype=torch.uint8))
    groups = [name for name in ("low", "high", "middle", "beside", "above") for _ in range(5)] + ["few"] * 4
    draw_map(Map(gallery, places, groups, 29, "class"), tmp_path / "m.png")
    assert list(written) == ["low", "high", "middle", "beside", "above"]
    for (x, y), (other_x, other_y) in combinations(written.values(), 2):
        assert abs(x - other_x) >= 0.17 or abs(y - other_y) >= 0.05
    for group, at in written.items():  # near its own
        assert np.abs(places[groups.index(group)] - at).max() <= 0.1 + 1e-9


@pytest.mark.parametrize("name", ["a", "golden retriever puppy", "W" * 30])
@pytest.mark.parametrize("extent", [(1.0, 1.0), (1.0, 0.3), (0.3, 1.0)])
def test_no_picture_lies_under_a_name(
    name: str, extent: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Bbox] = []
    names: list[Bbox] = []

    def measured(self: Figure, *args: Any, **kwargs: Any) -> None:
        self.canvas.draw()
        (axes,) = self.axes
        boxes.extend(each.get_window_extent() for each in axes.artists)
        names.extend(each.get_window_extent() for each in axes.texts)

    monkeypatch.setattr(Figure, "savefig", measured)
    places = np.random.default_rng(0).uniform(size=(2000, 2)) * extent
    gallery = Gallery(torch.zeros(2000, 2), ["x"] * 2000, [None] * 2000, lambda i: torch.zeros(3, 2, 2).byte())
    groups = [f"{name}{int(3 * x / extent[0])}" for x, _ in places]
    draw_map(Map(gallery, places, groups, 2000, "class"), tmp_path / "m.png")
    assert names
    assert len(boxes) > 80
    assert not any(a.overlaps(b) for a in names for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])
