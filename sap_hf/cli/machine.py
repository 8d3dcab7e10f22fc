"""What sap-hf doctor sees from one process: devices, kernels, and the variables that a launcher has set."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from sap_hf.cli.doctor import OK, PROBLEM, START, WARNING, Finding
from sap_hf.config import KERNELS
from sap_hf.errors import UnsupportedAttention
from sap_hf.kernels import Kernel, Scoring, Segments, pick

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Some roundings, as part of the largest value.
KERNEL_ERROR = {torch.bfloat16: 0.03, torch.float32: 1e-4}
HEAD_DIM = 64


def devices() -> list[Finding]:
    """GPUs or none, their free memory, and what carries messages."""
    if not dist.is_available() or not dist.is_gloo_available():
        return [
            Finding(
                PROBLEM,
                "gloo",
                f"torch {torch.__version__} is built without it",
                "install another build of torch",
            )
        ]
    findings = []
    if torch.cuda.is_available():
        device = compute_device()
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        findings.append(Finding(OK, "GPU", f"{name}, {torch.cuda.device_count()} in this process's view"))
        if dist.is_nccl_available():
            findings.append(Finding(OK, "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
        else:
            findings.append(
                Finding(
                    PROBLEM,
                    "NCCL",
                    f"torch {torch.__version__} is built without it",
                    "install a CUDA build of torch",
                )
            )
        memory = f"{free:.0f} of {total:.0f} GiB free"
        if free > 0.9 * total:
            findings.append(Finding(OK, "GPU memory", memory))
        else:
            findings.append(
                Finding(WARNING, "GPU memory", memory, "end what holds the rest: nvidia-smi lists it")
            )
    elif Path("/dev/nvidiactl").exists():
        change = (
            "install a CUDA build of torch"
            if torch.version.cuda is None
            else f"update the driver to one for CUDA {torch.version.cuda}, and look at CUDA_VISIBLE_DEVICES"
        )
        findings.append(
            Finding(PROBLEM, "GPU", f"there is one, but torch {torch.__version__} cannot use it", change)
        )
    else:
        findings.append(Finding(OK, "GPU", f"none: {os.cpu_count()} CPU cores, gloo"))
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError as error:
            findings.append(
                Finding(
                    WARNING,
                    "host name",
                    f"{socket.gethostname()} has no address ({error}), which gloo asks for",
                    "export GLOO_SOCKET_IFNAME=lo on one machine, else the name of the network card",
                )
            )
    return findings


def kernels() -> list[Finding]:
    """The kernel that `auto` takes for each dtype, with and without softcap and window, and why not another."""
    device = compute_device()
    chosen: dict[str, list[str]] = {}
    findings = []
    for dtype, softcap, window in itertools.product(KERNEL_ERROR, (None, 50.0), (None, 32)):
        kernel, why = _pick("auto", device, dtype, softcap, window)
        layer = (
            f"{str(dtype).removeprefix('torch.')}{' softcap' if softcap else ''}{' window' if window else ''}"
        )
        chosen.setdefault(why, []).append(layer)
        wrong = try_kernel(kernel, device, dtype, softcap, window)
        if wrong:
            change = f"take another one: kernel={'varlen' if kernel.name == 'flash' else 'reference'}"
            findings.append(Finding(PROBLEM, "kernel", f"{layer}: {kernel.name} {wrong}", change))
        elif kernel.name == "reference" and device.type == "cuda":
            # On a CPU there is nothing faster to be had.
            change = "train in bf16 (bf16=True)" if dtype == torch.float32 else "pip install flash-attn"
            findings.append(Finding(WARNING, "kernel", f"{layer}: only the slow reference", change))
    findings += [Finding(OK, "kernel", f"{', '.join(layers)}: {why}") for why, layers in chosen.items()]
    refused: dict[str, list[str]] = {}
    for name in KERNELS[1:]:
        why = _why_not(name, device)
        if why:
            refused.setdefault(why, []).append(name)
    return findings + [
        Finding(OK, "kernel", f"not here: {', '.join(names)}: {why}") for why, names in refused.items()
    ]


def _why_not(name: str, device: torch.device) -> str | None:
    """Why this kernel cannot compute a plain bf16 layer, or None."""
    try:
        _pick(name, device, torch.bfloat16, None, None)
    except UnsupportedAttention as error:
        return str(error).splitlines()[0].removeprefix(f"kernel={name!r}: ")
    return None


def _pick(
    name: str, device: torch.device, dtype: torch.dtype, softcap: float | None, window: int | None
) -> tuple[Kernel, str]:
    return pick(
        name,
        device_type=device.type,
        dtype=dtype,
        head_dim=HEAD_DIM,
        value_dim=HEAD_DIM,
        softcap=softcap,
        window=window,
    )


def try_kernel(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, softcap: float | None, window: int | None
) -> str | None:
    """What is wrong with one small call, forward and backward, beside the float64 reference; None when nothing is."""
    generator = torch.Generator().manual_seed(0)
    scoring = Scoring(HEAD_DIM**-0.5, window, softcap)
    given = [torch.randn(100, heads, HEAD_DIM, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]

    def run(which: Kernel, on: torch.device, in_dtype: torch.dtype) -> list[torch.Tensor]:
        segments = Segments.build((0, 60, 100), (0, 60, 100), causal=True, device=on)
        q, k, v, dout = (x.to(on, in_dtype) for x in given)
        out, lse = which.forward(q, k, v, segments, scoring)
        gradients = which.backward(dout, q, k, v, out.to(in_dtype), lse, segments, scoring)
        return [x.double().cpu() for x in (out, *gradients)]

    cpu = torch.device("cpu")
    try:
        found = run(kernel, device, dtype)
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    right = run(_pick("reference", cpu, torch.float64, softcap, window)[0], cpu, torch.float64)
    # An answer that is no number would pass every comparison.
    off = max(
        float((a - b).abs().nan_to_num(nan=torch.inf).max() / b.abs().max()) for a, b in zip(found, right)
    )
    if off <= KERNEL_ERROR[dtype]:
        return None
    return f"is off by {off:.1e} of the largest value, {KERNEL_ERROR[dtype]:.0e} is allowed"


def launcher() -> list[Finding]:
    """The variables that a launcher sets, and what they ask of this machine."""
    if "RANK" not in os.environ:
        return [Finding(OK, "launcher", f"none: ranks and links are checked under one: {START} doctor")]
    values = {name: os.environ.get(name, "") for name in LAUNCHER}
    absent = [
        name
        for name, value in values.items()
        if not value or not (name == "MASTER_ADDR" or value.isdecimal())
    ]
    if absent:
        given = ", ".join(f"{name}={values[name]!r}" for name in absent)
        return [
            Finding(
                PROBLEM,
                "launcher",
                given,
                f"start all processes with torchrun or accelerate launch: {START} doctor",
            )
        ]
    world, here = int(values["WORLD_SIZE"]), int(values["LOCAL_WORLD_SIZE"])
    findings = [Finding(OK, "launcher", f"{world} processes, {here} on this machine")]
    if world % here:
        findings[0] = Finding(
            WARNING,
            "launcher",
            f"{world} processes, {here} on this machine: nodes differ",
            "start equally many on each node",
        )
    if torch.cuda.is_available():
        if torch.cuda.device_count() < here:
            findings.append(
                Finding(
                    PROBLEM,
                    "launcher",
                    f"{here} processes for {torch.cuda.device_count()} GPUs",
                    f"--nproc-per-node {torch.cuda.device_count()}",
                )
            )
        return findings
    cores = os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if here * torch.get_num_threads() > cores:
        findings.append(
            Finding(
                WARNING,
                "OMP_NUM_THREADS",
                f"{threads or 'unset'}: {here} processes x {torch.get_num_threads()} threads on {cores} cores",
                f"export OMP_NUM_THREADS={max(cores // here, 1)}",
            )
        )
    else:
        findings.append(Finding(OK, "OMP_NUM_THREADS", threads or "unset"))
    return findings


def compute_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")
