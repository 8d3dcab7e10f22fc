"""Ways to train a small Llama on packed rows, and what each gives it: the model, its batches and who sees which.

A way is our strategies on one pack that all ranks share, a peer on the same pack, or every rank alone with a pack or a
padded batch of its own. `step.py` times them, `memory.py` counts what they hold.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peers import Ringmaster
from transformers import LlamaConfig, LlamaForCausalLM

import sap_hf
from sap_hf.data.packing import best_fit_decreasing
from sap_hf.models.patch import unpatch_model
from sap_hf.planning.workloads import pack
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
PADDED_BATCH = 8
WARM_UP_ROWS = 256
IGNORED = -100

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        setup: patches a model for the time of a `with`.
        batches: what this rank gives the model in a step, turn by turn; the first turn warms up.
        tokens: real tokens of all ranks' batches, turn by turn.
        data: ways with the same name here see the same tokens, and must find the same loss.
    """

    setup: Callable[[LlamaForCausalLM], contextlib.AbstractContextManager[object]]
    batches: list[list[Batch]]
    tokens: list[int]
    data: str


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
    batches = [[packed(lengths, rng, device)] for lengths in packs[:2]]
    batches += batches[1:] * (turns - 1)
    tokens = [int(lengths.sum()) for lengths in packs]
    ways = {
        f"{strategy} {layout}{f' x ulysses {size}' if size == 2 else ''}": Way(
            sharing(options, strategy=strategy, layout=layout, ulysses_size=size),
            batches,
            tokens,
            "pack",
        )
        for strategy, layout, size in STRATEGIES
        if size != 2 or world % 2 == 0
    }
    for name, peer in peers.items():
        cut = [[peer.cut(batch, lengths) for batch in step] for step, lengths in zip(batches, packs)]
        ways[name] = Way(peer.on, cut, tokens, "pack")
    return ways


def targets(batch: Batch) -> int:
    """Tokens whose loss a batch adds to the mean."""
    return int((batch["shift_labels" if "shift_labels" in batch else "labels"] != IGNORED).sum())


def chat_ways(
    workload: str, options: argparse.Namespace, device: torch.device, peers: dict[str, Ringmaster]
) -> dict[str, Way]:
    """As many packs as ranks, shared by all ranks one after the other or at once, or one on each; or padded batches.

    Other chats in every turn.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    warm = [np.array([WARM_UP_ROWS // world] * 2)] * world
    # Enough for the padded batches, and for the packs.
    lengths = chat_lengths(
        options.rows, (options.turns + 1) * world * PADDED_BATCH * max(1, options.rows // 2048)
    )
    packs = warm + packs_of(lengths, options.rows)[: options.turns * world]
    flat = warm + list(lengths[: options.turns * world * PADDED_BATCH].reshape(-1, PADDED_BATCH))
    assert len(packs) == (options.turns + 1) * world, f"{len(lengths)} chats fill {len(packs)} packs"
    # A pack has the same tokens on whatever rank it is.
    filled = [packed(documents, np.random.default_rng(i), device) for i, documents in enumerate(packs)]
    rows = [padded(documents, np.random.default_rng(i), device) for i, documents in enumerate(flat)]
    every, mine, mine_padded = (
        [batches[at + rank : at + world : step] for at in range(0, len(batches), world)]
        for batches, rank, step in ((filled, 0, 1), (filled, rank, world), (rows, rank, world))
    )
    in_packs, in_rows = (
        [int(sum(map(np.sum, of[at : at + world]))) for at in range(0, len(of), world)]
        for of in (packs, flat)
    )
    return {
        "auto auto": Way(sharing(options), every, in_packs, "packs"),
        "auto, packs together": Way(sharing(options), [[joined(step)] for step in every], in_packs, "packs"),
        "own pack, our kernel": Way(sharing(options, group=ALONE), mine, in_packs, "packs"),
        "own pack, dense mask": Way(contextlib.nullcontext, mine, in_packs, "packs"),
        f"padded batch of {PADDED_BATCH}": Way(contextlib.nullcontext, mine_padded, in_rows, "padded"),
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


def joined(packs: list[Batch]) -> Batch:
    """One row of several, as a collator makes it of a batch of packs."""
    return {name: torch.cat([pack[name] for pack in packs], dim=1) for name in packs[0]}


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
