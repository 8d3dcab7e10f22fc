"""The matrix: every supported causal-LM type, on rows shared by ranks, against its documents run alone.

cases()                         what is compared: supported types, and variants of some
compare(rank, world, cases)     on every rank: {case: Result or traceback}
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.models import families
from tests.models.families import Answer
from tests.models.tiny import VARIANTS, VOCAB, config_of

# Of the largest entry. float64 throughout; what is left is the order of sums.
EXACT = 1e-10
ROWS = {"packed": families.LENGTHS, "single": (sum(families.LENGTHS),)}
LAYOUTS = {2: "zigzag", 4: "auto"}
WORLDS = tuple(LAYOUTS)
ROUTER_LOSS = "load_balancing_loss_func"
# What `make test` runs: one of each kind. The others are for `make matrix`.
SHARD = (
    "bamba",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gpt_neox",
    "gpt_oss",
    "jamba",
    "lfm2",
    "llama",
    "mixtral",
    "olmo2",
    "opt",
    "phi3-longrope",
    "qwen2-window",
    "qwen3",
    "qwen3_next",
    "roberta",
    "stablelm",
    "starcoder2",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model type and the fields of its tiny config that differ from the type's own."""

    name: str
    model_type: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far one row on ranks is from its documents run alone, as parts of the largest entry.

    Attributes:
        where: the parameter whose gradient is furthest off.
        leak: how far later documents move when the first one changes.
        moved: how far the first one itself moves then: what a leak would look like.
    """

    logits: float
    loss: float
    gradient: float
    where: str
    leak: float
    moved: float

    @property
    def worst(self) -> float:
        """The largest of all; NaN counts as infinite."""
        errors = (self.logits, self.loss, self.gradient, self.leak)
        return max(error if error == error else float("inf") for error in errors)


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        rows: errors of each of ROWS, and of "router" where the type has a router loss.
        apart: how much the same tokens differ between one document and several: what documents mean to this type.
        report: what patch_model says.
        features: what the layers asked of attention beyond full causal attention.
        changed, left: what differs in the model and in transformers after patch_model, and after unpatch_model.
        generated: whether a patched model generates what a plain one does, and how far its logits are off.
    """

    rows: dict[str, Errors]
    apart: float
    report: str
    features: tuple[str, ...]
    changed: list[str]
    left: list[str]
    generated: tuple[bool, float]

    @property
    def worst(self) -> float:
        """The largest error of all rows."""
        return max(errors.worst for errors in self.rows.values())


def is_exact(found: Any) -> bool:
    """Whether this is the result of an exact case; a traceback is none."""
    return isinstance(found, Result) and found.worst < EXACT


@dataclasses.dataclass(frozen=True)
class Shared:
    """What one rank has of a case: an answer, leak and moved of each row, and what patching did."""

    answers: dict[str, tuple[Answer, float, float]]
    report: str
    features: tuple[str, ...]
    changed: list[str]
    left: list[str]
    generated: tuple[bool, float] | None


def cases() -> dict[str, Case]:
    """Every supported type of the installed transformers, then their variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from sap_hf.models.families import EXACT_FAMILIES

    found = {
        name: Case(name, name)
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if model_type_of(name) in EXACT_FAMILIES
    }
    return {**found, **{name: Case(name, *variant) for name, variant in VARIANTS.items()}}


def model_type_of(name: str) -> str:
    """The type of the config that transformers builds this type's causal language model from."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config_of(name)
    inner = (getattr(config, "sub_configs", None) or {}).get("text_config")
    if inner is not None and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is inner:
        return str(config.get_text_config().model_type)
    return str(config.model_type)


def compare(rank: int, world: int, some: Sequence[Case]) -> dict[str, Any]:
    """{name: Result or traceback} of the cases that fall to this rank."""
    import transformers

    transformers.logging.set_verbosity_error()
    shared = {
        case.name: attempt(on_ranks, case, LAYOUTS[world], index % world == rank)
        for index, case in enumerate(some)
    }
    # Every rank has whole answers; each runs the documents alone for its part of the cases.
    return {
        case.name: shared[case.name]
        if isinstance(shared[case.name], str)
        else attempt(against_alone, case, shared[case.name])
        for case in some[rank::world]
    }


