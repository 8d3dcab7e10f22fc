"""Time whole training steps of a small Llama, several ways to train beside each other in one run.

    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload magi short one --turns 3 --out result.json
    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload chats --layers 2 --turns 4

A step is forward and backward, the average of all gradients over the ranks (plain all-reduces of what DDP puts into a
bucket), and AdamW. The average is the same for every way, so it is measured once a turn and added to each. Every rank
holds all parameters. After a warm-up on a few rows the ways take turns. The learning rate is 0: every step of
every way meets the same parameters, so ways that see the same tokens must find the same loss, which is checked.

A named workload is one pack of `rows`, shared by all ranks: our strategies against each other. `chats` are the lengths
of the recipes' chats (of at most rows / ranks tokens) with random tokens: a shared pack of `rows`, against every rank
alone with a pack of rows / ranks or with a padded batch of 8; other chats in every turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peers import MODES, Ringmaster
from transformers import LlamaConfig, LlamaForCausalLM

import sap_hf
from sap_hf.data.packing import best_fit_decreasing
from sap_hf.models.patch import find_patch, unpatch_model
from sap_hf.planning.cost import critical_rows
from sap_hf.planning.workloads import WORKLOADS, pack
from sap_hf.runtime.group import ALONE, CpGroup, attach_group

# Strategy, layout, ranks that exchange heads.
STRATEGIES = (
    ("auto", "auto", "auto"),
    ("sap", "contiguous", 1),
    ("all_gather", "zigzag", 1),
    ("ring", "zigzag", 1),
    ("ulysses", "contiguous", "auto"),
    ("ring", "zigzag", 2),
)
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 8, 4, 64, 8192
BUCKET_BYTES = 25 << 20
PADDED_BATCH = 8
WARM_UP_ROWS = 256
IGNORED = -100

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        setup: patches a model for the time of a `with`.
        batches: what this rank gives the model, turn by turn; the first one warms up.
        tokens: real tokens of all ranks' batches, turn by turn.
        weights: this rank's part in the mean loss of all ranks, turn by turn.
        data: ways with the same name here see the same tokens, and must find the same loss.
    """

    setup: Callable[[LlamaForCausalLM], contextlib.AbstractContextManager[object]]
    batches: list[Batch]
    tokens: list[int]
    weights: list[float]
    data: str


@dataclasses.dataclass
class Spent:
    """Seconds of one way's steps, turn by turn, and what came of them."""

    compute: list[float] = dataclasses.field(default_factory=list)
    optimizer: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    plan: sap_hf.Plan | None = None


def main() -> None:
    """Train all ways in turn and print a table; rank 0 writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--workload", nargs="+", default=["magi"], choices=[*WORKLOADS, "chats"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ringmaster", action="store_true", help="time axolotl-ringmaster too; see peers.py")
    parser.add_argument(
        "--hardware", help="what auto plans for: a preset, or a file of sap-hf bench --calibrate"
    )
    parser.add_argument(
        "--note", default="", help="how the machine was set up, e.g. an emulated cluster's limits"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = (
        torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    )
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build(options.layers, options.rows).to(device, torch.bfloat16 if cuda else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    peers = {mode: Ringmaster(mode, HEADS, KV_HEADS, device) for mode in MODES} if options.ringmaster else {}
    for workload in options.workload:
        make = chat_ways if workload == "chats" else shared_ways
        ways = make(workload, options, device, peers)
        spent, averaging = measure(model, optimizer, ways, options.turns)
        if dist.get_rank() == 0:
            report(workload, options, model, ways, spent, averaging)
    dist.barrier()
    dist.destroy_process_group()


def build(layers: int, rows: int) -> LlamaForCausalLM:
    """The model, with transformers' own SDPA attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            # With a cache, transformers does not look for documents in position_ids.
            use_cache=False,
            vocab_size=VOCABULARY,
            hidden_size=HEADS * HEAD_DIM,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=rows,
            attn_implementation="sdpa",
        )
    )


def shared_ways(
    workload: str, options: argparse.Namespace, device: torch.device, peers: dict[str, Ringmaster]
) -> dict[str, Way]:
    """Our strategies, and peers, on one pack that all ranks share; the same in every turn."""
    world, turns = dist.get_world_size(), options.turns
    rng = np.random.default_rng(options.seed)
    packs = [pack("short", WARM_UP_ROWS, rng), pack(workload, options.rows, rng)]
    packs += packs[1:] * (turns - 1)
    batches = [packed(lengths, rng, device) for lengths in packs[:2]]
    batches += batches[1:] * (turns - 1)
    tokens = [int(lengths.sum()) for lengths in packs]
    ways = {
        f"{strategy} {layout}{f' x ulysses {size}' if size == 2 else ''}": Way(
            sharing(options, strategy=strategy, layout=layout, ulysses_size=size),
            batches,
            tokens,
            [1.0] * len(batches),
            "pack",
        )
        for strategy, layout, size in STRATEGIES
        if size != 2 or world % 2 == 0
    }
    for name, peer in peers.items():
        cut = [peer.cut(batch, lengths) for batch, lengths in zip(batches, packs)]
        weights = [float((batch["shift_labels"] != IGNORED).sum()) for batch in cut]
        ways[name] = Way(peer.on, cut, tokens, weights, "pack")
    return ways


