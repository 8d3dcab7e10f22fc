"""Verify: is a model exact when several ranks share a pack of documents?

The model's config -> a tiny random clone of it, or its real weights, on gloo processes of this machine. On every rank
transformers' own eager attention runs each document alone; then the patched model runs the pack by several plans, and
its logits, loss and gradients are compared with that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils.logging import disable_progress_bar

from sap_hf.errors import ConfigError, LayoutError, SapError
from sap_hf.hf.clone import UNBUILT, affordable, build, clone, describe, find_config, outline
from sap_hf.kernels import pick
from sap_hf.models import Patch, interface, patch_model, unpatch_model
from sap_hf.models.families import attention_layers, mixer_layers
from sap_hf.planning.render import method

# Longer than a clone's window, and one of a single token; the second lies on two ranks whatever their number.
LENGTHS = (13, 22, 1, 9)
IGNORED = -100
# Of the largest value: some thousand roundings of the dtype. A leak or a lost row is at 1e-3 and above.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}
# What a plan of each kind could do wrong: cut documents, permuted rows, exchanged heads, and what training would take.
TRIALS: tuple[dict[str, Any], ...] = (
    {"strategy": "sap", "layout": "contiguous", "ulysses_size": 1},
    {"strategy": "sap", "layout": "zigzag", "ulysses_size": 1},
    {"strategy": "ulysses"},
    {},
)
RANK_LIMIT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to share the pack, and its errors as parts of the largest value of their kind; the worst rank's."""

    plan: str
    rows_moved: int
    """Of K and V, in one layer's forward."""
    logits: float
    loss: float
    gradients: float
    """The worst of all parameters, as part of the largest gradient of the model."""
    second_document: float
    """Logits of the second document, alone and in the pack."""
    leak: float
    """How much the logits of the other documents change with the tokens of the first."""
    response: float
    """How much its own do: 0 would mean that nothing was tested."""
    worst: str
    """The tensor with the largest error."""

    @property
    def error(self) -> float:
        """The largest of all errors."""
        return max(self.logits, self.loss, self.gradients, self.second_document, self.leak)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was run, and what came out."""

    model: str
    patched: str
    kernels: list[str]
    """For each kind of layer: how many layers, what they compute, which kernel and why."""
    dtype: str
    tolerance: float
    notes: list[str]
    trials: list[Trial]

    @property
    def exact(self) -> bool:
        """No error above the tolerance, and something was moved and tested."""
        moved = any(trial.rows_moved for trial in self.trials)
        return moved and all(trial.error <= self.tolerance < trial.response for trial in self.trials)


def verify(name: str, ranks: int, weights: bool = False) -> Verdict:
    """Compare a model on `ranks` processes with each document run alone.

    Args:
        name: a folder with config.json, a model type, or the id of a model on a hub.
        weights: load the weights that belong to it; else a tiny random clone of its config is made.

    Raises:
        UnsupportedAttention: a model that is refused when it is patched.
        ConfigError: nothing of that name, or nothing that can be run.
        LayoutError: fewer than two ranks.
    """
    if ranks < 2:
        raise LayoutError(f"--ranks {ranks}: at least 2 must share the pack.")
    config = find_config(name, weights)
    whole = outline(config)
    layers = len(attention_layers(whole))
    dtype, notes = torch.float64, list[str]()
    if weights:
        small, description = config, f"its weights, all {layers} layers"
        dtype, notes = affordable(sum(parameter.numel() for parameter in whole.parameters()), ranks)
    else:
        small = clone(config)
        description = describe(small, layers)
    with tempfile.TemporaryDirectory(prefix="sap-hf-verify-") as folder:
        _start(ranks, small, name if weights else None, dtype, Path(folder))
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]
    for result in results:
        if isinstance(result, SapError):
            raise result
    found = worst_of(results)
    return dataclasses.replace(
        found, model=f"{config.model_type}: {found.model}, {description}", notes=[*notes, *found.notes]
    )


class WholeFloat64(TorchFunctionMode):
    """transformers without float32: where its code takes a float64 tensor down to float32, the tensor stays float64.

    Its norms, softmax and losses do that, and hide errors under 1e-7. What sap_hf itself takes down stays down.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = func is Tensor.float or torch.float32 in args[1:] or torch.float32 in kwargs.values()
        if (
            asked
            and isinstance(args[0], Tensor)
            and args[0].dtype == torch.float64
            and _called_by_transformers()
        ):
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {
                name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()
            }
        return func(*args, **kwargs)


