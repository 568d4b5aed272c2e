"""Time and memory of the exact loss and its gradient on many embeddings.

python benchmarks/exact_scale.py [--samples 100000]
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from torch_emc2.exact import global_contrastive_loss


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=4096)
    args = parser.parse_args()
    z = torch.randn(args.samples, 2, args.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, start = peak_gib(), time.perf_counter()
    loss = global_contrastive_loss(z, 0.07, chunk_size=args.chunk_size)
    loss.backward()
    seconds = time.perf_counter() - start
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 2 views of {args.samples}, d = {args.dim}")
    print(f"loss {loss.item():.4f}, {seconds:.0f} s, {peak_gib() - before:.2f} GiB beyond the embeddings")


if __name__ == "__main__":
    main()