def chat_ways(
    workload: str, options: argparse.Namespace, device: torch.device, peers: dict[str, Ringmaster]
) -> dict[str, Way]:
    """A pack shared by all ranks, against every rank with chats of its own. Other chats in every turn."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rng = np.random.default_rng(options.seed)
    warm = [np.array([WARM_UP_ROWS // world] * world)]
    own = options.rows // world
    lengths = chat_lengths(own, (options.turns + 1) * PADDED_BATCH * world)
    wide = warm + packs_of(lengths, options.rows)[: options.turns]
    narrow = warm * world + packs_of(lengths, own)[: options.turns * world]
    flat = warm * world + list(lengths.reshape(-1, PADDED_BATCH))[: options.turns * world]
    shared = [packed(documents, rng, device) for documents in wide]
    alone = [packed(documents, np.random.default_rng(i), device) for i, documents in enumerate(narrow)]
    rows = [padded(documents, np.random.default_rng(i), device) for i, documents in enumerate(flat)]
    sums = [
        [int(sum(map(np.sum, packs[at : at + world]))) for at in range(0, len(packs), world)]
        for packs in (narrow, flat)
    ]
    mine = [batches[rank::world] for batches in (alone, rows)]
    weights = [[float((batch["labels"] != IGNORED).sum()) for batch in batches] for batches in mine]
    return {
        "auto auto": Way(
            sharing(options),
            shared,
            [int(documents.sum()) for documents in wide],
            [1.0] * len(shared),
            "shared",
        ),
        f"own pack of {own}, our kernel": Way(
            sharing(options, group=ALONE), mine[0], sums[0], weights[0], "own"
        ),
        f"own pack of {own}, dense mask": Way(contextlib.nullcontext, mine[0], sums[0], weights[0], "own"),
        f"padded batch of {PADDED_BATCH}": Way(
            contextlib.nullcontext, mine[1], sums[1], weights[1], "padded"
        ),
    }


def sharing(
    options: argparse.Namespace, group: CpGroup | None = None, **how: Any
) -> Callable[[LlamaForCausalLM], contextlib.AbstractContextManager[object]]:
    """What patches a model with these options of ours, for the ranks of `group` or for all."""

    @contextlib.contextmanager
    def setup(model: LlamaForCausalLM):
        attach_group(group)
        sap_hf.patch_model(model, **how, hardware=options.hardware or "auto")
        try:
            yield
        finally:
            unpatch_model(model)
            attach_group(None)

    return setup


def packed(lengths: np.ndarray, rng: np.random.Generator, device: torch.device) -> Batch:
    """One row (1, T) of random tokens; no document predicts the next one's first token."""
    ids = torch.from_numpy(rng.integers(0, VOCABULARY, (1, int(lengths.sum()))))
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}
    return {name: value.to(device) for name, value in batch.items()}


def padded(lengths: np.ndarray, rng: np.random.Generator, device: torch.device) -> Batch:
    """A row (B, longest) for each document, padded on the right."""
    shape = (len(lengths), int(lengths.max()))
    mask = torch.arange(shape[1]) < torch.from_numpy(lengths)[:, None]
    ids = torch.from_numpy(rng.integers(0, VOCABULARY, shape)).masked_fill(~mask, 0)
    labels = ids.masked_fill(~mask, IGNORED)
    labels[:, 0] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
    return {name: value.to(device) for name, value in batch.items()}


