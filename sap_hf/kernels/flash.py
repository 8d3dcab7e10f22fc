"""The flash-attn packages behind one kernel: one variable-length call for all segments, no loop, no host sync.

q, k, v and Segments (cu_seqlens already on the device) -> out in q's dtype, lse float32. flash-attn 2, 3 and 4 differ
in how they are called and in what they lack; `find` takes the fastest that this GPU and the heads allow. Each may be an
installed package, or a hub kernel that the script has loaded (kernels.get_kernel); nothing is downloaded here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch

from sap_hf.kernels.interface import NOWHERE, Places, Scoring, Segments, cut, fitting, space
from sap_hf.kernels.varlen import capability, fit, max_q, nothing, window_of, zeros

__all__ = ["Flash", "find"]

# No limit on that side of a window.
NO_LIMIT = -1


class Call(NamedTuple):
    """What a library is told beside the tensors."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    left: int
    """Keys before a query's own, NO_LIMIT for all; bottom-right aligned in every library."""
    right: int
    softcap: float
    """0 is off."""


class Saved(NamedTuple):
    """What a backward reads, in the order of flash-attn 2 and 3."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse_Hn: torch.Tensor


# Of q, k and v, and of their gradients.
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Library:
    """One generation of flash-attn: how it is found, what it lacks and how it is called.

    Out and lse come as (n, H, D) and (H, n), gradients go into the tensors given. Raises ImportError when it is absent.
    """

    generation: ClassVar[int]
    source: str
    """Where it comes from: a package or a hub kernel."""

    @staticmethod
    def lacks(major: int, head_dim: int, deterministic: bool) -> str | None:
        """What it cannot do for heads of this width on GPUs of this compute capability."""
        return None

    def forward(
        self, qkv: Triple, place: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def backward(self, saved: Saved, gradients: Triple, call: Call, deterministic: bool) -> None:
        raise NotImplementedError


class Flash2(Library):
    """flash-attn 2.7 and newer: flash_attn/flash_attn_interface.py, or the hub's flash-attn2.

    The operators of one generation: (left, right) as two arguments, softcap 0.0 for none. The hub kernel has the same
    functions without torch.ops' aliases (huggingface/kernels-community, flash-attn2/torch-ext). The forward has no
    place for out: varlen_fwd below it has, but under names and with arguments that change between releases.
    """

    generation = 2

    def __init__(self) -> None:
        hub = _loaded_from_hub("flash_attn2")
        if hub is not None:
            self.source = "hub kernel flash-attn2"
            self._forward: Any = hub.flash_attn_interface._flash_attn_varlen_forward
            self._backward: Any = hub.flash_attn_interface._flash_attn_varlen_backward
            return
        self.source = "package flash-attn"
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        if not hasattr(interface, "_wrapped_flash_attn_varlen_forward"):
            raise ImportError("the package flash-attn is older than 2.7")
        self._forward = interface._wrapped_flash_attn_varlen_forward
        self._backward = interface._wrapped_flash_attn_varlen_backward

    def forward(
        self, qkv: Triple, place: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Library.forward`."""
        out, lse_Hn, _, _ = self._forward(
            *(*qkv, call.cu_q, call.cu_k, call.max_q, call.max_k),
            0.0,
            call.scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=call.softcap,
        )
        return out, lse_Hn

    def backward(self, saved: Saved, gradients: Triple, call: Call, deterministic: bool) -> None:
        """`Library.backward`."""
        self._backward(
            *(*saved, *gradients, call.cu_q, call.cu_k, call.max_q, call.max_k),
            0.0,
            call.scale,
            call.causal,
            call.left,
            call.right,
            call.softcap,
            None,
            deterministic,
        )


