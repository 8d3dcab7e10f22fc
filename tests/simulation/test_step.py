"""A training step: counts against a real decoder layer, times against torchtitan's measurements, memory and limits."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import sap_hf
from sap_hf.errors import ConfigError
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.workloads import pack
from sap_hf.simulation import step
from sap_hf.simulation.step import (
    COLUMNS,
    EAGER,
    FUSED,
    LLAMA_8B,
    STRATEGIES,
    Model,
    Training,
    predict,
    step_seconds,
    strategy_steps,
)

SMALL = Model(layers=1, hidden=256, mlp=896, num_heads=4, num_kv_heads=1, head_dim=64, vocabulary=1000)
ROWS = 128
# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: Llama 3.1 8B, two documents of 8192 rows per
# GPU, FSDP, bfloat16: tokens per second and GPU on 8 and 128 H100s limited to 500 W, with memory of 2.4 TB/s.
TORCHTITAN = {
    (8, EAGER): 5762,
    (8, FUSED): 6667,
    (128, EAGER): 5605,
    (128, FUSED): 6514,
}


class Moved(TorchDispatchMode):
    """Bytes read and written by every operation that is neither a view, a matrix product nor attention."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not (function.is_view or "view" in name or "mm" in name or "attention" in name):
            # nll_loss reads one element of a row.
            given = (
                [] if "nll" in name else [*args, *(t for arg in args if isinstance(arg, list) for t in arg)]
            )
            given += out if isinstance(out, list | tuple) else [out]
            self.bytes += sum(t.numel() * t.element_size() for t in given if isinstance(t, torch.Tensor))
        return out


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.mlp,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        head_dim=SMALL.head_dim,
        vocab_size=SMALL.vocabulary,
        attn_implementation="sdpa",
    )


def decoder_layer():
    """A real layer in bfloat16, one packed row of it, and cos and sin."""
    settings = config()
    settings._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(settings, 0).to(torch.bfloat16)
    x = torch.randn(1, ROWS, SMALL.hidden, dtype=torch.bfloat16, requires_grad=True)
    return layer, x, LlamaRotaryEmbedding(settings)(x, torch.arange(ROWS)[None])


def test_parameters_are_those_of_a_real_model_without_its_norms():
    with torch.device("meta"):
        real = LlamaForCausalLM(config())
    norms = sum(p.numel() for name, p in real.named_parameters() if "norm" in name)
    assert sum(p.numel() for p in real.parameters()) - norms == SMALL.parameters
    # Llama-3.1-8B has 8,030,261,248, of which 65 norms of 4096.
    assert LLAMA_8B.parameters == 8_030_261_248 - 65 * 4096


def test_traffic_is_what_a_real_layer_moves():
    layer, x, angles = decoder_layer()
    with Moved() as forward:
        y = layer(x, position_embeddings=angles, attention_mask=None)
    gradient = torch.ones_like(y)
    with Moved() as backward:
        y.backward(gradient)
    seconds = parts_of(ROWS, SMALL)["traffic"] / (1 + step.BACKWARD_TRAFFIC)
    stated = seconds * PRESETS["h100"].copy_bytes_per_s
    assert stated == pytest.approx(forward.bytes, rel=0.03)
    assert backward.bytes / forward.bytes == pytest.approx(step.BACKWARD_TRAFFIC, rel=0.03)


def test_loss_traffic_is_what_cross_entropy_moves():
    logits = torch.randn(ROWS, SMALL.vocabulary, dtype=torch.bfloat16, requires_grad=True)
    with Moved() as moved:
        torch.nn.functional.cross_entropy(logits.float(), torch.zeros(ROWS, dtype=torch.int64)).backward()
    assert moved.bytes / logits.numel() == pytest.approx(EAGER.loss, rel=0.03)


def test_activations_are_what_a_real_layer_saves():
    layer, x, angles = decoder_layer()
    foreign = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *angles)}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in foreign:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, position_embeddings=angles, attention_mask=None)
    plan = plan_for(ROWS, SMALL)
    stated = step_seconds(plan, SMALL, Training(checkpointing=False)).bytes["activations"]
    assert stated == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.002)


def plan_for(rows, model, **options):
    heads = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    return sap_hf.plan([rows], **{"cp_size": 1, **heads, **options})


