"""Who computes an encoder in inference: kernels of this package, oneDNN with weights laid out once, or PyTorch.

Everything that decides it is here. ``capabilities`` says what this machine multiplies fast, by asking the kernels,
torch and oneDNN; ``choose`` makes of that and of what the encoder is a ``Backend``, and depends on nothing else, so it
is tested for machines that are not there. ``obstacle`` says when PyTorch has to call the modules themselves: where
somebody differentiates, traces or watches what they do.

Half precision is a way to store matrices. Kernels read it as it is, whatever the processor, and multiply it in
float32, but for bfloat16 where it is faster (AMX, AVX512_BF16). Where there are no kernels, matrices are multiplied in
half precision if that is faster than float32 (bfloat16: AVX512_BF16, Arm's BF16), and otherwise in float32, by copies
that are made once: as fast as float32, exact to the rounding of the weights, and with the memory of both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from m2d_embed.backends import native
from m2d_embed.backends.native import Arithmetic, NativeLogMel, Shape, Unit

#: What the matrices of the blocks are stored in.
Stored = Literal["fp32", "bf16", "fp16"]
#: Who computes the blocks. "native": the kernels. "onednn": oneDNN with copies of the weights that are laid out for it.
#: "widened": PyTorch with float32 copies. "modules": the blocks themselves are called.
Engine = Literal["native", "onednn", "widened", "modules"]

STORED: Mapping[torch.dtype, Stored] = MappingProxyType(
    {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
)
#: Instruction sets that ONEDNN_MAX_CPU_ISA names, without products of int8 on AVX-512, and without those of bf16.
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE"})
_WITHOUT_BF16 = _WITHOUT_VNNI | {"AVX512_CORE_VNNI"}
_NO_UNIT = "they need AVX2, AVX-512 or NEON, and none of these is there and to be used"
_NO_INT8 = "not possible: no int8 kernel runs here, nor has oneDNN AVX-512 VNNI to use"


# --- what a machine can do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capabilities:
    """What a machine multiplies matrices in, no slower than in float32.

    Attributes:
        kernels: kinds of products that this package has kernels for, and what of the processor computes them.
        onednn: kinds that oneDNN computes with weights laid out for it.
        modules: kinds that PyTorch's modules compute; float32 is always one.
    """

    kernels: Mapping[Arithmetic, Unit]
    onednn: frozenset[Arithmetic] = frozenset()
    modules: frozenset[Arithmetic] = frozenset({"fp32"})

    def multiplies(self, kind: Arithmetic) -> bool:
        """Whether products of a kind are fast here."""
        return kind in self.kernels or kind in self.onednn or kind in self.modules


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of the processor.

    Attributes:
        packs: oneDNN lays float32 matrices out and multiplies with them, on x86.
        vectors: what torch's own loops are compiled for, as ``torch.backends.cpu.get_cpu_capability`` names it.
        avx512_bf16, vnni: x86 has these instructions.
        other_bf16: it is another processor, on which oneDNN multiplies bfloat16.
        onednn_limit: ``ONEDNN_MAX_CPU_ISA``.
    """

    packs: bool = False
    vectors: str = "DEFAULT"
    avx512_bf16: bool = False
    vnni: bool = False
    other_bf16: bool = False
    onednn_limit: str = ""


@cache
def capabilities() -> Capabilities:
    """Those of this machine, as far as ``M2D_EMBED_ISA`` and the variables of oneDNN and torch leave them.

    Raises:
        ConfigError: on an impossible value of ``M2D_EMBED_ISA``.
    """
    return capabilities_of(native.available(), torch_facts())