def _called_by_transformers() -> bool:
    frame = sys._getframe(2)
    # Functions of torch that are written in Python stand between.
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("torch."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith("transformers.")


@dataclasses.dataclass
class Answer:
    """logits (T, V), the mean loss over all targets, and the gradient of every parameter."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def documents_alone(model: nn.Module, pack: dict[str, Tensor], lengths: Sequence[int]) -> Answer:
    """Run every document of the pack by itself, through the model as it is."""
    ids, labels = (pack[name][0].split(list(lengths)) for name in ("input_ids", "labels"))
    targets = sum(int((label[1:] != IGNORED).sum()) for label in labels)
    logits, losses = [], []
    for document, label in zip(ids, labels, strict=True):
        out = model(input_ids=document[None], use_cache=False).logits[0]
        part = F.cross_entropy(out[:-1], label[1:], ignore_index=IGNORED, reduction="sum") / targets
        part.backward()
        logits.append(out.detach())
        losses.append(part.detach())
    return Answer(torch.cat(logits), torch.stack(losses).sum(), _take_gradients(model))


def make_pack(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """A packed row (1, T) of random tokens with unshifted labels, some of them ignored."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, vocabulary, (1, sum(lengths)), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, IGNORED)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[position_ids == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids}


def check(config: Any, weights: str | None = None, dtype: torch.dtype = torch.float64) -> Verdict:
    """Run all trials on the ranks of the default process group; every rank calls it and gets its own verdict.

    Args:
        config: of the model to build.
        weights: the folder or hub id to load it from; None is random weights, the same on every rank.

    Raises:
        SapError: a model that is refused, or weights that do not load; on every rank.
    """
    pack = make_pack(config.vocab_size)
    notes, trials = list[str](), list[Trial]()
    patched, kernels = "", list[str]()
    with WholeFloat64():
        model = build(config, weights, dtype)
        try:
            truth = documents_alone(model, pack, LENGTHS)
        except (RuntimeError, *UNBUILT) as error:
            # On every rank alike: they run the same code on the same values.
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            why = f"transformers' own forward fails in {_name(dtype)}: {why}"
            if dtype == torch.float32:
                raise ConfigError(f"{config.model_type}: {why}") from error
            verdict = check(config, weights, torch.float32)
            return dataclasses.replace(verdict, notes=[why, *verdict.notes])
        for options in TRIALS:
            if options.get("layout") == "zigzag" and mixer_layers(model):
                continue
            heads = config.num_attention_heads if attention_layers(model) else 0
            if options.get("strategy") == "ulysses" and dist.get_world_size() > heads:
                notes.append(f"ulysses left out: {heads} heads for {dist.get_world_size()} ranks")
                continue
            patch = patch_model(model, **options)
            try:
                with _watched() as calls:
                    trial = _try(model, patch, pack, truth, config.vocab_size)
                trials.append(trial if options else dataclasses.replace(trial, plan=f"auto: {trial.plan}"))
            finally:
                unpatch_model(model)
            patched, kernels = str(patch), kernels or _kernels(calls)
    return Verdict(
        model=type(model).__name__,
        patched=patched,
        kernels=kernels,
        dtype=_name(dtype),
        tolerance=TOLERANCES[dtype],
        notes=notes,
        trials=trials,
    )


def _try(model: nn.Module, patch: Patch, pack: dict[str, Tensor], truth: Answer, vocabulary: int) -> Trial:
    """One sharded forward and backward, and a forward with another first document."""
    out = model(**pack)
    out.loss.backward()
    logits = out.logits.detach()[0]
    gradients = _take_gradients(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    ids = pack["input_ids"].clone()
    first, second = LENGTHS[0], slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    ids[0, :first] = vocabulary - ids[0, :first] + 2
    with torch.no_grad():
        changed = model(input_ids=ids, position_ids=pack["position_ids"]).logits[0] - logits
    # 1 where all of them are 0: errors are absolute then.
    scale = _largest(truth.logits) or 1.0
    largest = max(_largest(one) for one in truth.gradients.values()) or 1.0
    errors = {
        f"the gradient of {name}": _largest(gradients[name] - gradient) / largest
        for name, gradient in truth.gradients.items()
    }
    where = max(errors, key=errors.__getitem__)
    off = logits - truth.logits
    worst = {
        "logits": _largest(off) / scale,
        "loss": _largest(out.loss.detach() - truth.loss) / (_largest(truth.loss) or 1.0),
    }
    worst[where] = errors[where]
    plan = patch.sharding.last_plan
    assert plan is not None
    return Trial(
        plan=f"{method(plan)} {plan.layout}",
        rows_moved=int(plan.rows_moved.sum()),
        logits=worst["logits"],
        loss=worst["loss"],
        gradients=errors[where],
        second_document=_largest(off[second]) / scale,
        leak=_largest(changed[first:]) / scale,
        response=_largest(changed[:first]) / scale,
        worst=max(worst, key=worst.__getitem__),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(values: Tensor) -> float:
    """The largest absolute value; infinite where one is not a number, which every comparison would pass over."""
    return float(values.abs().nan_to_num(nan=torch.inf).max())


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, 0 where there is none; the model has none afterwards."""
    taken = {}
    for name, parameter in model.named_parameters():
        taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return taken


@contextlib.contextmanager
def _watched() -> Iterator[Counter[tuple[Any, ...]]]:
    """What layers ask of attention inside the block: (dtype, head width, value width, window, softcap)."""
    calls: Counter[tuple[Any, ...]] = Counter()
    original = interface.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            calls[q.dtype, q.shape[-1], v.shape[-1], options["window"], options["softcap"]] += 1
        return original(q, k, v, *args, **options)

    interface.attention = attention
    try:
        yield calls
    finally:
        interface.attention = original


def _kernels(calls: Counter[tuple[Any, ...]]) -> list[str]:
    """A sentence for each kind of layer, and why it has its kernel."""
    lines = []
    for (dtype, head_dim, value_dim, window, softcap), count in calls.items():
        _, why = pick(
            "auto",
            device_type="cpu",
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            softcap=softcap,
            window=window,
        )
        what = "full attention" if window is None else f"window {window}"
        if window is not None and window >= max(LENGTHS):
            what += " (longer than every document here: tested as full attention)"
        what += "" if softcap is None else f", softcap {softcap}"
        lines.append(f"{count} x {what}: {why}")
    return lines


def _start(ranks: int, config: Any, weights: str | None, dtype: torch.dtype, folder: Path) -> None:
    """Run `check` on gloo processes; each leaves what it found in a file of the folder, named by its rank."""
    # The fork server loads transformers once for all ranks.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _rank, (ranks, config, weights, dtype, folder), nprocs=ranks, start_method="forkserver"
    )


def _rank(rank: int, ranks: int, config: Any, weights: str | None, dtype: torch.dtype, folder: Path) -> None:
    if sys.platform == "linux":
        # gloo looks the host name up otherwise, and in a container that may resolve to nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    # A bar for each rank would hide the verdict.
    disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=ranks, timeout=RANK_LIMIT)
    try:
        found: Verdict | SapError = check(config, weights, dtype)
    except SapError as error:
        found = error
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst rank's errors of each trial; the rest is the same on all ranks."""
    trials = [
        max(same, key=lambda trial: trial.error) for same in zip(*(verdict.trials for verdict in verdicts))
    ]
    return dataclasses.replace(verdicts[0], trials=trials)