def parts_of(rows, model, **options):
    made = step_seconds(plan_for(rows, model), model, Training(**options))
    return {name: float(value[0]) for name, value in made.parts.items()}


@pytest.mark.parametrize("shards, traffic", TORCHTITAN, ids=["8-eager", "8-fused", "128-eager", "128-fused"])
def test_tokens_per_second_are_torchtitans(shards, traffic):
    # One constant, the rate of matrix products, is fitted to all four. The run recomputed every second matrix product.
    machine = dataclasses.replace(PRESETS["h100"], copy_bytes_per_s=2.5e12 * 2.4 / 3.35)
    plan = sap_hf.plan([8192, 8192], cp_size=1, hardware=machine)
    seconds = [
        step_seconds(plan, LLAMA_8B, Training(again, traffic, 4.6e14, shards)).seconds
        for again in (True, False)
    ]
    assert 2 * 8192 / np.mean(seconds) == pytest.approx(TORCHTITAN[shards, traffic], rel=0.04)


def test_matrix_products_are_six_operations_per_parameter_and_row():
    parts = parts_of(1000, LLAMA_8B, linear_flops_per_s=1e14, traffic=dataclasses.replace(FUSED, loss=0))
    every = 6 * 1000 * (LLAMA_8B.parameters - LLAMA_8B.head_parameters)
    assert (parts["products"] + parts["head"]) * 1e14 == pytest.approx(every)


def test_the_sum_of_parts_of_the_slowest_rank_is_the_step():
    plan = sap_hf.plan(pack("magi", 65536, np.random.default_rng(1)), cp_size=8, layout="contiguous")
    made = step_seconds(plan)
    assert made.seconds == pytest.approx(max(sum(part[r] for part in made.parts.values()) for r in range(8)))
    attention = ("attention_forward", "attention_backward", "attention_waiting")
    assert sum(made.parts[name] for name in attention).max() == pytest.approx(32 * plan.seconds)
    assert made.tokens_per_s * made.seconds == pytest.approx(65536)


def test_every_part_is_in_one_column_and_the_columns_are_the_slowest_ranks():
    made = step_seconds(plan_for(70_000, LLAMA_8B, cp_size=8, layout="contiguous"))
    assert sorted(itertools.chain(*COLUMNS.values())) == sorted(made.parts)
    assert sum(made.columns.values()) == pytest.approx(made.seconds, rel=1e-12)
    slowest = made.plan.layer_seconds.total
    assert slowest.max() > 1.5 * slowest.mean()
    assert made.columns["attention"] == pytest.approx(32 * slowest.max())


def test_strategies_are_plans_of_their_name_and_ours_attends_no_longer_than_any():
    documents = Documents.from_lengths(pack("half", 16 * 4096, np.random.default_rng(2)))
    steps = dict(strategy_steps(documents, 16, PRESETS["h100"]))
    assert list(steps) == list(STRATEGIES)
    for name, made in steps.items():
        plan, asked = made.plan, name.split()
        if name != "sap_hf":
            assert plan.strategy == {"needed": "sap"}.get(asked[0], asked[0])
        if asked[-1] in ("zigzag", "contiguous", "balanced"):
            assert plan.layout == asked[-1]
        assert steps["sap_hf"].columns["attention"] <= made.columns["attention"] * (1 + 1e-9)
    degrees = {name: made.plan.ulysses_size for name, made in steps.items() if name != "sap_hf"}
    between = {
        size: sap_hf.plan(documents.lengths, cp_size=16, strategy="ring", ulysses_size=size).seconds
        for size in (2, 4, 8)
    }
    assert degrees.pop("ring x ulysses") == min(between, key=between.get)
    assert degrees.pop("ulysses") == 16
    assert set(degrees.values()) == {1}


@pytest.mark.parametrize("ranks, missing", [(3, {"ring x ulysses"}), (64, {"ulysses"})])
def test_strategies_whose_heads_do_not_last_are_left_out(ranks, missing):
    steps = dict(strategy_steps(Documents.from_lengths([ranks * 64]), ranks, PRESETS["h100"]))
    assert set(STRATEGIES) - set(steps) == missing


def test_layers_of_several_windows_count_as_often_as_the_model_has_them():
    once = plan_for(65536, LLAMA_8B, cp_size=8, window={None: 1, 1024: 3})
    named = plan_for(65536, LLAMA_8B, cp_size=8, window={None: 8, 1024: 24})
    assert step_seconds(once).seconds == pytest.approx(step_seconds(named).seconds)


