"""Run the benchmarks of docs/performance.md one after the other, on an otherwise idle machine.

python benchmarks/run.py --all            # an hour and a half; or some by name: loss_step memory
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LOSSES = [
    "InfoNCE",
    "InfoNCE, F.cross_entropy",
    "EMC², cache",
    "EMC², cache, 4 chains",
    "EMC², defer",
    "EMC², isir, cache",
    "EMC², isir, cache, 4 chains",
    "EMC², isir, cache, remembered",
    "SogCLR, γ = 0.9",
    "lightly, NTXentLoss",
    "LibAUC, GCLoss_v1",
]
PARTS: dict[str, list[list[str]]] = {
    "loss_step": [["loss_step.py", "--losses", *LOSSES]],
    "memory": [
        ["memory.py"],
        ["memory.py", "--batch-sizes", "65536", "--losses", "InfoNCE", "EMC²", "EMC², isir"],
    ],
    "scaling": [["scaling.py"]],
    "evaluation": [["evaluation.py"]],
    "start_up": [["start_up.py"]],
    "training": [
        ["training.py", "--data", "fashion-mnist", "--images", "2048"],
        ["training.py", "--data", "stl10", "--epochs", "2"],
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown or not (args.parts or args.all):
        parser.error(f"give --all, or some of {', '.join(PARTS)}" + (f"; got {', '.join(unknown)}" if unknown else ""))
    for part in PARTS if args.all else args.parts:
        print(f"\n## {part}\n", flush=True)
        for script, *words in PARTS[part]:
            subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *words], check=True)


if __name__ == "__main__":
    main()
