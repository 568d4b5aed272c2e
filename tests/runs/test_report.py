"""The page on runs: its numbers, that it needs nothing from elsewhere, and how a browser lays it out."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from torch_emc2.config import Config, to_yaml
from torch_emc2.runs import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def finished(run: Path, config: Config, probe: float | None, losses: list[float]) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(replace(config, out=str(run))))
    (run / "head.safetensors").touch()
    rows = [f"{10 * i + 9},{loss},{'' if i else 0.5}" for i, loss in enumerate(losses)]
    (run / "metrics.csv").write_text("\n".join(["step,global_loss,acceptance", *rows]))
    if probe is not None:
        numbers = {"trained": {"probe": probe, "alignment": 0.25}, "raw pixels": {"probe": 0.5}}
        (run / "evaluation.json").write_text(json.dumps({"numbers": numbers}))
    return run


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    emc2, infonce = Config(), Config(loss="infonce")
    runs = [
        finished(tmp_path / "a", emc2, 0.70, [0.0, -1.0, -2.0]),
        finished(tmp_path / "b", replace(emc2, seed=1), 0.80, [0.0, -2.0]),
        finished(tmp_path / "<c&d>", infonce, None, [0.0]),
    ]
    Image.new("RGB", (900, 30)).save(runs[0] / "neighbours.png")
    (runs[0] / "diagnosis.md").write_text("Errors at b = 4:\n\n| loss | bias |\n| --- | --: |\n| DCL | 0.04 ± 0.01 |\n")
    return runs


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in ("td", "th"):
            self.cells[-1][-1] += data


def test_seeds_are_a_series_with_mean_and_spread(three: list[Path], tmp_path: Path) -> None:
    write_report(three, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "lower is better, at one temperature and batch size" in text  # runs of several lie over one another
    assert page.cells[:3] == [
        ["run", "encoder", "Linear probe, %", "Alignment", "runs"],
        ["loss=emc2", "trained", "75.00 ± 7.07", "0.250 ± 0.000", "2"],  # sqrt(2 · 5²) = 7.07
        ["loss=emc2", "raw pixels", "50.00 ± 0.00", "–", "2"],
    ]
    assert page.cells[-2:] == [["loss", "bias"], ["DCL", "0.04 ± 0.01"]]
    assert "Errors at b = 4:" in text
    assert f"emc2 evaluate &#39;{tmp_path}/&lt;c&amp;d&gt;&#39; --baselines" in text
    assert "loss=infonce, 1 run" in text
    own = Config()
    assert (
        f"digits: {own.model.backbone}, loss infonce, temperature {own.temperature:g}, {own.epochs} epochs in" in text
    )
    assert "squared distance of an image&#39;s two views, from 0 to 4: less is better" in text
    assert "Uniformity" not in text, "nothing was measured that it would explain"
    runs = str(three[0]), f"&#39;{tmp_path}/&lt;c&amp;d&gt;&#39;"
    not_drawn = [f"emc2 {command} {run}" for command in ("map", "diagnose") for run in runs]
    assert re.findall("Not drawn: <code>(.*?)</code>", text) == not_drawn
    assert [
        text.index(f'id="{part}"') for part in ("quality", "pictures", "curves", "diagnosis", "settings")
    ] == sorted(text.index(f'id="{part}"') for part in ("quality", "pictures", "curves", "diagnosis", "settings"))


def test_a_long_curve_is_smoothed(three: list[Path], tmp_path: Path) -> None:
    values = [(-1.0) ** i for i in range(60)]
    (three[2] / "metrics.csv").write_text("\n".join(["step,global_loss", *(f"{i},{v}" for i, v in enumerate(values))]))
    write_report(three[2:], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    places = [
        [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
        for path in re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #3b7dd8', text)
    ]
    raw, smooth = places
    middle = (max(raw) + min(raw)) / 2
    assert max(abs(y - middle) for y in smooth[3:-3]) < 0.01 * (max(raw) - min(raw))  # six values, three of each


def test_a_curve_is_the_mean_where_all_runs_have_the_step(three: list[Path], tmp_path: Path) -> None:
    write_report(three[:2], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>a and 1 more – torch-emc2</title>" in text
    assert len(re.findall("<svg", text)) == 2  # of the global loss and of acceptance
    paths = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" clip-path[^>]*stroke: #3b7dd8', text)
    (x0, y0, x1, y1), *others = [tuple(map(float, path)) for path in paths]
    assert not others, "acceptance has one step in common, and the third loss is of one run alone"
    assert x1 > x0
    assert y1 > y0  # from 0 to -1.5, downwards


def test_it_needs_nothing_from_elsewhere(three: list[Path], tmp_path: Path) -> None:
    write_report(three, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    sources = [attrs[name] or "" for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert sources
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {source[1:] for source in sources if source.startswith("#")} <= places
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    scrolled = [attrs for _, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolled)  # by the keyboard, too


def test_what_is_no_run_is_refused(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given twice"):
        write_report([three[0], three[0]], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is not a run's folder"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_scrolls_it_downwards_only(three: list[Path], tmp_path: Path, width: int) -> None:
    write_report(three, tmp_path / "report.html")
    asked = (
        "<script>parent.postMessage(`${document.documentElement.scrollWidth} of ${innerWidth}`, '*')</script></body>"
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace("</body>", asked)
    (tmp_path / "asked.html").write_text(page, encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window has a least width, a frame has none
    told = "<script>onmessage = told => document.title = told.data</script>"
    frame.write_text(f"<title></title>{told}<iframe src=asked.html width={width} height=900></iframe>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *options, "--dump-dom", frame.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r"<title>(.*)</title>", out) == [f"{width} of {width}"]
