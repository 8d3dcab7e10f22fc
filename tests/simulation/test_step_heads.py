"""A training step's memory where heads are exchanged, against what real ranks keep for their backward."""

import torch

import sap_hf
from sap_hf.simulation.step import Model, Training, step_seconds
from tests.dist import run_ranks

# Query and kv heads, ranks that exchange them: none; one kv head each, two ranks to one, unequal parts.
EXCHANGES = [(8, 4, 1), (8, 4, 2), (8, 4, 4), (8, 2, 4), (9, 3, 2), (9, 3, 4)]


def exchanging(num_heads, num_kv_heads, ulysses_size):
    model = Model(1, num_heads * 16, 0, num_heads, num_kv_heads, head_dim=16)
    return model, sap_hf.plan(
        [128],
        cp_size=4,
        ulysses_size=ulysses_size,
        strategy="sap",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=model.head_dim,
    )


def saved_by_attention(rank, world, cases):
    """Bytes that the backward of attention and of its output projection is left, for each case."""
    found = []
    for case in cases:
        model, plan = exchanging(*case)
        shapes = [
            (plan.rows_per_rank, heads, model.head_dim)
            for heads in (model.num_heads, *(model.num_kv_heads,) * 2)
        ]
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        weight = torch.randn(model.hidden, model.query, dtype=torch.bfloat16, requires_grad=True)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = sap_hf.attention(q, k, v, plan)
            y = torch.nn.functional.linear(out.flatten(1), weight)
        saved.pop(weight.data_ptr(), None)
        found.append(sum(storage.nbytes() for storage in saved.values()))
        y.sum().backward()
    return found


def test_activations_of_exchanged_heads_are_what_the_busiest_rank_saves():
    by_rank = run_ranks(saved_by_attention, 4, EXCHANGES)
    for case, found in zip(EXCHANGES, zip(*by_rank)):
        model, plan = exchanging(*case)
        held = step_seconds(plan, model, Training(checkpointing=False)).bytes
        around = 16 * model.hidden * plan.rows_per_rank
        assert held["activations"] - around == max(found), case
        checkpointed = step_seconds(plan, model).bytes
        assert checkpointed["layer"] == held["activations"]
        assert 0 < held["attention"] <= plan.peak_bytes
        assert (held["attention"] == plan.peak_bytes) == (plan.ulysses_size == 1)
