"""Plan.peak_bytes is what a layer then holds, to the byte; a budget of remote rows makes it less."""

import dataclasses
import importlib

import pytest
import torch

import sap_hf
from sap_hf.kernels import NOWHERE
from sap_hf.kernels.interface import space
from sap_hf.planning.compile import compile_program
from sap_hf.planning.heads import split_turns
from sap_hf.planning.memory import arena_bytes, peak_bytes
from sap_hf.runtime import arena, transport
from sap_hf.runtime.device_program import load
from tests.dist import run_ranks
from tests.runtime.memory import CopyingTransport, LiveBytes

WORLD, HEAD_DIM = 4, 64
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
    {"layout": "zigzag", "delivery": "p2p", "bytes_per_element": 4},
    {"layout": "balanced", "delivery": "p2p", "bytes_per_element": 4},
    {"layout": "contiguous", "delivery": "p2p", "whole": False, "bytes_per_element": 4},
    {"cp_size": 1},
    {"cp_size": 1, "window": 33},
    # Heads exchanged among all ranks: kv heads go to one rank each, to two, to several of unequal parts.
    {"ulysses_size": 4, "num_kv_heads": 8},
    {"ulysses_size": 4, "num_kv_heads": 4},
    {"ulysses_size": 4},
    {"ulysses_size": 4, "bytes_per_element": 4},
    {"ulysses_size": 4, "num_heads": 9, "num_kv_heads": 3},
    {"ulysses_size": 4, "num_heads": 9, "num_kv_heads": 3, "bytes_per_element": 4},
    {"ulysses_size": 4, "lengths": (*LENGTHS[:-1], LENGTHS[-1] - 1)},
    # And among two, with rows shared by two such pairs.
    {"ulysses_size": 2, "layout": "zigzag", "num_kv_heads": 8},
    {"ulysses_size": 2, "layout": "balanced", "delivery": "all_to_all", "whole": False},
    {"ulysses_size": 2, "layout": "zigzag", "num_heads": 9, "num_kv_heads": 3},
    {"ulysses_size": 2, "layout": "zigzag", "num_heads": 9, "num_kv_heads": 3, "whole": False, "stages": 2},
    {"ulysses_size": 2, "layout": "zigzag", "num_heads": 9, "num_kv_heads": 3, "bytes_per_element": 4},
    {"ulysses_size": 2, "strategy": "ring", "layout": "zigzag", "num_heads": 9, "num_kv_heads": 9},
    {"ulysses_size": 2, "layout": "zigzag", "max_remote_rows": 64, "num_kv_heads": 1},
    {"ulysses_size": 2, "layout": "contiguous", "window": 33, "num_heads": 9, "num_kv_heads": 3},
    # Some of the heads after the others.
    {"ulysses_size": 4, "num_kv_heads": 8, "turns": 2},
    {"ulysses_size": 2, "layout": "zigzag", "num_kv_heads": 8, "turns": 2},
    {"ulysses_size": 2, "layout": "zigzag", "num_kv_heads": 4, "turns": 2, "bytes_per_element": 4},
    {"ulysses_size": 2, "layout": "zigzag", "num_heads": 9, "num_kv_heads": 3, "turns": 2},
    {"ulysses_size": 2, "layout": "balanced", "delivery": "all_to_all", "whole": False, "num_heads": 9}
    | {"num_kv_heads": 9, "turns": 2},
    {"ulysses_size": 2, "strategy": "ring", "layout": "zigzag", "num_kv_heads": 8, "turns": 3},
    {"ulysses_size": 2, "layout": "zigzag", "max_remote_rows": 64, "num_kv_heads": 8, "turns": 2},
    {"ulysses_size": 2, "layout": "contiguous", "window": 33, "num_heads": 10, "num_kv_heads": 5, "turns": 2},
]
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Hollow:
    """A kernel that returns what kernels return, in q's dtype and in its place, and needs nothing for itself."""

    def forward(self, q, k, v, segments, scoring, place=None):
        return space(place, q, v.shape[2], zeros=True), q.new_zeros(q.shape[:2], dtype=torch.float32)

    def backward(self, dout, q, k, v, out, lse, segments, scoring, places=NOWHERE):
        return tuple(space(place, x, zeros=True) for place, x in zip(places, (q, k, v)))


