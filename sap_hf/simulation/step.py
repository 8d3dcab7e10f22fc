"""Step: seconds and bytes of a whole training step of a decoder model, around the attention that a plan describes.

(Plan, Model, Training) -> TrainingStep. The parts that every rank computes alike (matrix products, norms, loss,
optimizer) come from counts of operations and bytes; attention comes from the plan's own model; the parameters are
sharded with FSDP2 over the ranks that share the pack. Not in it: kernel starts outside attention, the data loader, the
embedding's look-up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sap_hf.errors import ConfigError
from sap_hf.planning.cost import Float64, Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import Hardware, find_hardware
from sap_hf.planning.heads import rank_shapes
from sap_hf.planning.plan import Plan
from sap_hf.planning.workloads import pack
from sap_hf.simulation.compare import OURS
from sap_hf.strategies.auto import Request, make_plan

# Forward, gradient of the input, gradient of the weight: one matrix product each.
BACKWARD_PRODUCTS = 2
# Bytes that the backward of element-wise operations moves, over those of the forward: counted, operation by operation,
# in an uncompiled LlamaDecoderLayer, as EAGER is (tests/simulation/test_step.py counts again).
BACKWARD_TRAFFIC = 2.25
# AdamW, fused, all in float32: parameter, gradient and two moments are read, parameter and moments written; before it,
# clipping reads the gradient for its norm, then reads and writes it.
OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 3 * 4
# Dense bfloat16 operations per second of an H100 SXM: NVIDIA's data sheet.
H100_FLOPS_PER_S = 9.89e14
# Rows whose logits exist at once; their gradients are made in the forward (as in Liger's fused linear cross entropy).
LOSS_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with gated MLPs and untied embeddings; the defaults are Llama-3.1-8B's config.json."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256

    @property
    def query(self) -> int:
        """Elements of one row's q, and of its out."""
        return self.num_heads * self.head_dim

    @property
    def key(self) -> int:
        """Elements of one row's k, and of its v."""
        return self.num_kv_heads * self.head_dim

    @property
    def shape(self) -> Shape:
        """One attention layer, in bfloat16."""
        return Shape(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices: q, k, v, o and the three of the MLP; the norms' vectors are left out."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Of the LM head, and as many of the embedding."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.head_parameters


LLAMA_8B = Model()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written per element by the forward of what is no matrix product, in bfloat16.

    Attributes:
        norm, residual: per element of the hidden state; a layer has two of each.
        rotary: per element of q and k.
        gate: per element of the MLP's inner width.
        loss: per logit, forward and backward together.
    """

    norm: float
    residual: float
    rotary: float
    gate: float
    loss: float


# One kernel per operation, as uncompiled transformers: LlamaRMSNorm (to float32, square, mean, scale, to bfloat16,
# weight), apply_rotary_pos_emb (cos, negate half, join, sin, add), silu and product, cross entropy in float32.
EAGER = Traffic(norm=36, residual=6, rotary=20, gate=10, loss=36)
# One kernel for each: read once, written once.
FUSED = Traffic(norm=4, residual=6, rotary=4, gate=6, loss=6)


@dataclasses.dataclass(frozen=True)
class Training:
    """How the step is run, and what `Hardware` does not say of the machine.

    Attributes:
        checkpointing: a layer keeps its input and attention's out and lse, and the backward computes the rest again.
        traffic: EAGER or FUSED.
        linear_flops_per_s: bfloat16 matrix products. 6e14 of an H100's 9.89e14 (NVIDIA's data sheet, dense): between
            the 4.6e14 that fits what torchtitan measured on H100s limited to 500 W (its
            benchmarks/llama3_h100_202412_torchtitan.md) and the 6.4e14 of as many operations per joule at 700 W.
        shards: ranks that the parameters are spread over; None: those that share the pack.
    """

    checkpointing: bool = True
    traffic: Traffic = EAGER
    linear_flops_per_s: float = 6e14
    shards: int | None = None


# Parts of a step that a table shows as one column: every part is in one of them.
COLUMNS = {
    "attention": ("attention_forward", "attention_backward", "attention_waiting"),
    "linear": ("products", "traffic", "recompute", "head"),
    "optimizer": ("optimizer",),
    "fsdp": ("fsdp_waiting",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingStep:
    """One optimizer step on the pack of `plan`.

    Attributes:
        parts: name -> (W,) seconds of each rank. What other work hides is in none of them.
    """

    plan: Plan
    model: Model
    training: Training
    parts: dict[str, Float64]

    @property
    def rank_seconds(self) -> Float64:
        """(W,) until each rank would be done if it waited for the others' rows alone."""
        return sum(self.parts.values(), np.zeros(1))

    @property
    def seconds(self) -> float:
        """Of the slowest rank: FSDP's collectives in every layer let no rank run ahead."""
        return float(self.rank_seconds.max())

    @property
    def columns(self) -> dict[str, float]:
        """Seconds of the slowest rank by COLUMNS; their sum is `seconds`."""
        slowest = int(self.rank_seconds.argmax())
        return {
            name: float(sum(self.parts[part][slowest] for part in parts)) for name, parts in COLUMNS.items()
        }

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks that share the pack, padding left out."""
        return self.plan.documents.rows / self.seconds

    @functools.cached_property
    def bytes(self) -> dict[str, int]:
        """Kind -> bytes on the busiest rank. `attention`, `layer` and `logits` come and go, the others stay."""
        return _bytes(self.plan, self.model, self.training)

    @property
    def peak_bytes(self) -> int:
        """Logits exist while no layer works."""
        going = ("attention", "layer", "logits")
        staying = sum(amount for kind, amount in self.bytes.items() if kind not in going)
        return staying + max(self.bytes["attention"] + self.bytes["layer"], self.bytes["logits"])


def step_seconds(plan: Plan, model: Model = LLAMA_8B, training: Training = Training()) -> TrainingStep:
    """Seconds and bytes of one optimizer step on the pack of `plan`, in bfloat16 with float32 masters.

    Args:
        plan: its hardware's links, copies and kernels count for the whole step.

    Raises:
        ConfigError: the plan is for another layer than the model's in bfloat16, or for a number of layers that does not
            divide the model's.
    """
    shape, hardware = plan.shape, plan.hardware
    if shape != model.shape:
        raise ConfigError(f"The plan is for {shape}, the model's layers are {model.shape}.")
    repeats, rest = divmod(model.layers, sum(plan.windows.values()))
    if rest:
        raise ConfigError(f"windows={plan.windows} do not divide the model's {model.layers} layers.")
    rows, copy, traffic = plan.rows_per_rank, hardware.copy_bytes_per_s, training.traffic

    # One layer on one rank, attention apart; every rank has as many rows.
    products = 2 * rows * model.layer_parameters / training.linear_flops_per_s
    moved = 2 * (traffic.norm + traffic.residual) * model.hidden
    moved += traffic.rotary * (model.query + model.key) + traffic.gate * model.mlp
    around = rows * moved / copy
    again = products + around if training.checkpointing else 0.0
    dense, dense_back = products + around, BACKWARD_PRODUCTS * products + BACKWARD_TRAFFIC * around + again

    attention = plan.layer_seconds
    forward = repeats * (attention.forward + attention.forward_exposed).max() / model.layers + dense
    backward = repeats * (attention.backward + attention.backward_exposed).max() / model.layers + dense_back
    shards = training.shards or plan.cp_size
    head = (1 + BACKWARD_PRODUCTS) * 2 * rows * model.head_parameters / training.linear_flops_per_s
    head += rows * traffic.loss * model.vocabulary / copy
    every = np.ones(plan.cp_size)
    parts = {
        "attention_forward": repeats * attention.forward,
        "attention_backward": repeats * attention.backward,
        "attention_waiting": repeats * (attention.forward_exposed + attention.backward_exposed),
        "products": model.layers * (1 + BACKWARD_PRODUCTS) * products * every,
        "traffic": model.layers * (1 + BACKWARD_TRAFFIC) * around * every,
        "recompute": model.layers * again * every,
        "head": head * every,
        "fsdp_waiting": _fsdp_waiting(model, shards, hardware, forward, backward) * every,
        "optimizer": model.parameters / shards * OPTIMIZER_BYTES / copy * every,
    }
    return TrainingStep(plan, model, training, parts)


def collective_seconds(amount: float, ranks: int, hardware: Hardware) -> float:
    """An all-gather to, or a reduce-scatter of, `amount` bytes on each rank, in rings through all of a node's cards.

    Each rank sends and receives (W-1)/W of it; between nodes each card carries its share of what enters the node.
    """
    if ranks == 1:
        return 0.0
    size = min(hardware.ranks_per_node, ranks)
    slowest = hardware.node_bytes_per_s
    if ranks > size:
        slowest = min(slowest, size * hardware.network_bytes_per_s)
    return amount * (ranks - 1) / ranks / slowest + hardware.step_seconds


def _fsdp_waiting(model: Model, shards: int, hardware: Hardware, forward: float, backward: float) -> float:
    """Seconds of FSDP2's collectives that one layer's compute does not hide; all on one communicator.

    The next layer's parameters travel while a layer computes, its gradients while the layer before it does. The root
    (embedding, head) is gathered before the first layer, stays, and is reduced after the last. In bfloat16 both ways:
    accelerate's mixed-precision policy for bf16 sets param_dtype and reduce_dtype alike.
    """
    layer = collective_seconds(2 * model.layer_parameters, shards, hardware)
    root = collective_seconds(2 * 2 * model.head_parameters, shards, hardware)
    hidden = max(0.0, layer - forward) + max(0.0, 2 * layer - backward)
    return 2 * root + 2 * layer + (model.layers - 1) * hidden


def _bytes(plan: Plan, model: Model, training: Training) -> dict[str, int]:
    shards, checkpointing = training.shards or plan.cp_size, training.checkpointing
    rows, shard = plan.rows_per_rank, -(-model.parameters // shards)
    # bfloat16 copies of the root and of two layers, gradients of the root and of one layer.
    gathered = 2 * (2 * 2 * model.head_parameters + 3 * model.layer_parameters)
    # Attention's backward reads q, k, v, out and lse of this rank's heads, for all rows of those that exchange them.
    shapes = rank_shapes(plan.shape, plan.ulysses_size)
    its = max(shapes, key=lambda each: (each.num_heads + each.num_kv_heads, each.num_heads))
    attended = rows * plan.ulysses_size
    out = attended * its.num_heads * (2 * model.head_dim + 4)
    qkv = attended * (its.num_heads + 2 * its.num_kv_heads) * 2 * model.head_dim
    # The output projection's reads out of its own rows. Where heads travel that is another tensor, and peak_bytes has
    # q, k, v and out of all rows in it.
    exchanged = plan.ulysses_size > 1
    projected = exchanged * 2 * rows * model.query
    again = exchanged * (qkv + attended * its.num_heads * 2 * model.head_dim)
    # What one layer's backward reads: both norms' float32 input, scaled input and result; attention's; out; gate, silu,
    # up and their product.
    kept = rows * (16 * model.hidden + 8 * model.mlp) + qkv + out + projected
    boundary = 2 * rows * model.hidden + out
    return {
        "parameters": 4 * shard,
        "gradients": 4 * shard,
        "optimizer": 8 * shard,
        "gathered": gathered if shards > 1 else 0,
        "activations": model.layers * (boundary if checkpointing else kept),
        "attention": plan.peak_bytes - again,
        "layer": kept if checkpointing else 0,
        # bfloat16 logits, their float32 copy and gradient.
        "logits": min(rows, LOSS_ROWS) * model.vocabulary * (2 + 4 + 4),
    }


# {name: (strategy, layout, ranks that exchange heads)}; between: more than one, fewer than all, whatever is fastest.
# Layout auto is the placement that is best for the strategy, out of those that this library knows.
STRATEGIES: dict[str, tuple[str, str, int | str]] = {
    OURS: ("auto", "auto", "auto"),
    "all_gather": ("all_gather", "auto", 1),
    "all_gather zigzag": ("all_gather", "zigzag", 1),
    "ring": ("ring", "auto", 1),
    "ring zigzag": ("ring", "zigzag", 1),
    "ulysses": ("ulysses", "auto", "auto"),
    "ring x ulysses": ("ring", "auto", "between"),
    "needed contiguous": ("sap", "contiguous", 1),
    "needed zigzag": ("sap", "zigzag", 1),
    "needed balanced": ("sap", "balanced", 1),
}


def strategy_steps(
    documents: Documents,
    ranks: int,
    hardware: Hardware,
    model: Model = LLAMA_8B,
    training: Training = Training(),
) -> Iterator[tuple[str, TrainingStep]]:
    """A step on the pack under each of STRATEGIES, ours first, without those whose heads do not last."""
    asked = Request(documents, ranks, shape=model.shape, hardware=hardware)
    for name, (strategy, layout, exchange) in STRATEGIES.items():
        sizes: Sequence[int | str] = [exchange]
        if exchange == "between":
            sizes = [size for size in range(2, min(ranks, model.num_heads + 1)) if ranks % size == 0]
        elif strategy == "ulysses" and ranks > model.num_heads:
            sizes = []
        plans = (
            make_plan(dataclasses.replace(asked, strategy=strategy, layout=layout, ulysses_size=size))
            for size in sizes
        )
        if sizes:
            yield name, step_seconds(min(plans, key=lambda made: made.seconds), model, training)


PLANS = (
    ("auto", "auto"),
    ("sap", "contiguous"),
    ("sap", "zigzag"),
    ("sap", "balanced"),
    ("all_gather", "zigzag"),
    ("ring", "zigzag"),
)
WORKLOADS = ("magi", "megatron", "chatqa2", "short", "one")


def predict(
    hardware: Hardware | str = "h100",
    ranks: int = 8,
    rows: Sequence[int] = (65536, 131072),
    model: Model = LLAMA_8B,
    training: Training = Training(),
    seed: int = 0,
) -> dict[str, Any]:
    """What is expected of a first run, before it: attention layer and step, for each pack and plan; JSON-able.

    A run is scored against it on the same packs: `pack(workload, rows, numpy.random.default_rng(seed))`. Milliseconds
    are those of the slowest rank.

    Args:
        rows: of the whole packs.
    """
    machine = find_hardware(hardware)
    found = []
    for workload in WORKLOADS:
        for size in rows:
            documents = Documents.from_lengths(pack(workload, size, np.random.default_rng(seed)))
            asked = Request(documents, ranks, shape=model.shape, hardware=machine)
            for strategy, layout in PLANS:
                made = make_plan(dataclasses.replace(asked, strategy=strategy, layout=layout))
                found.append(_prediction(made, workload, size, f"{strategy} {layout}", model, training))
    constants = {
        "hardware": dataclasses.asdict(machine),
        "model": dataclasses.asdict(model),
        "training": dataclasses.asdict(training),
    }
    return {"ranks": ranks, "seed": seed, "constants": constants, "predictions": found}


def _prediction(
    plan: Plan, workload: str, rows: int, asked: str, model: Model, training: Training
) -> dict[str, Any]:
    step, layer = step_seconds(plan, model, training), plan.layer_seconds
    return {
        "workload": workload,
        "rows": rows,
        "documents": len(plan.documents),
        "plan": asked,
        "chosen": f"{plan.strategy} {plan.layout} {'+'.join(plan.deliveries)}".strip(),
        "attention_forward_ms": _ms(float((layer.forward + layer.forward_exposed).max())),
        "attention_backward_ms": _ms(float((layer.backward + layer.backward_exposed).max())),
        "attention_ms": _ms(plan.seconds),
        "step_ms": _ms(step.seconds),
        "tokens_per_s": round(step.tokens_per_s),
        "peak_gib": round(step.peak_bytes / 2**30, 2),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
