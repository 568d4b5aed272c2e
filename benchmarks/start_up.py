"""CPU time and memory until the command answers, of the import beyond torch's own, and of what is compiled at first.

    python benchmarks/start_up.py [--turns 7]

Commands take turns; medians of whole processes, once their bytecode is written. It takes a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EMC2 = [sys.executable, "-m", "torch_emc2"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "emc2 --help": [*EMC2, "--help"],
    "emc2 nonsense": [*EMC2, "nonsense"],
    "emc2 train nothing": [*EMC2, "train", "nothing"],
    "emc2 train quickstart --batch_size x": [*EMC2, "train", "quickstart", "--batch_size", "x"],
    "emc2 evaluate nowhere": [*EMC2, "evaluate", "nowhere"],
    "emc2 train --help": [*EMC2, "train", "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}
BEYOND = """
import time, torch
start = time.process_time()
import torch_emc2
for name in torch_emc2.__all__:
    getattr(torch_emc2, name)
print(time.process_time() - start)
"""
FIRST = """
import time, torch, torch_emc2
loss_fn = torch_emc2.EMC2Loss(64, carry="cache")
start = time.process_time()
loss_fn(*torch.randn(2, 32, 128), torch.arange(32))
print(time.process_time() - start)
"""


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return seconds of the processor and megabytes at the peak, of a whole process."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, process.returncode, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def told(code: str, environment: dict[str, str]) -> float:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    imports = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": str(Path(folder))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for turn in range(args.turns + 1):  # the first writes the bytecode
            for name, command in COMMANDS.items():
                measured[name] += [run(command, environment)] * (turn > 0)
            imports += [told(BEYOND, environment)] * (turn > 0)
        environment["NUMBA_CACHE_DIR"] = str(Path(folder) / "numba")
        compiles, loads = (told(FIRST, environment) for _ in range(2))
    print(f"Python {platform.python_version()}, {platform.machine()}\n\n| | CPU seconds | MB |\n|---|--:|--:|")
    for name, runs in measured.items():
        seconds, megabytes = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| `{name}` | {seconds:.2f} | {megabytes:.0f} |")
    print(f"| all names of `torch_emc2`, beyond `import torch` | {statistics.median(imports):.3f} | |")
    print(f"| the first call of `EMC2Loss`, once: it is compiled | {compiles:.1f} | |")
    print(f"| in every other process | {loads:.1f} | |")


if __name__ == "__main__":
    main()