def make(options):
    form = {name: value for name, value in options.items() if name in ("whole", "stages", "turns")}
    asked = {name: value for name, value in options.items() if name not in form}
    usual = {"lengths": LENGTHS, "cp_size": WORLD, "num_heads": 8, "num_kv_heads": 2, "head_dim": HEAD_DIM}
    made = sap_hf.plan(**{**usual, **asked})
    return dataclasses.replace(made, **{"whole": True, "stages": 1, "turns": 1, **form})


def bytes_held(rank, world, cases):
    """The most bytes beside q, k, v, out and dout in a layer's forward and backward; of the arena between layers."""
    importlib.import_module("sap_hf.runtime.attention")._pick = lambda *args, **kwargs: (Hollow(), "")
    found = []
    for options in cases:
        plan = make(options)
        rows, window, dtype = plan.rows_per_rank, options.get("window"), DTYPES[plan.shape.bytes_per_element]
        heads = (plan.shape.num_heads, plan.shape.num_kv_heads, plan.shape.num_kv_heads)
        q, k, v = (torch.ones((rows, count, HEAD_DIM), dtype=dtype, requires_grad=True) for count in heads)
        # Compiles the program, which lives as long as the plan.
        sap_hf.attention(q, k, v, plan, window=window).sum().backward()
        arena.free()
        indices = [
            index for index in load(plan, rank % plan.cp_size, window, q.device).packed if index is not None
        ]
        with transport.using(CopyingTransport()), LiveBytes(q, k, v, *indices) as counted:
            sap_hf.attention(q, k, v, plan, window=window).sum().backward()
            q.grad = k.grad = v.grad = None
            of_arena = counted.peak = counted.live
            out = sap_hf.attention(q, k, v, plan, window=window)
            forward = counted.peak - out.nbytes
            dout = torch.ones_like(out)
            counted.peak = counted.live
            out.backward(dout)
        found.append(((forward, counted.peak - out.nbytes - dout.nbytes), of_arena))
    return found


@pytest.fixture(scope="module")
def held():
    by_rank = run_ranks(bytes_held, WORLD, OPTIONS)
    return list(zip(*by_rank))


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda i: "-".join(map(str, OPTIONS[i].values())))
def test_every_rank_holds_what_its_program_says_and_the_fullest_what_the_plan_says(held, number):
    plan = make(OPTIONS[number])
    peaks = [peak for peak, _ in held[number][: plan.cp_size]]
    window = OPTIONS[number].get("window")
    programs = [compile_program(plan, rank, window) for rank in range(plan.cp_size)]
    assert peaks == [peak_bytes(program, plan.shape, plan.ulysses_size, plan.turns) for program in programs]
    assert max(map(max, peaks)) == plan.peak_bytes


def test_between_layers_only_the_arena_is_held(held):
    for options, ranks in zip(OPTIONS, held, strict=True):
        plan = make(options)
        programs = [compile_program(plan, rank, options.get("window")) for rank in range(plan.cp_size)]
        for program, (_, between) in zip(programs, ranks):
            heads = plan.shape.num_heads, plan.shape.num_kv_heads
            # The first turn has the most of them.
            its = split_turns(*heads, plan.ulysses_size, plan.turns)[0][program.rank % plan.ulysses_size]
            shape = dataclasses.replace(plan.shape, num_heads=its.q_count, num_kv_heads=its.kv_count)
            # Where nothing travels and no gradient has several parts there is none.
            assert between == arena_bytes(program, shape) < plan.peak_bytes


def test_fewer_remote_rows_at_once_take_fewer_bytes():
    peaks = [make({"layout": "zigzag", "max_remote_rows": rows}).peak_bytes for rows in (None, 400, 100, 20)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.8 * peaks[0]


def test_two_turns_receive_in_fewer_bytes():
    one, two = (make({"ulysses_size": 2, "layout": "zigzag", "num_kv_heads": 8, "turns": n}) for n in (1, 2))
    assert two.peak_bytes < one.peak_bytes
