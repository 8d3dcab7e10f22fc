"""One layer on one of 64 ranks, without data and without peers: it never waits for the host, and what it issues does
not grow with the documents.

torch's fake tensors have shapes and no values: whatever needs a value on the host raises. The fake process group is a
rank of any world in one process. The kernel is the CUDA one, which handles all segments in one call.
"""

import dataclasses
import functools
import importlib
from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import sap_hf
from sap_hf.kernels.varlen import Varlen
from sap_hf.planning.layout import cut
from sap_hf.planning.workloads import pack
from tests.dist import run_ranks

WORLD, ROWS = 64, 512
TOTAL = WORLD * ROWS
HEADS, KV_HEADS, WIDTH = 8, 4, 64
# The first and the second rank of a document of two ranks' rows.
RANKS = (42, 21)
LAYOUTS = ("contiguous", "balanced")
# Two ranks share each document, then one holds it, then each rank holds 2, 4, 32 and 512 of them.
UNIFORM = (1024, 512, 256, 128, 16, 1)
SHORT = (100, 300, 1000, 2000)


def chats(count):
    """Lengths distributed as in `short`, stretched so that about `count` of them fill the pack."""
    drawn = pack("short", 4000 * count, np.random.default_rng(count))[:count]
    return np.diff(np.unique(np.append(0, np.cumsum(drawn) * TOTAL // drawn.sum())))


PACKS = {
    "one": np.array([TOTAL]),
    "megatron": pack("megatron", TOTAL, np.random.default_rng(0)),
    **{f"uniform {rows}": np.full(TOTAL // rows, rows) for rows in UNIFORM},
    **{f"short {count}": chats(count) for count in SHORT},
}
# Pack, layout, stages, window, ranks that exchange heads (then in two turns).
CASES = [(name, "contiguous", 1, None, 1) for name in PACKS]
CASES += [(name, "balanced", 1, None, 1) for name in PACKS if not name.startswith("uniform")]
CASES += [("megatron", layout, 4, window, 1) for layout in LAYOUTS for window in (None, 256)]
CASES += [("megatron", "balanced", 1, None, 2)]


@functools.cache
def plan_of(name, layout, stages, window, size):
    plan = sap_hf.plan(
        lengths=PACKS[name].tolist(),
        cp_size=WORLD,
        layout=layout,
        window=window,
        ulysses_size=size,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
    )
    return dataclasses.replace(plan, stages=stages, turns=size)


class Issued(TorchDispatchMode):
    """Counts every operation inside the block, views and messages among them; asking for a device is none."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def from_the_host(*args, **kwargs):
    raise AssertionError("a layer copied something from the host")


def layer(plan, rank, window):
    """What a batch's second layer issues, forward and backward, and the program that it ran."""
    attention = importlib.import_module("sap_hf.runtime.attention")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # pick would take the CPU's kernel; a fake CUDA tensor needs a CUDA build for its backward.
        mock.patch.object(attention, "_pick", return_value=(Varlen(), "asked for")),
    ):
        shapes = [(ROWS, HEADS, WIDTH), *[(ROWS, KV_HEADS, WIDTH)] * 2, (HEADS,)]
        q, k, v, sinks = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        dout = torch.empty_like(q)
        # The first layer of a batch puts the program on the device, all others find it there.
        sap_hf.attention(q, k, v, plan, window=window, sinks=sinks, remote_kv="keep").backward(dout)
        with mock.patch.multiple(torch, from_numpy=from_the_host, tensor=from_the_host):
            with Issued() as forward:
                out = sap_hf.attention(q, k, v, plan, window=window, sinks=sinks)
            with Issued() as backward:
                out.backward(dout)
        program = attention.load(plan, rank, window, q.device).program
    return forward.counts, backward.counts, program


def all_layers(_rank, _world):
    found = {}
    for rank in RANKS:
        dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
        for case in CASES:
            found[rank, case] = layer(plan_of(*case), rank, case[3])
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def layers():
    # In a process of its own: a fake group here would be the group of every later test.
    (found,) = run_ranks(all_layers, 1, init=False)
    return found


def attends(program, backward):
    operations = program.backward if backward else program.forward
    return [program.calls[operation.at] for operation in operations if operation.kind == "attend"]


def most(program, backward):
    """Operations that a program may cost: some once, some for each thing that it lists. No document among them."""
    calls = attends(program, backward)
    rounds = sum(len(call.q.rounds) for call in calls)
    grouped = [exchange for exchange in program.exchanges if exchange.delivery == "p2p"]
    messages = sum(len(exchange.sends) + len(exchange.receives) for exchange in grouped)
    readers = sum(len(exchange.sends) for exchange in program.exchanges)
    if not backward:
        return 8 + 9 * len(calls) + 18 * rounds + 4 * len(program.exchanges) + 2 * messages
    # A message travels twice. Gradients of one reader are added after those of the other, however they came.
    listed = 28 * len(calls) + 4 * rounds + 20 * len(program.exchanges)
    return 40 + listed + 4 * messages + 5 * readers


def test_nothing_is_read_back_and_each_call_is_one_kernel_call(layers):
    # Reading back raised already: a fake tensor has no value.
    for (_, case), (*counts, program) in layers.items():
        for backward, issued in enumerate(counts):
            kernels = [count for name, count in issued.items() if name.startswith("torch_attn.")]
            assert sum(kernels) == plan_of(*case).turns * len(attends(program, backward)) > 0


@pytest.mark.parametrize("rank", RANKS)
def test_more_documents_in_as_many_rows_issue_no_more(layers, rank):
    counts = [
        [issued.total() for issued in layers[rank, (f"uniform {rows}", "contiguous", 1, None, 1)][:2]]
        for rows in UNIFORM
    ]
    for fewer, more in pairwise(counts):
        assert more[0] <= fewer[0] and more[1] <= fewer[1], counts


def test_calls_depend_on_stages_and_slices_only(layers):
    for (rank, case), (*_, program) in layers.items():
        stages = len(program.exchanges)
        plan = plan_of(*case)
        pieces = cut(plan.documents, plan.placement)
        slices = np.unique(pieces.document[pieces.rank == rank // plan.ulysses_size], return_counts=True)[
            1
        ].max()
        for backward in (False, True):
            calls = attends(program, backward)
            # Causal and full tiles; the backward's local ones in two halves.
            assert len(calls) <= 2 * (stages + 1 + backward), (rank, case)
            if stages == 1:
                assert max(len(call.q.rounds) for call in calls) <= slices, (rank, case)


def test_operations_are_bounded_by_the_program(layers, capsys):
    lines = [f"operations of one layer on the busier of ranks {RANKS}, {WORLD} ranks x {ROWS} rows, varlen:"]
    for case in CASES:
        name, layout, stages, window, size = case
        forward, backward = (max(layers[rank, case][i].total() for rank in RANKS) for i in range(2))
        lines.append(
            f"{name:>13}, {len(PACKS[name]):5} documents, {layout}, stages={stages}, window={window}, heads {size}: "
            f"forward {forward}, backward {backward}"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
    for at, (*counts, program) in layers.items():
        turns, size = plan_of(*at[1]).turns, at[1][-1]
        # Heads are cut out, put together, sent and taken apart for each neighbour.
        exchanged = 40 * size * turns if size > 1 else 0
        for backward, issued in enumerate(counts):
            bound = turns * most(program, bool(backward)) + exchanged
            assert issued.total() <= bound, (at, bound, issued)