def attempt(function: Any, case: Case, *args: Any) -> Any:
    # Xglm compares its logits with a number of the default dtype, which a float64 minimum does not fit; minimax has
    # the same decays in four buffers, which are as near to each other as the default dtype is exact.
    default = torch.float64 if case.model_type in ("minimax", "xglm") else torch.float32
    torch.set_default_dtype(default)
    try:
        with families.only_float64():
            return function(case, *args)
    except Exception:  # noqa: BLE001 - shown by the test of this case
        return traceback.format_exc()
    finally:
        torch.set_default_dtype(torch.float32)


def on_ranks(case: Case, layout: str, generates: bool) -> Shared:
    import sap_hf

    model = families.build(case.model_type, **case.changes)
    if has_router_loss(model):
        # transformers hooks the routers when they are first asked, and leaves its hooks there.
        model(input_ids=families.pack()["input_ids"], output_router_logits=True)
    before = anatomy(model)
    patch = sap_hf.patch_model(model, layout=layout_for(model, layout))
    patched = anatomy(model)
    with features_asked() as features:
        answers = {name: shared_row(model, lengths) for name, lengths in ROWS.items()}
    if has_router_loss(model):
        answers["router"] = shared_row(model, families.LENGTHS, output_router_logits=True)
    generated = None
    if generates:
        # One rank generates by itself: a collective in there would hang.
        plain = families.build(case.model_type, **case.changes)
        generated = generates_alike(plain, model)
    report = str(patch)
    sap_hf.unpatch_model(model)
    after = anatomy(model)
    return Shared(
        answers,
        report,
        tuple(sorted(features)),
        [key for key in before if before[key] != patched[key]],
        [key for key in before if before[key] != after[key]],
        generated,
    )


def layout_for(model: nn.Module, layout: str) -> str:
    """The layout asked for, where layers that mix neighbouring tokens leave the choice."""
    from sap_hf.models.families import mixer_layers

    return "contiguous" if layout != "auto" and mixer_layers(model) else layout


@contextlib.contextmanager
def features_asked() -> Iterator[set[str]]:
    """What reaches `sap_hf.attention` in there, apart from full causal attention of equal widths."""
    from sap_hf.models import interface

    asked: set[str] = set()
    original = interface.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        here = {
            "window": options["window"] is not None and options["window"] < max(families.LENGTHS),
            "softcap": options["softcap"] is not None,
            "sinks": options["sinks"] is not None,
            "other width of v": v.shape[-1] != k.shape[-1],
            "shared keys": k.shape[1] != q.shape[1],
        }
        asked.update(name for name, present in here.items() if present)
        return original(q, k, v, *args, **options)

    interface.attention = attention
    try:
        yield asked
    finally:
        interface.attention = original


def shared_row(model: nn.Module, lengths: Sequence[int], **options: Any) -> tuple[Answer, float, float]:
    row = families.pack()
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    model.zero_grad()
    out = model(**row, **options)
    out.loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    answer = Answer(out.logits.detach()[0], out.loss.item(), families.gradients(model))
    # The same row with another first document: what the others see of it is what leaks.
    first = families.LENGTHS[0]
    ids = row["input_ids"].clone()
    ids[0, :first] = VOCAB - ids[0, :first] + 2
    with torch.no_grad():
        move = model(input_ids=ids, position_ids=row["position_ids"]).logits[0] - answer.logits
    leak = float(move[first:].abs().max()) if len(lengths) > 1 else 0.0
    return answer, leak, float(move[:first].abs().max())