class Flash3(Library):
    """flash-attn 3, for Hopper: hopper/flash_attn_interface.py, or the hub's flash-attn3.

    Its Python functions changed their arguments after 2.8.3 (window_size -> window_size_left and _right); the operators
    fwd and bwd below them (hopper/flash_api.cpp, TORCH_LIBRARY) did not, but for what bwd returns, which is not read.
    num_splits=1 as its Python functions say; the operators' own default of 0 may split keys, and round differently.
    """

    generation = 3

    def __init__(self) -> None:
        hub = _loaded_from_hub("flash_attn3")
        if hub is not None:
            self.source, self._ops = "hub kernel flash-attn3", hub._ops.ops
            return
        # Registers the operators.
        importlib.import_module("flash_attn_interface")
        self.source, self._ops = "package flash-attn-3", torch.ops.flash_attn_3

    @staticmethod
    def lacks(major: int, head_dim: int, deterministic: bool) -> str | None:
        """`Library.lacks`."""
        if deterministic and head_dim > 192:
            return f"its reproducible backward ends at head_dim 192, here it is {head_dim}"
        return None

    def forward(
        self, qkv: Triple, place: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Library.forward`."""
        out, lse_Hn, *_ = self._ops.fwd(*qkv, out=place, num_splits=1, **_by_name(call))
        return out if place is None else place, lse_Hn

    def backward(self, saved: Saved, gradients: Triple, call: Call, deterministic: bool) -> None:
        """`Library.backward`."""
        self._ops.bwd(*saved, *gradients, deterministic=deterministic, **_by_name(call))


class Flash4(Library):
    """flash-attn 4, for Hopper and Blackwell: flash_attn/cute/interface.py of the package flash-attn-4.

    No limit is None there; a window (-1, 0) with causal means different things in different releases. softcap is None
    in the forward and 0.0 in the backward for none. Before 4.0.0b24 its varlen backward has no softcap, and before that
    none on Hopper; learnable_sink came with 4.0.0b26, and is what tells.
    """

    generation = 4

    def __init__(self) -> None:
        self.source = "package flash-attn-4"
        interface = importlib.import_module("flash_attn.cute.interface")
        if "learnable_sink" not in inspect.signature(interface._flash_attn_bwd).parameters:
            raise ImportError("the package flash-attn-4 is older than 4.0.0b26")
        self._forward, self._backward = interface._flash_attn_fwd, interface._flash_attn_bwd

    @staticmethod
    def lacks(major: int, head_dim: int, deterministic: bool) -> str | None:
        """`Library.lacks`."""
        if major > 9 and head_dim > 128:
            return f"on Blackwell it ends at head_dim 128, here it is {head_dim}"
        return None

    def forward(
        self, qkv: Triple, place: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Library.forward`."""
        # Two results in older releases, four in newer ones.
        out, lse_Hn, *_ = self._forward(
            *qkv, softcap=call.softcap or None, return_lse=True, out=place, **self._common(call)
        )
        return out if place is None else place, lse_Hn

    def backward(self, saved: Saved, gradients: Triple, call: Call, deterministic: bool) -> None:
        """`Library.backward`."""
        dq, dk, dv = gradients
        self._backward(
            *(saved.q, saved.k, saved.v, saved.out, saved.dout, saved.lse_Hn),
            softcap=call.softcap,
            deterministic=deterministic,
            dq=dq,
            dk=dk,
            dv=dv,
            **self._common(call),
        )

    @staticmethod
    def _common(call: Call) -> dict[str, Any]:
        named = _by_name(call)
        del named["softcap"]
        named["causal"] = named.pop("is_causal")
        for side in ("window_size_left", "window_size_right"):
            named[side] = None if named[side] == NO_LIMIT else named[side]
        return named


# By the major compute capability, the fastest first. Later GPUs are tried like the last.
LIBRARIES: dict[int, tuple[type[Library], ...]] = {
    8: (Flash2,),
    9: (Flash3, Flash4, Flash2),
    10: (Flash4, Flash2),
    11: (Flash4, Flash2),
    12: (Flash2,),
}


class Flash:
    """flash-attn: GQA, window and softcap inside.

    library: which generation computes.
    deterministic: use the backward's reproducible, slower variant; None follows
    torch.use_deterministic_algorithms.
    """

    name = "flash"

    def __init__(self, library: Library, deterministic: bool | None = None) -> None:
        self.library = library
        self.deterministic = deterministic

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`; float16 or bfloat16 in, out in the same dtype."""
        if segments.max_q == 0:
            return nothing(q, v)
        value_dim = v.shape[2]
        q, k, v = fit(q, k, v)
        out, lse_Hn = self.library.forward((q, k, v), fitting(place, q), _call(segments, scoring))
        return cut(out, value_dim), lse_Hn.transpose(0, 1)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        places: Places = NOWHERE,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`; the gradients are in q's dtype."""
        if segments.max_q == 0:
            return zeros(q, k, v)
        head_dim, value_dim = q.shape[2], v.shape[2]
        dout, q, k, v, out = fit(dout.to(q.dtype), q, k, v, out.to(q.dtype))
        dq, dk, dv = map(space, places, (q, k, v))
        deterministic = self.deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        saved = Saved(dout, q, k, v, out, lse.transpose(0, 1).contiguous())
        self.library.backward(saved, (dq, dk, dv), _call(segments, scoring), deterministic)
        return cut(dq, head_dim), cut(dk, head_dim), cut(dv, value_dim)


def find(head_dim: int) -> tuple[Flash | None, str]:
    """The fastest generation for heads of this width on the current GPU; else None.

    Returns:
        The kernel, and which generation it is and why no faster one; or None, and why none can.
    """
    major, minor = capability()
    deterministic = torch.are_deterministic_algorithms_enabled()
    passed_over = []
    for library in LIBRARIES.get(major, LIBRARIES[max(LIBRARIES)]):
        name = f"flash-attn {library.generation}"
        why_not = library.lacks(major, head_dim, deterministic)
        if why_not is None:
            try:
                found = library()
            except ModuleNotFoundError as error:
                why_not = f"not installed ({error})"
            except ImportError as error:
                why_not = f"installed, but does not load: {error}"
            else:
                chosen = f"{name} ({found.source}) on compute capability {major}.{minor}"
                return Flash(found), "; ".join([chosen, *passed_over])
        passed_over.append(f"{name} {why_not}")
    return None, "; ".join(passed_over)


def _call(segments: Segments, scoring: Scoring) -> Call:
    left, right = window_of(segments, scoring.window)
    return Call(
        cu_q=segments.cu_q_device,
        cu_k=segments.cu_k_device,
        max_q=max_q(segments),
        max_k=segments.max_k,
        scale=scoring.scale,
        causal=segments.causal,
        left=left,
        right=right,
        softcap=scoring.softcap or 0.0,
    )


def _by_name(call: Call) -> dict[str, Any]:
    """In the words that flash-attn 3's operators use."""
    return {
        "cu_seqlens_q": call.cu_q,
        "cu_seqlens_k": call.cu_k,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "softmax_scale": call.scale,
        "is_causal": call.causal,
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": call.softcap,
    }


def _loaded_from_hub(name: str) -> ModuleType | None:
    """The hub kernel of this Python name that this process has loaded (kernels >= 0.14); None if there is none."""
    kernels = sys.modules.get("kernels")
    if kernels is None or not hasattr(kernels, "get_loaded_kernels"):
        return None
    for loaded in kernels.get_loaded_kernels():
        if loaded.metadata.name.python_name == name:
            module: ModuleType = loaded.module
            return module
    return None
