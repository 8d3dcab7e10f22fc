"""Classes that bypass the attention interface or hide from it what their mask means: exact, and given back."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import sap_hf
from sap_hf.models.bypass import UNIT, chunked, columns_of
from sap_hf.models.table import TABLE
from tests.dist import run_ranks
from tests.models import families
from tests.models.families import LENGTHS

WINDOW = 6
CHUNK = 8
OTHER = (4, 20, 3)
EXACT = 1e-10
SECOND = slice(LENGTHS[0] + LENGTHS[1], LENGTHS[0] + LENGTHS[1] + LENGTHS[2])


@dataclasses.dataclass(frozen=True)
class Model:
    """A tiny model: its type, what its config has beyond the type's own, and the class that is patched."""

    family: str
    attention: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


# Three heads: the slopes of an alibi are no powers of two then.
FALCON_ALIBI = {"alibi": True, "hidden_size": 24, "num_attention_heads": 3}
MODELS = {
    "bloom": Model("bloom", "BloomAttention", {"hidden_size": 24, "n_head": 3}),
    "falcon": Model("falcon", "FalconAttention"),
    "falcon-mha": Model("falcon", "FalconAttention", {"multi_query": False, "parallel_attn": False}),
    "falcon-gqa": Model("falcon", "FalconAttention", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": Model("falcon", "FalconAttention", {**FALCON_ALIBI, "multi_query": False}),
    "falcon-alibi-mqa": Model("falcon", "FalconAttention", FALCON_ALIBI),
    "gpt_neo": Model(
        "gpt_neo",
        "GPTNeoSelfAttention",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "gpt_neox_japanese": Model("gpt_neox_japanese", "GPTNeoXJapaneseAttention"),
    "llama4": Model(
        "llama4_text",
        "Llama4TextAttention",
        {"attention_chunk_size": CHUNK, "no_rope_layers": [1, 1, 0], "floor_scale": 4, "attn_scale": 0.7},
    ),
    "mpt": Model("mpt", "MptAttention", {"d_model": 24, "n_heads": 3}),
    "openai-gpt": Model("openai-gpt", "Attention"),
    "phimoe": Model("phimoe", "PhimoeAttention", {"sliding_window": WINDOW}),
    "xglm": Model("xglm", "XGLMAttention"),
}
# Keywords dropped or passed on, one class of each kind of table entry.
RECOMPUTED = ("bloom", "falcon-gqa", "gpt_neo", "llama4", "mpt", "xglm")
ALIBI = ("bloom", "falcon-alibi", "falcon-alibi-mqa", "mpt")
SETTINGS: dict[str, dict[str, Any]] = {
    "zigzag": {"layout": "zigzag"},
    "heads": {"strategy": "ulysses"},
    "auto": {},
}
# {ranks: (model, setting)}. Heads that ranks exchange take their bias with them, three heads over two ranks unevenly.
CASES = {
    2: [(name, "zigzag") for name in MODELS]
    + [(name, "heads") for name in ("bloom", "falcon-gqa", "llama4")],
    4: [(name, "auto") for name in MODELS],
}


def build(name: str, attention: str | None = None, **changes: Any) -> Any:
    """The tiny float64 model; attention None is transformers' own choice."""
    return families.build(MODELS[name].family, attention, **{**MODELS[name].fields, **changes})


def truth_of(
    name: str, lengths: Sequence[int] = LENGTHS, training: bool = False, **changes: Any
) -> families.Answer:
    """Every document alone, through transformers' own code."""
    asks = MODELS[name].attention in ("Llama4TextAttention", "PhimoeAttention")
    with families.only_float64():
        model = build(name, "eager" if asks else None, **changes).train(training)
        row = families.pack(lengths)
        # Xglm compares its logits with a number of the default dtype, which a float64 minimum does not fit.
        torch.set_default_dtype(torch.float64)
        try:
            return families.documents_alone(model, row, lengths)
        finally:
            torch.set_default_dtype(torch.float32)


def averaged_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return families.gradients(model)


def one(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    model = build(name)
    patch = sap_hf.patch_model(model, **settings)
    row = families.pack()
    out = model(**row)
    out.loss.backward()
    with torch.no_grad():
        alone = model(
            input_ids=row["input_ids"][:, SECOND], position_ids=row["position_ids"][:, SECOND]
        ).logits
    return {
        "report": str(patch),
        "logits": out.logits.detach()[0],
        "loss": out.loss.item(),
        "gradients": averaged_gradients(model),
        "leak": float((alone - out.logits.detach()[:, SECOND]).abs().max()),
    }


def recomputed(name: str, reentrant: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Under gradient checkpointing, with another batch's forward before the backward."""
    model = build(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    sap_hf.patch_model(model, layout="zigzag")
    loss = model(**families.pack()).loss
    model(**families.pack(OTHER))
    loss.backward()
    return loss.item(), averaged_gradients(model)


def attempt(function: Any, *args: Any) -> Any:
    try:
        with families.only_float64():
            return function(*args)
    except Exception:  # noqa: BLE001 - shown by the test of this model
        return traceback.format_exc()


def shared(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (name, label): attempt(one, name, SETTINGS[label]) for name, label in CASES[world]
    }
    for name in RECOMPUTED if world == 2 else ():
        results |= {(name, way): attempt(recomputed, name, way) for way in (False, True)}
    return results


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[dict[Any, Any]]]:
    return {world: run_ranks(shared, world, timeout=180) for world in CASES}


@pytest.mark.parametrize(
    "world, name, label", [(world, *case) for world, cases in CASES.items() for case in cases]
)
def test_model_equals_documents_run_alone(on_ranks: Any, world: int, name: str, label: str) -> None:
    truth = truth_of(name)
    for rank, results in enumerate(on_ranks[world]):
        result = results[name, label]
        assert isinstance(result, dict), result
        assert float((result["logits"] - truth.logits).abs().max()) < EXACT, f"rank {rank}"
        assert abs(result["loss"] - truth.loss) < EXACT, f"rank {rank}"
        error, where = families.worst(result["gradients"], truth.gradients)
        assert error < EXACT, f"rank {rank}: {where}"
        assert result["leak"] < EXACT, f"rank {rank}"
        method = TABLE[MODELS[name].attention].method
        assert (
            f"{MODELS[name].attention} x" in result["report"] and f"via {method} patched" in result["report"]
        )


@pytest.mark.parametrize("reentrant", [False, True], ids=["recomputed", "reentrant"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_recompute_finds_the_plan_of_its_own_forward(on_ranks: Any, name: str, reentrant: bool) -> None:
    truth = truth_of(name, training=True)
    for results in on_ranks[2]:
        result = results[name, reentrant]
        assert not isinstance(result, str), result
        loss, gradients = result
        assert abs(loss - truth.loss) < EXACT
        error, where = families.worst(gradients, truth.gradients)
        assert error < EXACT, where


@pytest.mark.parametrize("name", ALIBI)
def test_a_bias_is_rounded_as_transformers_rounds_it(name: str) -> None:
    """Beyond 256 positions falcon's is a staircase of bfloat16, in whatever dtype the model is."""
    lengths, changes = (300, 21), {"max_seq_len": 512} if name == "mpt" else {}
    truth = truth_of(name, lengths, **changes)
    with families.only_float64():
        model = build(name, **changes)
        sap_hf.patch_model(model)
        logits = model(**families.pack(lengths)).logits.detach()[0]
    sap_hf.unpatch_model(model)
    assert float((logits - truth.logits).abs().max()) < EXACT


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ALIBI)
def test_bfloat16_is_no_worse_than_twice_as_without_us(name: str, autocast: bool) -> None:
    lengths, changes = (300, 21), {"max_seq_len": 512} if name == "mpt" else {}
    truth = truth_of(name, lengths, **changes).logits
    row = families.pack(lengths)
    model = build(name, **changes).to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        alone = [
            model(input_ids=ids, use_cache=False).logits[0] for ids in row["input_ids"].split(lengths, 1)
        ]
        sap_hf.patch_model(model)
        shared_logits = model(**row).logits[0]
    sap_hf.unpatch_model(model)
    error, usual = ((found.double() - truth).abs().mean() for found in (shared_logits, torch.cat(alone)))
    assert float(error) < 2 * float(usual)


@pytest.mark.parametrize(
    "name, plain",
    [
        ("gpt_neo", {"window_size": 64}),
        ("llama4", {"attention_chunk_size": 64}),
        ("llama4", {"attn_temperature_tuning": False}),
        ("phimoe", {"sliding_window": None}),
        ("falcon-alibi", {"alibi": False}),
        ("falcon-gqa", {"num_ln_in_parallel_attn": 1}),
    ],
)
def test_the_oracle_sees_what_is_special(name: str, plain: dict[str, Any]) -> None:
    special, other = truth_of(name), truth_of(name, **plain)
    assert float((special.logits - other.logits).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_last_patched_model_gives_everything_back(name: str) -> None:
    first, second, plain = (build(name).float() for _ in range(3))
    entry = TABLE[MODELS[name].attention]
    cls = next(type(m) for m in first.modules() if type(m).__name__ == MODELS[name].attention)
    original, implementation = vars(cls)[entry.method], plain.config._attn_implementation
    ids = families.pack()["input_ids"]
    before = plain(input_ids=ids, use_cache=False).logits
    for model in (first, second):
        sap_hf.patch_model(model)
    assert vars(cls)[entry.method] is not original
    # A plain model answers as ever beside patched ones, and so does a patched one that is left.
    assert torch.equal(plain(input_ids=ids, use_cache=False).logits, before)
    sap_hf.unpatch_model(first)
    assert vars(cls)[entry.method] is not original
    assert first.config._attn_implementation == implementation
    assert torch.equal(first(input_ids=ids, use_cache=False).logits, before)
    sap_hf.unpatch_model(second)
    assert vars(cls)[entry.method] is original
    assert torch.equal(second(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("left_padding", [0, 4])
def test_generation_equals_the_plain_model(name: str, left_padding: int) -> None:
    plain, model = build(name).float(), build(name).float()
    sap_hf.patch_model(model)
    ids = torch.randint(3, families.VOCAB, (2, 12), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    ids[0, :left_padding], mask[0, :left_padding] = 0, 0
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = plain.generate(ids, attention_mask=mask, **options)
    found = model.generate(ids, attention_mask=mask, **options)
    sap_hf.unpatch_model(model)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(
    "name, dropout",
    [
        ("bloom", {"attention_dropout": 0.1}),
        ("falcon-alibi", {"attention_dropout": 0.1}),
        ("gpt_neo", {"attention_dropout": 0.1}),
        ("gpt_neox_japanese", {"attention_dropout": 0.1}),
        ("mpt", {"attn_config": {"attn_pdrop": 1}}),
        ("openai-gpt", {"attn_pdrop": 0.1}),
        ("xglm", {"attention_dropout": 0.1}),
    ],
)
def test_attention_dropout_is_refused_by_name(name: str, dropout: dict[str, Any]) -> None:
    model = build(name, **dropout).train()
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match="dropout"):
        refused(model)
    sap_hf.unpatch_model(model)


def refused(model: nn.Module) -> None:
    """Some say so when they are patched, others in the first forward."""
    sap_hf.patch_model(model)
    model(**families.pack())


def test_a_bias_that_transformers_adds_twice_is_refused_by_name() -> None:
    model = build("falcon-alibi", "eager")
    sap_hf.patch_model(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"FalconAttention.*twice"):
        model(**families.pack())
    sap_hf.unpatch_model(model)
    once = build("falcon-alibi")
    ids = families.pack()["input_ids"]
    with torch.no_grad():
        assert float((once(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [1.0, 64**-0.5, 80**-0.5, 128**-0.5])
def test_columns_add_up_to_the_bias(dtype: torch.dtype, scaling: float) -> None:
    positions = torch.cat([torch.arange(4096), torch.arange(2**20 - 4096, 2**20)])
    slopes = 2.0 ** -(torch.arange(1, 72) * 8 / 71)
    bias = slopes[:, None] * positions
    columns = columns_of(bias, scaling, dtype)
    assert columns.dtype == dtype and columns.isfinite().all()
    error = (columns.double().sum(-1) * UNIT * scaling - bias.double()).abs()
    tiny = 2.0**-24 * UNIT * scaling if dtype == torch.float16 else 0.0
    assert bool((error <= 2.0**-23 * bias.double().abs() + tiny).all())
    # What a matrix product that rounds float32 to TF32 (11 bits) would see.
    if dtype == torch.float32:
        assert torch.equal(columns.bfloat16().float(), columns)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) * scaling + bias.T[:, None]
    scores += torch.ones(scores.shape[1:]).tril().log()
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_far_from_the_documents_start_is_as_good_as_one_added_in_float32(dtype: torch.dtype) -> None:
    rows, heads, width, scaling = 1000, 2, 64, 64**-0.5
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(rows, heads, width, generator=generator).to(dtype) for _ in range(3))
    bias = torch.tensor([0.71, 0.05]) * torch.arange(50_000, 50_000 + rows)[:, None]
    columns = columns_of(bias, scaling, dtype)
    wide_q = torch.cat([q, q.new_full((rows, heads, columns.shape[-1]), UNIT)], -1)
    plan = sap_hf.plan([rows], cp_size=1)
    out = sap_hf.attention(wide_q, torch.cat([k, columns], -1), v, plan, softmax_scale=scaling)
    truth = dense(q.double(), k.double(), v.double(), bias.double(), scaling)
    plain = dense(q.float(), k.float(), v.float(), bias, scaling).to(dtype)
    error, usual = (float((found.double() - truth).abs().max()) for found in (out, plain))
    assert error < 2 * usual


@pytest.mark.parametrize("lengths", [(13, 1, 22, 9), (8, 16), (7,), (40,)])
def test_chunks_restart_with_every_document(lengths: tuple[int, ...]) -> None:
    plan = sap_hf.plan(lengths, cp_size=2)
    cut = chunked(plan, CHUNK)
    expected = [rows for length in lengths for rows in [CHUNK] * (length // CHUNK) + [length % CHUNK] if rows]
    assert cut.documents.lengths.tolist() == expected
    assert chunked(plan, CHUNK) is cut
    for rank in range(2):
        assert (cut.rows(rank) == plan.rows(rank)).all()