def capabilities_of(kernels: Mapping[Arithmetic, Unit], facts: TorchFacts) -> Capabilities:
    """What kernels and torch offer together."""
    onednn: set[Arithmetic] = set()
    if facts.packs:
        onednn.add("fp32")
        is_held = facts.vectors in ("DEFAULT", "NO AVX", "AVX2")  # torch's own loops, for what is between products
        if facts.avx512_bf16 and not is_held and facts.onednn_limit.upper() not in _WITHOUT_BF16:
            onednn.add("bf16")
        if facts.vnni and not is_held and facts.onednn_limit.upper() not in _WITHOUT_VNNI:
            onednn.add("int8")
    modules: set[Arithmetic] = {"fp32", "bf16"} if facts.other_bf16 else {"fp32"}
    return Capabilities(kernels, frozenset(onednn), frozenset(modules))


def torch_facts() -> TorchFacts:
    """Those of this process."""
    is_x86 = _says("_is_avx2_supported")
    has_onednn = torch.backends.mkldnn.is_available()
    return TorchFacts(
        packs=is_x86 and has_onednn and _packs(),  # elsewhere nobody has measured whether it helps
        vectors=torch.backends.cpu.get_cpu_capability(),
        avx512_bf16=_says("_is_avx512_bf16_supported"),
        vnni=_says("_is_vnni_supported"),
        other_bf16=not is_x86 and has_onednn and _tried(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
        onednn_limit=os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", ""),
    )


def _says(question: str) -> bool:
    return _tried(torch.cpu, question)


def _tried(where: object, question: str) -> bool:
    """What one of torch's private functions answers; False where this torch has no such function."""
    try:
        answer: bool = getattr(where, question)()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return answer


def _packs() -> bool:
    """Whether this torch has the operators, and they give the right numbers."""
    weight, x = torch.linspace(-1, 1, 64 * 32, device="cpu").view(32, 64), torch.linspace(0, 1, 5 * 64, device="cpu")
    x = x.view(5, 64)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "none")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(found, F.linear(x, weight), atol=1e-4)


# --- what an encoder is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traits:
    """What of an encoder decides who computes its blocks.

    Attributes:
        stored: the dtype of all matrices; None if they differ or are of another, or a norm is not float32.
        quantize: they are to be multiplied in int8.
        shape: of all blocks; None if they differ.
        changed: why the blocks have to be called themselves, or "": a layer was replaced, or something hooks into one.
    """

    stored: Stored | None
    quantize: bool = False
    shape: Shape | None = None
    changed: str = ""


class HasTraits(Protocol):
    """An encoder, as far as the choice is concerned."""

    def traits(self) -> Traits:
        """What of it decides."""


# --- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """Who computes the blocks of an encoder.

    Attributes:
        engine: who.
        kind: what products are computed in; None if the modules decide.
        reason: why, in words.
    """

    engine: Engine
    kind: Arithmetic | None
    reason: str

    def __str__(self) -> str:
        names = {
            "native": "kernels of this package",
            "onednn": "oneDNN, weights laid out once",
            "widened": "PyTorch, float32 copies of the weights",
            "modules": "PyTorch",
        }
        return f"{names[self.engine]}{f', in {self.kind}' if self.kind else ''}: {self.reason}"


def choose_backend(encoder: HasTraits, x: Tensor) -> Backend:
    """Who computes an encoder's blocks for tokens or a log-mel ``x``, here and now.

    Raises:
        ConfigError: on an impossible value of ``M2D_EMBED_ISA``.
    """
    reason = obstacle(x)
    if reason is None and x.dtype != torch.float32:
        reason = f"the input is {x.dtype}"
    return choose(capabilities(), encoder.traits()) if reason is None else Backend("modules", None, reason)


def choose(here: Capabilities, encoder: Traits) -> Backend:
    """Who computes an encoder's blocks on a machine, if nobody watches."""
    if encoder.changed:
        return Backend("modules", None, encoder.changed)
    if encoder.stored is None:
        return Backend("modules", None, "the matrices are not all float32, bfloat16 or float16, or a norm not float32")
    for kind in _kinds(encoder):
        if kind in here.kernels and encoder.shape is not None and native.fits(encoder.shape, kind):
            return Backend("native", kind, f"{_kernels(here, kind)} run on this processor")
        why = "no kernel fits the blocks" if kind in here.kernels else f"no {kind} kernel runs on this processor"
        if encoder.stored != kind and kind == "fp32":
            why = f"this processor multiplies {encoder.stored} no faster than float32"
        if kind in here.onednn:
            return Backend("onednn", kind, why)
        if kind in here.modules and kind == encoder.stored:
            return Backend("modules", kind, why)
    return Backend("widened", "fp32", why)


