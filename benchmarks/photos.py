"""How well a folder of images is told apart: the same emoji in another vendor's drawing, of emoji not trained on.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0   # into PACKAGES
    python benchmarks/photos.py make PACKAGES emoji      # emoji/train, emoji/validation, emoji/test
    emc2 train folder:emoji/train --out runs/emoji
    python benchmarks/photos.py score emoji/test runs/emoji   # and the untrained encoder, and raw pixels

A run sees both vendors' drawings of the training part, and not which belong together.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import torch_emc2
from torch_emc2.data import evaluation_transform
from torch_emc2.evaluation.features import extract_features, raw_pixels
from torch_emc2.models import build_encoder

VENDORS = "google", "twitter"


def make(packages: Path, out: Path) -> None:
    """Write each emoji that both draw, without skin tones, by vendor: 70 % to train on, 10 and 20 % to look at."""
    files: dict[str, dict[str, bytes]] = {}
    for vendor in VENDORS:
        with tarfile.open(packages / f"emoji-datasource-{vendor}-16.0.0.tgz") as package:
            files[vendor] = {
                Path(member.name).name: file.read()
                for member in package
                if (member.name.endswith("emoji.json") or Path(member.name).parent.name == "64")
                and (file := package.extractfile(member))
            }
    known = json.loads(files["google"]["emoji.json"])
    names = sorted(entry["image"] for entry in known if all(entry[f"has_img_{vendor}"] for vendor in VENDORS))
    random.Random(0).shuffle(names)
    for i, name in enumerate(names):
        part = "test" if i < len(names) // 5 else "validation" if i < len(names) // 5 + len(names) // 10 else "train"
        for vendor in VENDORS:
            folder = out / part / vendor
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[vendor][name])


def top1(of_google: Tensor, of_twitter: Tensor, wanted: Tensor) -> float:
    """Share of Google's drawings whose nearest of Twitter's is their own, by cosine."""
    found = normalize(of_google, dim=1) @ normalize(of_twitter, dim=1).T
    return float((found.argmax(1) == wanted).float().mean())


def score(part: Path, run: Path) -> None:
    """Print the share found among the part's drawings, and among those of all parts."""
    model, part = torch_emc2.load(run), part.resolve()
    queries = sorted((part / "google").iterdir())
    every = [
        file for each in ("train", "validation", "test") for file in sorted((part.parent / each / "twitter").iterdir())
    ]
    own = [i for i, file in enumerate(every) if file.parent.parent.name == part.name]
    torch.manual_seed(model.config.seed)
    channels, size = model.encoder.channels, model.encoder.image_size
    untrained = build_encoder(model.config.model, channels, size).eval().to(model.device)
    for name, encode in (
        ("trained", model.encoder.features),
        ("untrained", untrained.features),
        ("raw pixels, 32 × 32, less each vendor's mean", raw_pixels),
    ):
        google, twitter = (
            extract_features(encode, images.converted(channels), evaluation_transform(size), device=model.device)
            for images in (model.images([str(file) for file in files]) for files in (queries, every))
        )
        if encode is raw_pixels:
            google, twitter = google - google.mean(0), twitter - twitter.mean(0)
        within = top1(google, twitter[own], torch.arange(len(own)))
        among_all = top1(google, twitter, torch.tensor(own))
        print(f"{name:46s} {within:.3f} among {len(own)}, {among_all:.3f} among {len(every)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("make", "score"))
    parser.add_argument("first", type=Path, help="packages; or a part")
    parser.add_argument("second", type=Path, help="folder to write; or a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (make if args.do == "make" else score)(args.first, args.second)


if __name__ == "__main__":
    main()
