"""Several layers over a transport that delivers as late as it may: no buffer is read or reused early.

Stacked layers, gradient checkpointing, two forwards before one backward, a backward in another thread.
"""

import dataclasses
import functools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sap_hf
from sap_hf.runtime import transport
from tests.dist import run_ranks
from tests.oracles import documents_alone
from tests.runtime.doubles import LateTransport

FLOAT64 = 1e-10
WORLD = 4
HEADS, KV_HEADS, WIDTH = 8, 4, 2
MODEL_WIDTH = HEADS * WIDTH
# One window per layer: a window layer between full ones has a schedule of its own.
WINDOWS = (None, 3, None)
PACKS = ((5, 3, 8, 1, 6), (9, 14))

WAYS = (
    "plain",
    "checkpoint_reentrant",
    "checkpoint_not_reentrant",
    "other_thread",
    "checkpoint_other_thread",
)
# Strategy, layout, delivery, remote_kv, ranks that exchange heads, turns.
PLANS = [
    ("sap", "contiguous", "p2p", "refetch", 1, 1),
    ("sap", "zigzag", "p2p", "keep", 1, 1),
    ("sap", "zigzag", "all_to_all", "refetch", 1, 1),
    ("sap", "zigzag", "p2p", "refetch", 2, 2),
    ("sap", "contiguous", "all_to_all", "keep", 2, 2),
    ("all_gather", "zigzag", "p2p", "refetch", 1, 1),
    ("all_gather", "contiguous", "all_to_all", "keep", 1, 1),
    ("ring", "zigzag", "p2p", "refetch", 2, 2),
    ("sap", "zigzag", "p2p", "refetch", 2, 1),
]


# Every plan in the plain way; of the others, with and without heads exchanged, one refetches, one keeps what came.
COMBINATIONS = [(way, plan) for way in WAYS for plan in (PLANS if way == "plain" else PLANS[1:5])]


def weights():
    draw = torch.Generator().manual_seed(7)
    outer = MODEL_WIDTH + 2 * KV_HEADS * WIDTH
    made = []
    for _ in WINDOWS:
        for shape in ((MODEL_WIDTH, outer), (MODEL_WIDTH, MODEL_WIDTH)):
            weight = torch.randn(*shape, generator=draw, dtype=torch.float64) / MODEL_WIDTH**0.5
            made.append(weight.requires_grad_())
    return made


def tokens(lengths):
    draw = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    padded = -(-sum(lengths) // WORLD) * WORLD
    return torch.randn(2, padded, MODEL_WIDTH, generator=draw, dtype=torch.float64)


def layer(x, into, out_of, window, attend):
    q, k, v = (x @ into).split([MODEL_WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], dim=1)
    heads = [part.unflatten(1, (-1, WIDTH)) for part in (q, k, v)]
    return x + attend(*heads, window=window).flatten(1) @ out_of


def stack(x, all_weights, attend, wrap):
    for window, (into, out_of) in zip(WINDOWS, zip(all_weights[::2], all_weights[1::2])):
        x = wrap(layer, x, into, out_of, window, attend)
    return x


def call(function, *args):
    return function(*args)


WRAPS = {
    "plain": call,
    "other_thread": call,
    "checkpoint_reentrant": functools.partial(checkpoint, use_reentrant=True),
    "checkpoint_not_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "checkpoint_other_thread": functools.partial(checkpoint, use_reentrant=False),
}


def make(lengths, strategy, layout, delivery, size, turns):
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "ulysses_size": size}
    plan = sap_hf.plan(lengths=list(lengths), cp_size=WORLD, strategy=strategy, layout=layout, **heads)
    return dataclasses.replace(plan, delivery=delivery, turns=turns)


def train_once(rank, way, strategy, layout, delivery, remote_kv, size, turns):
    """Forward of both packs, then one backward: gradients of the weights (this rank's part) and tokens."""
    parameters = weights()
    inputs, loss = [], 0.0
    for lengths in PACKS:
        plan = make(lengths, strategy, layout, delivery, size, turns)
        rows = torch.from_numpy(plan.rows(rank))
        x, dout = tokens(lengths)[:, rows]
        # Padding counts for nothing in a loss; elsewhere it is garbage.
        dout = dout * (rows < sum(lengths))[:, None]
        inputs.append(x.clone().requires_grad_())
        attend = functools.partial(_attend, plan=plan, remote_kv=remote_kv)
        loss = loss + (stack(inputs[-1], parameters, attend, WRAPS[way]) * dout).sum()
    before = transport.current().posted
    if "thread" in way:
        failures = []
        thread = threading.Thread(target=_backward, args=(loss, failures))
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
    else:
        loss.backward()
    return {
        "loss": loss.detach(),
        "weights": [parameter.grad for parameter in parameters],
        "tokens": [x.grad for x in inputs],
        "posted_in_backward": transport.current().posted - before,
    }


def _attend(q, k, v, *, window, plan, remote_kv):
    return sap_hf.attention(q, k, v, plan, window=window, remote_kv=remote_kv)


def _backward(loss, failures):
    try:
        loss.backward()
    except Exception as error:  # noqa: BLE001  raised again by whoever started the thread
        failures.append(error)


def train_all(rank, world):
    results = {}
    with transport.using(LateTransport()) as late:
        for way, plan in COMBINATIONS:
            results[way, plan] = train_once(rank, way, *plan)
            results[way, plan]["unwaited"] = late.posted - late.waited
    return results


@pytest.fixture(scope="module")
def trained():
    return run_ranks(train_all, WORLD, poison=True, timeout=90)


@pytest.fixture(scope="module")
def right():
    parameters = weights()
    inputs, loss = [], 0.0
    for lengths in PACKS:
        x, dout = tokens(lengths)[:, : sum(lengths)]
        inputs.append(x.clone().requires_grad_())
        attend = functools.partial(documents_alone, lengths=lengths)
        loss = loss + (stack(inputs[-1], parameters, attend, call) * dout).sum()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in parameters], [x.grad for x in inputs]


EACH = pytest.mark.parametrize(
    "way, plan", COMBINATIONS, ids=[f"{way}-{'-'.join(map(str, plan))}" for way, plan in COMBINATIONS]
)


@EACH
def test_late_delivery_changes_nothing(trained, right, way, plan):
    loss, weight_gradients, token_gradients = right
    ranks = [by_rank[way, plan] for by_rank in trained]
    assert (sum(result["loss"] for result in ranks) - loss).abs() <= FLOAT64 * loss.abs()
    for number, expected in enumerate(weight_gradients):
        found = sum(result["weights"][number] for result in ranks)
        assert (found - expected).abs().max() <= FLOAT64 * expected.abs().max()
    for number, lengths in enumerate(PACKS):
        made = make(lengths, *plan[:3], *plan[4:])
        for rank, result in enumerate(ranks):
            rows = made.rows(rank)
            real = rows < sum(lengths)
            found = result["tokens"][number]
            assert (found[real] - token_gradients[number][rows[real]]).abs().max() <= FLOAT64
            # A padding row has out = 0 and no key that anyone reads; nothing reaches its token.
            assert not found[~real].any()


@EACH
def test_every_exchange_is_waited_for(trained, way, plan):
    for by_rank in trained:
        assert by_rank[way, plan]["unwaited"] == 0
        assert by_rank[way, plan]["posted_in_backward"] > 0, "the double was not used in the backward"