def _kernels(here: Capabilities, kind: Arithmetic) -> str:
    """The kernels of a kind, in words."""
    unit = here.kernels[kind]
    widened = ", weights of 16 bits, products in float32" if kind == "bf16" and unit not in native.TILED else ""
    return f"{kind} kernels ({unit}{widened})"


def _kinds(encoder: Traits) -> tuple[Arithmetic, ...]:
    """What the products may be computed in, the best first."""
    if encoder.quantize:
        return ("int8", "bf16", "fp32")
    return ("bf16", "fp32") if encoder.stored == "bf16" else ("fp32",)


def chooses_native_tokens(log_mel: Tensor, projection: nn.Conv2d) -> bool:
    """Whether a kernel cuts and embeds the patches of a log-mel."""
    return (
        obstacle(log_mel) is None
        and log_mel.dtype == torch.float32
        and "fp32" in capabilities().kernels
        and native.fits_tokens(projection)
    )


def chooses_native_log_mel(frames: Tensor, n_fft: int) -> bool:
    """Whether a kernel transforms frames of samples, (B, n, n_fft)."""
    return (
        watcher(frames) is None
        and frames.numel() > 0
        and not (frames.requires_grad and torch.is_grad_enabled())
        and "fp32" in capabilities().kernels
        and NativeLogMel.fits(n_fft)
    )


def describe(encoder: HasTraits) -> dict[str, str]:
    """What computes an encoder on this machine's CPU, and why, in words: its kernels, and who multiplies each dtype.

    Raises:
        ConfigError: on an impossible value of ``M2D_EMBED_ISA``.
    """
    here, traits, limit = capabilities(), encoder.traits(), native.isa_limit()
    kernels = ", ".join(f"{kind} ({unit})" for kind, unit in here.kernels.items())
    if not kernels:
        kernels = f"none: {native.why_no_kernels() or _NO_UNIT}"
    facts = {"CPU kernels": kernels, native.ISA_VARIABLE: limit or "not set"}
    for stored in STORED.values():
        facts[f"{stored} on this CPU"] = str(choose(here, replace(traits, stored=stored, quantize=False)))
    quantized = str(choose(here, replace(traits, stored="bf16", quantize=True)))
    facts["int8 on this CPU"] = quantized if here.multiplies("int8") else _NO_INT8
    return facts


def supports_int8() -> bool:
    """Whether this machine multiplies int8 matrices without overflow: by kernels, or oneDNN with VNNI."""
    return capabilities().multiplies("int8")


def fastest_float() -> Literal["bf16", "fp32"]:
    """The dtype to advise: bfloat16 where it takes half the memory and no more time."""
    return "bf16" if capabilities().multiplies("bf16") else "fp32"


# --- when the modules themselves have to be called --------------------------------------------------------------------


def obstacle(x: Tensor) -> str | None:
    """Why modules have to be called as they are, in words, or None: ``watcher``, gradients, autocast."""
    watched = watcher(x)
    if watched is not None:
        return watched
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is off"
    return None


def watcher(x: Tensor) -> str | None:
    """Why PyTorch has to see every operation on ``x``, in words, or None if it is plain memory that nobody watches."""
    if torch.compiler.is_compiling():
        return "it is compiled or exported"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if x.device.type != "cpu":
        return f"it runs on {x.device.type}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch.jit does not list it
        return "it is traced"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "hooks of all modules are to be called"
    return _mode()


def _mode() -> str | None:
    """A mode that sees PyTorch's operations: FLOP counters, fake tensors, transforms such as vmap."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is transformed by torch.func"
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    # A default device is a mode, too.
    return None if all(isinstance(mode, DeviceContext) for mode in modes) else "a function mode is active"
