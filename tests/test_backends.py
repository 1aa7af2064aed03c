"""Who computes what: for machines that are not here, and as this one says."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, random_model
from generic_kernels import units_here

from m2d_embed.backends import native, selection
from m2d_embed.backends.native import Shape
from m2d_embed.backends.selection import Capabilities, TorchFacts, Traits, capabilities_of, choose
from m2d_embed.config import ModelConfig

WIDE, ODD = Shape(768, 3072, 12), Shape(40, 160, 2)  # the second fits no kernel
ALL_KERNELS = {"fp32": "avx512", "bf16": "amx", "int8": "amx"}

AVX2 = TorchFacts(packs=True, vectors="AVX2")
AVX512 = TorchFacts(packs=True, vectors="AVX512")
CASCADE_LAKE = TorchFacts(packs=True, vectors="AVX512", vnni=True)
ZEN_4 = TorchFacts(packs=True, vectors="AVX512", vnni=True, avx512_bf16=True)
GRAVITON_3 = TorchFacts(vectors="SVE256", other_bf16=True)
APPLE = TorchFacts()


@pytest.mark.parametrize(
    ("facts", "onednn", "modules"),
    [
        (AVX2, {"fp32"}, {"fp32"}),
        (AVX512, {"fp32"}, {"fp32"}),
        (CASCADE_LAKE, {"fp32", "int8"}, {"fp32"}),
        (ZEN_4, {"fp32", "bf16", "int8"}, {"fp32"}),
        (GRAVITON_3, set(), {"fp32", "bf16"}),
        (APPLE, set(), {"fp32"}),
        # Held back by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, or a torch without oneDNN.
        (TorchFacts(packs=True, vectors="AVX2", vnni=True, avx512_bf16=True), {"fp32"}, {"fp32"}),
        (TorchFacts(True, "AVX512", True, True, onednn_limit="avx2"), {"fp32"}, {"fp32"}),
        (TorchFacts(True, "AVX512", True, True, onednn_limit="AVX512_CORE_VNNI"), {"fp32", "int8"}, {"fp32"}),
        (TorchFacts(True, "AVX512", True, True, onednn_limit="AVX512_CORE_AMX"), {"fp32", "bf16", "int8"}, {"fp32"}),
        (TorchFacts(True, "AVX512", True, True, onednn_limit="DEFAULT"), {"fp32", "bf16", "int8"}, {"fp32"}),
        (TorchFacts(False, "AVX512", True, True), set(), {"fp32"}),
    ],
)
def test_what_a_processor_is_good_for(facts, onednn, modules):
    found = capabilities_of({}, facts)
    assert (found.onednn, found.modules) == (onednn, modules)


@pytest.mark.parametrize(
    ("kernels", "facts", "encoder", "expected"),
    [
        # float32
        ({}, AVX2, Traits("fp32", shape=WIDE), ("onednn", "fp32")),
        (ALL_KERNELS, ZEN_4, Traits("fp32", shape=WIDE), ("native", "fp32")),
        (ALL_KERNELS, ZEN_4, Traits("fp32", shape=ODD), ("onednn", "fp32")),
        (ALL_KERNELS, ZEN_4, Traits("fp32", shape=None), ("onednn", "fp32")),
        ({}, GRAVITON_3, Traits("fp32", shape=WIDE), ("modules", "fp32")),
        ({}, APPLE, Traits("fp32", shape=WIDE), ("modules", "fp32")),
        # bfloat16
        ({}, AVX2, Traits("bf16", shape=WIDE), ("onednn", "fp32")),
        ({"fp32": "avx512"}, AVX512, Traits("bf16", shape=WIDE), ("native", "fp32")),
        ({"fp32": "avx512"}, ZEN_4, Traits("bf16", shape=WIDE), ("onednn", "bf16")),
        (ALL_KERNELS, ZEN_4, Traits("bf16", shape=WIDE), ("native", "bf16")),
        (ALL_KERNELS, ZEN_4, Traits("bf16", shape=ODD), ("onednn", "bf16")),
        ({}, GRAVITON_3, Traits("bf16", shape=WIDE), ("modules", "bf16")),
        ({}, APPLE, Traits("bf16", shape=WIDE), ("widened", "fp32")),
        # float16
        ({}, AVX2, Traits("fp16", shape=WIDE), ("onednn", "fp32")),
        (ALL_KERNELS, ZEN_4, Traits("fp16", shape=WIDE), ("native", "fp32")),
        ({}, GRAVITON_3, Traits("fp16", shape=WIDE), ("widened", "fp32")),
        # int8
        (ALL_KERNELS, ZEN_4, Traits("bf16", quantize=True, shape=WIDE), ("native", "int8")),
        ({}, CASCADE_LAKE, Traits("bf16", quantize=True, shape=WIDE), ("onednn", "int8")),
        ({}, AVX2, Traits("bf16", quantize=True, shape=WIDE), ("onednn", "fp32")),  # made elsewhere, unpickled here
        # what has to be called as it is
        (ALL_KERNELS, ZEN_4, Traits(None, changed="something hooks into the blocks"), ("modules", None)),
        (ALL_KERNELS, ZEN_4, Traits(None, shape=WIDE), ("modules", None)),
    ],
)
def test_who_computes_it(kernels, facts, encoder, expected):
    found = choose(capabilities_of(kernels, facts), encoder)
    assert (found.engine, found.kind) == expected
    assert found.reason and found.reason in str(found)


def test_half_precision_is_never_slower_than_float32():
    """Whatever the machine: products are of float32, or of what it multiplies faster."""
    for facts in (AVX2, AVX512, CASCADE_LAKE, ZEN_4, GRAVITON_3, APPLE):
        here = capabilities_of({}, facts)
        for stored in ("bf16", "fp16"):
            found = choose(here, Traits(stored, shape=WIDE))
            assert found.kind == "fp32" or here.multiplies(found.kind)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: torch.nn.Parameter(x), "Parameter"),
        (lambda x: x.to("meta"), "meta"),
    ],
)
def test_inputs_that_the_modules_take(tiny, prepare, reason):
    with torch.no_grad():
        found = selection.choose_backend(tiny.encoder, prepare(torch.zeros(1, 1, 80, 64)))
    assert found.engine == "modules" and reason in found.reason


def test_surroundings_that_the_modules_need(tiny):
    x = torch.zeros(1, 1, 80, 64)
    assert selection.choose_backend(tiny.encoder, x).reason == "gradients are on"
    with torch.no_grad():
        assert selection.choose_backend(tiny.encoder, x).kind == "fp32"
        with torch.autocast("cpu", torch.bfloat16):
            assert selection.choose_backend(tiny.encoder, x).reason == "autocast is on"
        with torch.backends.mkldnn.flags(enabled=False):
            assert selection.choose_backend(tiny.encoder, x).reason == "torch.backends.mkldnn is off"
        tiny.encoder.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
        assert selection.choose_backend(tiny.encoder, x).reason == "something hooks into the blocks"


def test_what_is_described():
    facts = selection.describe(random_model(TINY).encoder)
    assert list(facts) == [
        "CPU kernels",
        "M2D_EMBED_ISA",
        *(f"{d} on this CPU" for d in ("fp32", "bf16", "fp16", "int8")),
    ]
    assert all(facts.values())


@pytest.mark.parametrize(
    ("kernels", "facts", "expected"),
    [
        (
            dict.fromkeys(("fp32", "bf16", "int8"), "avx2"),
            AVX2,
            {
                "CPU kernels": "fp32 (avx2), bf16 (avx2), int8 (avx2)",
                "fp32": "fp32 kernels (avx2) run on this processor",
                "bf16": "bf16 kernels (avx2, weights of 16 bits, products in float32) run on this processor",
                "int8": "int8 kernels (avx2) run on this processor",
            },
        ),
        (
            {"fp32": "avx512", "bf16": "amx", "int8": "amx"},
            ZEN_4,
            {"bf16": "in bf16: bf16 kernels (amx) run on this processor", "fp16": "in fp32: fp32 kernels (avx512) run"},
        ),
        ({}, AVX2, {"fp32": "oneDNN", "int8": "not possible: no int8 kernel runs here, nor has oneDNN AVX-512 VNNI"}),
        ({}, CASCADE_LAKE, {"int8": "oneDNN, weights laid out once, in int8"}),
    ],
)
def test_what_is_described_of_a_machine(monkeypatch, kernels, facts, expected):
    monkeypatch.setattr(selection, "capabilities", lambda: capabilities_of(kernels, facts))
    found = selection.describe(random_model(ModelConfig(embed_dim=64, depth=1, num_heads=2)).encoder)
    for name, text in expected.items():
        assert text in found[name if name in found else f"{name} on this CPU"]


@pytest.mark.parametrize("why", ["The kernels were not compiled when this package was installed", ""])
def test_why_there_are_no_kernels_is_said_once(monkeypatch, why):
    monkeypatch.setattr(selection, "capabilities", lambda: capabilities_of({}, AVX2))
    monkeypatch.setattr(native, "why_no_kernels", lambda: why)
    found = "\n".join(selection.describe(random_model(TINY).encoder).values())
    assert found.count("none: ") == 1 and found.count("not compiled") == bool(why)
    assert ("they need AVX2, AVX-512 or NEON" in found) == (not why)


CAPPED = """
import torch, m2d_embed
from m2d_embed.backends import selection
from m2d_embed.backends import native
model = m2d_embed.load_model(device="cpu", dtype="bf16")
print(dict(native.available()), sorted(selection.capabilities().onednn), *model.encode([torch.ones(8000)]).shape)
"""

#: The kernels for AVX2, if it is there.
ON_AVX2 = {kind: "avx2" for kind, units in units_here().items() if "avx2" in units}


@pytest.mark.parametrize(
    ("settings", "kernels", "onednn"),
    [
        ({"M2D_EMBED_ISA": "off"}, "{}", None),
        ({"M2D_EMBED_ISA": "off", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "{}", "['fp32']"),
        ({"M2D_EMBED_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}, str(ON_AVX2), "['fp32']"),
    ],
)
@pytest.mark.skipif("fp32" not in selection.capabilities().onednn, reason="oneDNN packs on x86 CPUs")
def test_a_process_held_back(settings, kernels, onednn):
    """By the variables of this package, of oneDNN and of torch, which are read when a process begins."""
    ended = subprocess.run([sys.executable, "-c", CAPPED], env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(kernels) and ended.stdout.endswith(" 1 1920\n")
    assert onednn is None or onednn in ended.stdout


def test_a_machine_without_any_capabilities_gives_the_same_numbers(monkeypatch):
    model, audio = random_model(TINY), torch.rand(2, 16_000)
    with torch.no_grad():
        expected = model.scene(audio)
        monkeypatch.setattr(selection, "capabilities", lambda: Capabilities({}))
        torch.testing.assert_close(model.repack().scene(audio), expected, atol=2e-6, rtol=0)
    assert model.encoder._packed is None