def packs_of(lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """Whole documents in packs of at most `rows`, as sap_hf.pack groups them."""
    pack_of = best_fit_decreasing(lengths, rows)
    return [lengths[pack_of == i] for i in range(int(pack_of.max()) + 1)]


def chat_lengths(longest: int, count: int) -> np.ndarray:
    """Tokens (count,) of the recipes' first chats that have at most `longest`, as SmolLM2's template writes them."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
        from material import load_documents, load_tokenizer
        from settings import DataSettings, ModelSettings

        tokenizer = load_tokenizer(ModelSettings(name="material:smollm2-135m-instruct"))
        chats, _ = load_documents(DataSettings(name="material:chitchat"))
        lengths: list[int] = []
        for chat in chats:
            ids = tokenizer.apply_chat_template(chat["messages"], return_dict=True)["input_ids"]
            lengths += [len(ids)] * (len(ids) <= longest)
            if len(lengths) == count:
                break
        found = [lengths]
    dist.broadcast_object_list(found)
    return np.array(found[0], np.int64)


def measure(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ways: dict[str, Way], turns: int
) -> tuple[dict[str, Spent], list[float]]:
    """Steps of all ways in turn, and the seconds of each turn's average of gradients."""
    spent = {name: Spent() for name in ways}
    averaging = []
    for turn in range(turns + 1):
        for place, (name, way) in enumerate(ways.items()):
            with way.setup(model):
                started = clock()
                loss = model(**way.batches[turn]).loss
                loss.backward()
                computed = clock()
                plan = find_patch(model).sharding.last_plan if find_patch(model) else None
            if place == 0:
                average(model)
                averaged = clock()
            stepping = clock()
            optimizer.step()
            stepped = clock()
            optimizer.zero_grad()
            if turn == 0:
                continue
            if place == 0:
                averaging.append(averaged - computed)
            spent[name].compute.append(computed - started)
            spent[name].optimizer.append(stepped - stepping)
            spent[name].plan = plan
            parts = torch.tensor([loss.item() * way.weights[turn], way.weights[turn]], dtype=torch.float64)
            dist.all_reduce(parts)
            spent[name].loss.append(float(parts[0] / parts[1]))
    return spent, averaging


def clock() -> float:
    """Seconds, when the slowest rank has come."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def average(model: LlamaForCausalLM) -> None:
    """Gradients averaged over all ranks in buckets of DDP's size, after the backward."""
    buckets: list[list[torch.Tensor]] = [[]]
    for parameter in reversed(list(model.parameters())):
        if buckets[-1] and sum(gradient.nbytes for gradient in buckets[-1]) + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
        assert parameter.grad is not None
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(part.view_as(gradient))


def report(
    workload: str,
    options: argparse.Namespace,
    model: LlamaForCausalLM,
    ways: dict[str, Way],
    spent: dict[str, Spent],
    averaging: list[float],
) -> None:
    """Print the table and write it with where it came from."""
    world, common = dist.get_world_size(), statistics.median(averaging)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = spent["auto auto"].plan
    assert plan is not None
    inside = plan.hardware.ranks_per_node >= world
    shape = dataclasses.replace(plan.shape, bytes_per_element=model.dtype.itemsize)
    critical = critical_rows(shape, plan.hardware, inside_node=inside)
    print(
        f"{workload}: {options.rows} rows, {world} ranks, {options.layers} layers, {parameters / 1e6:.1f} M "
        f"parameters, planned for {plan.hardware.name}: C/c* = {options.rows // world}/{critical} = "
        f"{options.rows / world / critical:.2g}"
    )
    compute = {name: statistics.median(each.compute) for name, each in spent.items()}
    steps = {name: compute[name] + common + statistics.median(each.optimizer) for name, each in spent.items()}
    tokens_per_s, without = (dict.fromkeys(spent, 0.0) for _ in range(2))
    for name, each in spent.items():
        total = sum(ways[name].tokens[1:])
        seconds = sum(each.compute) + sum(each.optimizer)
        without[name] = total / seconds
        tokens_per_s[name] = total / (seconds + sum(averaging))
        moved = ""
        if each.plan is not None and each.plan.all_gather_rows:
            moved = f"  rows moved {each.plan.rows_moved.sum() / each.plan.all_gather_rows:6.1%}"
        print(
            f"  {name:<32} forward and backward {compute[name]:8.3f} s  "
            f"AdamW {statistics.median(each.optimizer):6.3f} s  step {steps[name]:8.3f} s  "
            f"{tokens_per_s[name]:8.1f} tokens/s, {without[name]:8.1f} without averaging{moved}"
        )
    print(f"  averaging gradients {common:.3f} s: {common / steps['auto auto']:.0%} of auto's step")
    apart = largest_difference(ways, spent)
    print(f"  losses on the same tokens differ by at most {apart:.1e}")
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        record = {
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "note": options.note,
            "commit": commit.stdout.strip(),
            "command": shlex.join(sys.argv),
            "workload": workload,
            "rows": options.rows,
            "ranks": world,
            "layers": options.layers,
            "parameters": parameters,
            "rows_per_critical": options.rows / world / critical,
            "step_seconds": steps,
            "compute_seconds": {name: each.compute for name, each in spent.items()},
            "optimizer_seconds": {name: each.optimizer for name, each in spent.items()},
            "averaging_seconds": averaging,
            "tokens": {name: way.tokens[1:] for name, way in ways.items()},
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_without_averaging": without,
            "loss_difference": apart,
            "hardware": dataclasses.asdict(plan.hardware),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def largest_difference(ways: dict[str, Way], spent: dict[str, Spent]) -> float:
    """Between the losses that ways with the same tokens found in the same turn."""
    found: dict[tuple[str, int], list[float]] = {}
    for name, way in ways.items():
        for turn, loss in enumerate(spent[name].loss):
            found.setdefault((way.data, turn), []).append(loss)
    return max(max(losses) - min(losses) for losses in found.values())


if __name__ == "__main__":
    main()
