"""One layer on a pack of documents, against the same kernel on one document of as many query-key pairs.

    OMP_NUM_THREADS=1 python benchmarks/packed.py
    python benchmarks/packed.py --rows 131072 --heads 32:8 --head-dim 128 --out packed.jsonl

Same pairs, so a ratio above 1 is what many short documents cost beside their attention: calls, and rows that are read
and written for fewer pairs each. On the GPU where there is one, in bfloat16; else on the CPU, in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sap_hf.cli.plan import heads_option
from sap_hf.kernels import Kernel, Scoring, Segments, pick
from sap_hf.planning.workloads import pack

# Rows of every document, or the name of a workload.
PACKS = (16, 32, 64, 128, 256, 512, 1024, "short", "magi")
TURNS = 7


def main() -> None:
    """Time every pack and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--heads", type=heads_option, default="9:3", metavar="H:K", help="default 9:3")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    kernel, why = pick(
        "auto",
        device_type=device,
        dtype=dtype,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        softcap=None,
        window=None,
    )
    print(f"{why}, {torch.get_num_threads()} threads")
    shape = (*options.heads, options.head_dim)
    for name in PACKS:
        lengths = (
            pack(name, options.rows, np.random.default_rng(0))
            if isinstance(name, str)
            else np.full(options.rows // name, name)
        )
        rows, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
        packed = layer_seconds(kernel, [0, *np.cumsum(lengths).tolist()], shape, device, dtype)
        dense = layer_seconds(kernel, [0, math.isqrt(2 * pairs)], shape, device, dtype)
        found = {
            "kernel": kernel.name,
            "pack": name,
            "documents": len(lengths),
            "rows": rows,
            "forward_ms": 1e3 * packed[0],
            "backward_ms": 1e3 * packed[1],
            "tokens_per_s": rows / sum(packed),
            "forward_over_dense": packed[0] / dense[0],
            "backward_over_dense": packed[1] / dense[1],
        }
        print(
            f"  {len(lengths):>5} documents ({name:>5}): forward {found['forward_ms']:8.2f} ms, "
            f"{found['forward_over_dense']:5.2f} x dense, backward {found['backward_ms']:8.2f} ms, "
            f"{found['backward_over_dense']:5.2f} x dense, {found['tokens_per_s']:12,.0f} tokens/s",
            flush=True,
        )
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


def layer_seconds(
    kernel: Kernel, bounds: list[int], shape: tuple[int, int, int], device: str, dtype: torch.dtype
) -> tuple[float, float]:
    """Forward and backward of causal documents; the shortest of TURNS."""
    heads, kv_heads, width = shape
    q, k, v, dout = (
        torch.randn(bounds[-1], count, width, device=device, dtype=dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    segments = Segments.build(bounds, bounds, causal=True, device=device)
    scoring = Scoring(width**-0.5)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    return (
        shortest(lambda: kernel.forward(q, k, v, segments, scoring)),
        shortest(lambda: kernel.backward(dout, q, k, v, out, lse, segments, scoring)),
    )


def shortest(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    spent = []
    for _ in range(TURNS + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    # The first one warms up.
    return min(spent[1:])


if __name__ == "__main__":
    main()