def against_alone(case: Case, shared: Shared) -> Result:
    truths, rows = {}, {}
    for name, (answer, leak, moved) in shared.answers.items():
        row, lengths = families.pack(), ROWS.get(name, families.LENGTHS)
        if len(lengths) == 1:
            row["position_ids"] = torch.arange(lengths[0])[None]
        model = families.build_plain(case.model_type, **case.changes)
        alone = router_loss_alone if name == "router" else families.documents_alone
        truth = truths[name] = alone(model, row, lengths)
        largest = max(float(gradient.abs().max()) for gradient in truth.gradients.values())
        gradient, where = families.worst(answer.gradients, truth.gradients)
        scale = float(truth.logits.abs().max())
        rows[name] = Errors(
            logits=float((answer.logits - truth.logits).abs().max()) / scale,
            loss=abs(answer.loss - truth.loss) / abs(truth.loss),
            gradient=gradient / largest,
            where=where,
            leak=leak / scale,
            moved=moved / scale,
        )
    later = slice(families.LENGTHS[0], None)
    apart = float((truths["packed"].logits - truths["single"].logits)[later].abs().max()) / scale
    assert shared.generated is not None
    return Result(rows, apart, shared.report, shared.features, shared.changed, shared.left, shared.generated)


def has_router_loss(model: nn.Module) -> bool:
    return hasattr(sys.modules[type(model).__module__], ROUTER_LOSS)


def router_loss_alone(model: nn.Module, row: dict[str, Tensor], lengths: Sequence[int]) -> Answer:
    """Documents alone, with the router loss of all their tokens together, weighed as the model weighs it."""
    ids = row["input_ids"][:, : lengths[0]]
    with torch.no_grad():
        one = model(input_ids=ids, labels=ids, output_router_logits=True)
        weight = (one.loss - model(input_ids=ids, labels=ids).loss) / one.aux_loss
    tokens = families.documents_alone(model, row, lengths)
    routed = [
        model(input_ids=document[None], output_router_logits=True).router_logits
        for document in row["input_ids"][0].split(list(lengths))
    ]
    layers = tuple(torch.cat([each.flatten(0, -2) for each in layer]) for layer in zip(*routed, strict=True))
    experts = layers[0].shape[-1]
    config: Any = model.config
    chosen = getattr(config, "num_experts_per_tok", None) or config.ffn_config.moe_top_k
    loss = weight * getattr(sys.modules[type(model).__module__], ROUTER_LOSS)(layers, experts, chosen)
    # On top of the tokens' gradients, which are still there.
    loss.backward()
    return Answer(tokens.logits, tokens.loss + loss.item(), families.gradients(model))


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that patching could replace, by identity: in the model, its classes and transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config
    found: dict[str, Any] = {
        "implementation": config._attn_implementation,
        "config": config.to_json_string(),
        "class": type(model),
        "attributes": set(vars(model)),
        "attention functions": dict(ALL_ATTENTION_FUNCTIONS),
        "mask functions": dict(ALL_MASK_ATTENTION_FUNCTIONS),
        "router loss": getattr(sys.modules[type(model).__module__], ROUTER_LOSS, None),
    }
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        found[f"{name} hooks"] = [list(getattr(module, kind)) for kind in hooks]
        # Callables alone: transformers remembers on the class what it has found out about it.
        found[f"{name} methods"] = {
            key: value for key, value in vars(type(module)).items() if callable(value)
        }
        found[f"{name} own forward"] = vars(module).get("forward")
    return found


def generates_alike(plain: nn.Module, model: nn.Module) -> tuple[bool, float]:
    """Greedy, with and without left padding, without a cache: same tokens, and how far the logits are off."""
    same, furthest = True, 0.0
    for left_padding, use_cache in ((0, True), (4, True), (4, False)):
        ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(9))
        mask = torch.ones_like(ids)
        ids[0, :left_padding], mask[0, :left_padding] = 0, 0
        options = {
            "attention_mask": mask,
            "max_new_tokens": 6,
            "use_cache": use_cache,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        expected: Any = plain.generate(ids, **options)  # type: ignore[operator]
        found: Any = model.generate(ids, **options)  # type: ignore[operator]
        same = same and torch.equal(found.sequences, expected.sequences)
        logits, wanted = torch.stack(found.logits), torch.stack(expected.logits)
        furthest = max(furthest, float((logits - wanted).abs().max() / wanted.abs().max()))
    return same, furthest
