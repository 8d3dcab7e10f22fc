"""Plan.peak_bytes is what a layer then holds, to the byte; a budget of remote rows makes it less."""

import dataclasses
import importlib

import pytest
import torch

import sap_hf
from sap_hf.runtime import arena
from sap_hf.runtime.device_program import load
from tests.dist import run_ranks
from tests.runtime.memory import LiveBytes

WORLD, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64
LENGTHS = (300, 50, 120, 700, 64, 80, 90)
OPTIONS = [
    {"layout": "contiguous", "delivery": "p2p"},
    {"layout": "zigzag", "delivery": "p2p", "stages": 2},
    {"layout": "balanced", "delivery": "all_to_all", "whole": False},
    {"layout": "zigzag", "strategy": "all_gather", "whole": False},
    {"strategy": "ring", "layout": "zigzag"},
    {"layout": "zigzag", "delivery": "all_to_all"},
    {"layout": "balanced", "delivery": "p2p"},
    {"layout": "balanced", "delivery": "all_to_all", "max_remote_rows": 100},
    {"layout": "zigzag", "delivery": "p2p", "max_remote_rows": 64},
    {"layout": "zigzag", "strategy": "all_gather", "delivery": "all_gather"},
    {"layout": "contiguous", "delivery": "p2p", "window": 33},
]


class Hollow:
    """A kernel that returns what kernels return, in q's dtype, and needs nothing for itself."""

    def forward(self, q, k, v, segments, **options):
        return q.new_zeros(len(q), q.shape[1], v.shape[2]), q.new_zeros(q.shape[:2], dtype=torch.float32)

    def backward(self, dout, q, k, v, out, lse, segments, **options):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)


def make(options):
    form = {name: value for name, value in options.items() if name in ("whole", "stages")}
    asked = {name: value for name, value in options.items() if name not in form}
    made = sap_hf.plan(
        LENGTHS, cp_size=WORLD, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, **asked
    )
    return dataclasses.replace(made, **{"whole": True, "stages": 1, **form})


def bytes_held(rank, world, cases):
    """The most bytes beside q, k, v, out and dout during one layer, after a first one has made the arena."""
    importlib.import_module("sap_hf.runtime.attention")._pick = lambda *args, **kwargs: (Hollow(), "")
    found = []
    for options in cases:
        plan = make(options)
        rows, window = plan.rows_per_rank, options.get("window")
        shapes = [(rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        # Compiles the program, which lives as long as the plan.
        sap_hf.attention(q, k, v, plan, window=window).sum().backward()
        arena.free()
        indices = [index for index in load(plan, rank, window, q.device).packed if index is not None]
        with LiveBytes(q, k, v, *indices) as counted:
            sap_hf.attention(q, k, v, plan, window=window).sum().backward()
            q.grad = k.grad = v.grad = None
            of_arena = counted.peak = counted.live
            out = sap_hf.attention(q, k, v, plan, window=window)
            forward = counted.peak - out.nbytes
            dout = torch.ones_like(out)
            counted.peak = counted.live
            out.backward(dout)
        found.append((max(forward, counted.peak - out.nbytes - dout.nbytes), of_arena))
    return found


@pytest.fixture(scope="module")
def held():
    by_rank = run_ranks(bytes_held, WORLD, OPTIONS)
    return list(zip(*by_rank))


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda i: "-".join(map(str, OPTIONS[i].values())))
def test_the_fullest_rank_holds_what_the_plan_says(held, number):
    assert max(peak for peak, _ in held[number]) == make(OPTIONS[number]).peak_bytes


def test_between_layers_only_the_arena_is_held(held):
    for options, ranks in zip(OPTIONS, held, strict=True):
        assert all(0 < between < make(options).peak_bytes for _, between in ranks)


def test_fewer_remote_rows_at_once_take_fewer_bytes():
    peaks = [make({"layout": "zigzag", "max_remote_rows": rows}).peak_bytes for rows in (None, 400, 100, 20)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.8 * peaks[0]