def test_fsdp_waits_for_the_wire_on_a_short_pack_and_hides_it_on_a_long_one():
    machine = PRESETS["h100"]
    wire = 7 / 8 / machine.node_bytes_per_s
    short = step_seconds(plan_for(8, LLAMA_8B, cp_size=8)).parts["fsdp_waiting"][0]
    # Gathered forward and backward, reduced once, in bfloat16, but for the root's second gathering.
    layers, root = 32 * LLAMA_8B.layer_parameters, 2 * LLAMA_8B.head_parameters
    assert short == pytest.approx((2 * 3 * layers + 2 * 2 * root) * wire, rel=0.1)
    assert short < (2 * 3 * layers + 2 * 2 * root) * wire + 100 * machine.step_seconds
    long = step_seconds(plan_for(65536, LLAMA_8B, cp_size=8)).parts["fsdp_waiting"][0]
    assert long == pytest.approx((2 * 2 * LLAMA_8B.layer_parameters + 2 * 2 * root) * wire, rel=0.03)
    assert step.collective_seconds(1e9, 1, machine) == 0
    # Two nodes of one network card for all: what enters a node goes through it.
    slow = dataclasses.replace(machine, network_bytes_per_s=1e9)
    assert step.collective_seconds(1e9, 16, slow) == pytest.approx(1e9 * 15 / 16 / 8e9 + slow.step_seconds)


def test_checkpointing_pays_a_forward_and_keeps_inputs_and_attention():
    plan = plan_for(65536, LLAMA_8B, cp_size=8)
    on, off = (step_seconds(plan, LLAMA_8B, Training(checkpointing=again)) for again in (True, False))
    forward = off.parts["products"] / 3 + off.parts["traffic"] / (1 + step.BACKWARD_TRAFFIC)
    assert on.parts["recompute"] == pytest.approx(forward)
    assert not off.parts["recompute"].any()
    # Per row and layer: the layer's input and out in bfloat16, lse in float32.
    assert on.bytes["activations"] == 32 * 8192 * (2 * 4096 + 2 * 4096 + 4 * 32)
    assert on.peak_bytes < off.peak_bytes


def test_shards_share_the_states():
    plan = plan_for(65536, LLAMA_8B, cp_size=8)
    eight, all64 = step_seconds(plan), step_seconds(plan, LLAMA_8B, Training(shards=64))
    for kind in ("parameters", "gradients", "optimizer"):
        assert eight.bytes[kind] == pytest.approx(8 * all64.bytes[kind])
    # Read: parameter, gradient, two moments, and the gradient twice to clip it. Written: the first four.
    copied = 10 * 4 * LLAMA_8B.parameters / 8
    assert eight.parts["optimizer"] * PRESETS["h100"].copy_bytes_per_s == pytest.approx(copied)
    assert eight.bytes["parameters"] + eight.bytes["optimizer"] == pytest.approx(12 * LLAMA_8B.parameters / 8)


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ConfigError, match="heads"):
        step_seconds(sap_hf.plan([64], cp_size=2, num_heads=16))
    with pytest.raises(ConfigError, match="do not divide"):
        step_seconds(sap_hf.plan([64], cp_size=2, window={None: 1, 8: 4}))


def test_predictions_are_complete_json_and_the_same_twice():
    made = predict(rows=(65536,))
    assert json.loads(json.dumps(made)) == made == predict(rows=(65536,))
    entries = made["predictions"]
    assert len(entries) == len(step.WORKLOADS) * len(step.PLANS)
    for workload in step.WORKLOADS:
        mine = {entry["plan"]: entry for entry in entries if entry["workload"] == workload}
        assert (
            min(mine.values(), key=lambda entry: entry["step_ms"])["step_ms"] == mine["auto auto"]["step_ms"]
        )
        lengths = pack(workload, 65536, np.random.default_rng(0))
        again = sap_hf.plan(lengths, cp_size=8, strategy="ring", layout="zigzag")
        assert mine["ring zigzag"]["attention_ms"] == pytest.approx(again.seconds * 1e3, abs=1e-4)
    assert made["constants"]["hardware"] == dataclasses.asdict(PRESETS["h100"])
