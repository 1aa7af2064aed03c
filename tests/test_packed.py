"""Packed blocks: the numbers of the blocks they stand for, never stale, and out of the way where they must be."""

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import DATA, TINY, random_model
from generic_kernels import use
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import m2d_embed
from m2d_embed.backends import native, packed, selection
from m2d_embed.backends.selection import Capabilities
from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.m2d import M2D

SOUNDS = sorted([*(DATA / "digits").glob("*.opus"), *(DATA / "sounds").glob("*.oga")])
onednn_int8 = "int8" in selection.capabilities().onednn
needs_int8 = pytest.mark.skipif(not onednn_int8, reason="oneDNN's int8 sums overflow on this CPU")


def clips(batch: int, samples: int) -> torch.Tensor:
    """White noise in [-1, 1]."""
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


#: Wide enough for the kernels of ``native``; TINY goes through oneDNN, or PyTorch's modules where that packs nothing.
WIDE = dataclasses.replace(TINY, embed_dim=64)


@pytest.fixture(params=["onednn", "native"])
def model(request, monkeypatch) -> M2D:
    """For oneDNN, or for kernels, in generic vectors where this processor cannot run them."""
    if request.param == "onednn":
        if "fp32" not in selection.capabilities().onednn:
            pytest.skip("oneDNN packs on x86 CPUs")
        return random_model(TINY)
    if not {"fp32", "bf16", "int8"} <= native.available().keys():
        units = dict.fromkeys(("fp32", "bf16", "int8"), "generic")
        use(monkeypatch, units, request.getfixturevalue("generic_kernels"))
    return random_model(WIDE)


@pytest.fixture
def onednn() -> M2D:
    if "fp32" not in selection.capabilities().onednn:
        pytest.skip("oneDNN packs on x86 CPUs")
    return random_model(TINY)


def plain(model: M2D, audio: torch.Tensor) -> torch.Tensor:
    """The same by the modules themselves, which gradients go through."""
    with torch.enable_grad():
        return model.scene(audio).detach()


@torch.no_grad()
def fast(model: M2D, audio: torch.Tensor) -> torch.Tensor:
    return model.scene(audio)


def is_packed(model: M2D) -> bool:
    return model.encoder._packed is not None


@pytest.mark.parametrize("seconds", [0.02, 0.4, 3.0])
@pytest.mark.parametrize("batch", [1, 5])
def test_float32_is_exact(model, batch, seconds):
    audio = clips(batch, int(seconds * 16_000))
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)
    assert is_packed(model)


@pytest.mark.parametrize("too_large", [0, 1, 2, 3])
def test_copies_take_no_more_memory_than_they_may(onednn, monkeypatch, too_large):
    model = onednn
    layers = [m for m in model.encoder.blocks.modules() if isinstance(m, torch.nn.Linear)]
    second = model.encoder.blocks[0].mlp.fc2.weight.nbytes
    whole = sum(layer.weight.nbytes for layer in layers)
    monkeypatch.setattr(packed, "_MOST_PACKED", whole - too_large * second)
    audio = clips(2, 8_000)
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)
    blocks = model.encoder._packed.copies
    as_they_are = [copied.fc2 is block.mlp.fc2 for copied, block in zip(blocks, model.encoder.blocks, strict=True)]
    assert as_they_are == [index >= 3 - too_large for index in range(3)]
    monkeypatch.setattr(packed, "_MOST_PACKED", 0)
    assert packed._num_too_large(model.encoder.blocks) == 3


def test_bfloat16_rounds_no_more_than_the_modules(model):
    audio = clips(3, 24_000)
    exact = plain(model, audio)
    model.set_dtype(torch.bfloat16)
    error, usual = (fast(model, audio) - exact).norm(), (plain(model, audio) - exact).norm()
    assert is_packed(model)
    assert 0 < error < 1.5 * usual


def rounded(model: M2D, dtype: torch.dtype) -> M2D:
    """A float32 model whose matrices, and the biases of these layers, were rounded to another dtype."""
    return copy.deepcopy(model).set_dtype(dtype).set_dtype(torch.float32)


HALVES = [torch.bfloat16, torch.float16]
#: A machine that multiplies float32 alone, by kernels, by oneDNN, or by nothing but PyTorch.
FLOAT_ALONE = {
    "native": Capabilities({"fp32": "avx512"}, frozenset({"fp32"})),
    "onednn": Capabilities({}, frozenset({"fp32"})),
    "widened": Capabilities({}),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("engine", FLOAT_ALONE)
def test_half_precision_without_hardware_for_it_is_float32_of_rounded_weights(request, monkeypatch, dtype, engine):
    if engine == "onednn" and "fp32" not in selection.capabilities().onednn:
        pytest.skip("oneDNN packs on x86 CPUs")
    if engine == "native" and "fp32" not in native.available():
        use(monkeypatch, {"fp32": "generic"}, request.getfixturevalue("generic_kernels"))
    monkeypatch.setattr(selection, "capabilities", lambda: FLOAT_ALONE[engine])
    model, audio = random_model(WIDE), clips(3, 24_000)
    half = copy.deepcopy(model).set_dtype(dtype)
    found = fast(half, audio)
    assert half.dtype == dtype and half.encoder.blocks[0].mlp.fc1.weight.dtype == dtype
    assert half.encoder._packed.backend.engine == engine and half.encoder._packed.backend.kind == "fp32"
    torch.testing.assert_close(found, plain(rounded(model, dtype), audio), atol=2e-6, rtol=0)
    assert torch.cosine_similarity(found, plain(model, audio)).min() > 0.9999
    assert (found - plain(model, audio)).abs().max() > 1e-6
    half.encoder.blocks[0].attn.qkv.bias.data.add_(0.5)  # biases are read anew
    torch.testing.assert_close(fast(half, audio), plain(rounded(half, torch.float32), audio), atol=2e-6, rtol=0)
    in_place(half.encoder.blocks[2].mlp.fc2.weight)  # and copies of matrices are made anew
    torch.testing.assert_close(fast(half, audio), plain(rounded(half, torch.float32), audio), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_works_on_every_machine(bundled, dtype):
    """From files to embeddings, on this machine as it is."""
    model = m2d_embed.load_model(device="cpu", dtype=dtype)
    exact, found = bundled.encode(SOUNDS[:6]), model.encode(SOUNDS[:6])
    assert torch.cosine_similarity(torch.from_numpy(exact), torch.from_numpy(found)).min() > 0.9995
    audio = clips(2, 32_000)
    for function in (m2d_embed.get_scene_embeddings, lambda *a: m2d_embed.get_timestamp_embeddings(*a)[0]):
        exact, found = function(audio, bundled).flatten(1), function(audio, model).flatten(1)
        assert torch.cosine_similarity(exact, found).min() > 0.9995
    if not selection.capabilities().multiplies(dtype):
        assert model.encoder._packed.backend.kind == "fp32"


def test_int8_is_close_on_real_sounds(request, monkeypatch, bundled):
    sounds = SOUNDS
    if not selection.supports_int8():
        use(monkeypatch, {"fp32": "generic", "int8": "generic"}, request.getfixturevalue("generic_kernels"))
        sounds = SOUNDS[::4]  # which take their time
    rough = m2d_embed.load_model(device="cpu", dtype="int8")
    assert rough.dtype == torch.int8
    a, b = (torch.from_numpy(model.encode(sounds)) for model in (bundled, rough))
    cosine = torch.cosine_similarity(a, b)
    assert 0.9995 < cosine.min() < 0.9999999


def test_int8_results_do_not_depend_on_other_clips(model):
    if not selection.supports_int8():
        pytest.skip("oneDNN's int8 sums overflow on this CPU")
    model.set_dtype(torch.int8)
    loud, quiet = 30 * clips(1, 24_000), 1e-4 * clips(1, 24_000)
    together = fast(model, torch.cat([loud, quiet]))
    torch.testing.assert_close(together[1:], fast(model, quiet), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:1], fast(model, loud), atol=1e-5, rtol=0)


@needs_int8
def test_int8_in_parts_is_int8_at_once(onednn, monkeypatch):
    audio = clips(4, 24_000)
    expected = fast(onednn.set_dtype(torch.int8), audio)
    monkeypatch.setattr(packed, "_HIDDEN_BYTES", 4 * onednn.encoder.blocks[0].mlp.fc1.out_features * 7)
    again = random_model(TINY).set_dtype(torch.int8)
    torch.testing.assert_close(fast(again, audio), expected, atol=1e-6, rtol=0)


@needs_int8
def test_int8_multiplies_integers(model):
    """By hand: round the weights by output and the inputs by row, multiply exactly, scale back."""
    layer = model.encoder.blocks[0].mlp.fc1
    x = torch.randn(9, layer.in_features)
    x[3] *= 1000
    steps, scales = x.abs().amax(1, keepdim=True) / 127, layer.weight.abs().amax(1) / 127
    rounded = (layer.weight / scales[:, None]).round().double()
    with torch.no_grad():
        expected = (x / steps + 0.5).floor().double() @ rounded.T * steps * scales + layer.bias
        found = packed._quantized(layer)(x.clone())
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert ((found - layer(x)).norm(dim=1) / layer(x).norm(dim=1)).max() < 0.02


def test_a_clip_of_zeros_in_int8(model):
    if not selection.supports_int8():
        pytest.skip("oneDNN's int8 sums overflow on this CPU")
    assert fast(model.set_dtype(torch.int8), torch.zeros(1, 8000)).isfinite().all()


@pytest.mark.parametrize(
    ("here", "advice"),
    [
        (Capabilities({}, frozenset({"fp32"})), "take fp32"),
        (Capabilities({"fp32": "avx512"}), "take fp32"),
        (Capabilities({}, frozenset({"fp32", "bf16"})), "take bf16"),
        (Capabilities({}, modules=frozenset({"fp32", "bf16"})), "take bf16"),
    ],
)
def test_int8_needs_the_hardware_and_what_works_is_advised(tiny, monkeypatch, here, advice):
    monkeypatch.setattr(selection, "capabilities", lambda: here)
    with pytest.raises(UnsupportedError, match=f"int8 needs kernels .*{advice}"):
        tiny.set_dtype(torch.int8)
    with pytest.raises(UnsupportedError, match=f"int8 needs kernels .*{advice}"):
        m2d_embed.load_model(device="cpu", dtype="int8")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="int8 is for CPUs"):
        from m2d_embed.backends.devices import check_int8

        check_int8(torch.device("cuda"))


# --- staleness --------------------------------------------------------------------------------------------------------


def in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def through_data(weight):
    weight.data.mul_(1.5)  # leaves the version as it was


def new_data(weight):
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [in_place, through_data, new_data])
@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_changed_matrices_are_packed_again(model, change, name):
    audio = clips(2, 16_000)
    before = fast(model, audio)
    change(model.encoder.blocks[1].get_submodule(name).weight)
    after = fast(model, audio)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, plain(model, audio), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["attn.qkv.bias", "mlp.fc1.bias", "mlp.fc2.bias", "norm1.weight", "norm2.bias"])
def test_biases_and_norms_are_read_anew(model, name):
    audio = clips(2, 16_000)
    before = fast(model, audio)
    model.encoder.blocks[1].get_parameter(name).data[::2].add_(0.3)
    after = fast(model, audio)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, plain(model, audio), atol=2e-6, rtol=0)


def test_loaded_weights_and_new_dtypes_are_packed_again(model):
    audio, other = clips(1, 16_000), random_model(model.config, seed=1)
    fast(model, audio)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(model, audio), plain(other, audio), atol=2e-6, rtol=0)
    half = fast(model.set_dtype(torch.bfloat16), audio)
    assert 1e-5 < (half - plain(other, audio)).abs().max() < 0.1


def test_weights_made_in_inference_mode():
    audio = clips(1, 16_000)
    with torch.inference_mode():
        model = random_model(TINY)
        first = model.scene(audio)
        model.encoder.blocks[0].mlp.fc1.weight.mul_(2)
        second = model.scene(audio)
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("forget", [M2D.eval, M2D.repack, lambda model: model.train().eval()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_changed_through_data_is_seen_after_eval(model, forget, dtype):
    """It leaves no trace, and misses the elements that are compared."""
    audio = clips(2, 16_000)
    model.set_dtype(dtype)
    fast(model, audio)
    model.encoder.blocks[1].mlp.fc1.weight.data[3] += 0.5
    forget(model)
    fresh = copy.deepcopy(model)
    torch.testing.assert_close(fast(model, audio), fast(fresh, audio), atol=0, rtol=0)
    torch.testing.assert_close(
        fast(model, audio), plain(model, audio), atol=2e-6 if dtype == torch.float32 else 0.05, rtol=0
    )


def test_training_mode_keeps_no_copies(model):
    audio = clips(1, 16_000)
    fast(model, audio)
    assert is_packed(model)
    fast(model.train(), audio)
    assert not is_packed(model)


# --- out of the way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.attn", "blocks.1.mlp.fc1", "blocks.1.norm2", "norm"])
def test_hooks_are_called(model, name):
    audio, calls = clips(1, 16_000), []
    fast(model, audio)
    handle = model.encoder.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    fast(model, audio)
    assert set(calls) == {name}
    count = len(calls)
    handle.remove()
    fast(model, audio)
    assert len(calls) == count and is_packed(model)


def test_replaced_layers_are_called(model):
    class Doubled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        @property
        def weight(self):
            return self.layer.weight

        def forward(self, x):
            return 2 * self.layer(x)

    audio = clips(1, 16_000)
    fast(model, audio)
    block = model.encoder.blocks[0]
    block.attn.proj = Doubled(block.attn.proj)
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)
    assert not is_packed(model)


def test_a_replaced_norm_is_called(model):
    audio = clips(1, 16_000)
    before = fast(model, audio)
    model.encoder.norm = torch.nn.LayerNorm(model.config.embed_dim)
    torch.nn.init.constant_(model.encoder.norm.weight, 2)
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=4e-6, rtol=0)
    assert (fast(model, audio) - before).abs().max() > 0.1
    model.encoder.norm = torch.nn.RMSNorm(model.config.embed_dim)
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=4e-6, rtol=0)


@pytest.mark.parametrize("name", ["norm", "blocks.1.norm2"])
def test_the_eps_of_a_norm_is_read_anew(model, name):
    audio = clips(1, 16_000)
    before = fast(model, audio)
    model.encoder.get_submodule(name).eps = 1.0
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)
    assert (fast(model, audio) - before).abs().max() > 1e-3


def test_a_norm_of_another_dtype_is_not_silently_cast(model):
    audio = clips(1, 16_000)
    fast(model, audio)
    model.encoder.norm.double()
    with pytest.raises(RuntimeError):
        fast(model, audio)


def test_blocks_are_added_and_taken_away(model):
    audio = clips(1, 16_000)
    fast(model, audio)
    model.encoder.blocks.append(copy.deepcopy(model.encoder.blocks[0]))
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)
    del model.encoder.blocks[1]
    torch.testing.assert_close(fast(model, audio), plain(model, audio), atol=2e-6, rtol=0)


def test_other_dtypes_go_through_the_modules(model):
    audio = clips(1, 16_000)
    exact = fast(model, audio)
    model.repack().encoder.double()
    assert (fast(model, audio) - exact).abs().max() < 1e-5 and not is_packed(model)


def test_hooks_of_all_modules_are_called(model):
    audio = clips(1, 16_000)
    expected, called = fast(model, audio), []
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.encoder.modules())
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        called.clear()
        handle = register(lambda module, *_: called.append(type(module)))
        found = fast(model, audio)
        handle.remove()
        count = called.count(torch.nn.Linear)  # of windows of two widths
        assert count == 2 * linears and torch.nn.Conv2d in called
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    called.clear()
    torch.testing.assert_close(fast(model, audio), expected, atol=0, rtol=0)
    assert not called and is_packed(model)


def test_operations_are_counted(model):
    audio = clips(1, 16_000)
    expected = fast(model, audio)
    with FlopCounterMode(display=False) as counted, torch.enable_grad():
        model.scene(audio)
    with FlopCounterMode(display=False) as found:
        torch.testing.assert_close(fast(model, audio), expected, atol=2e-6, rtol=0)
    linear = sum(m.weight.numel() for m in model.encoder.modules() if isinstance(m, torch.nn.Linear))
    assert found.get_total_flops() == counted.get_total_flops() > 2 * linear


def test_function_modes_see_the_operations_and_a_default_device_is_none(model):
    class Names(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    audio, names = clips(1, 16_000), []
    fast(model, audio)
    with Names():
        fast(model, audio)
    assert "linear" in names and "layer_norm" in names
    with torch.device("cpu"):
        assert selection.watcher(audio) is None


def test_mapped_over_a_dimension(model):
    audio = clips(3, 8_000)[:, None]
    with torch.no_grad():
        found = torch.vmap(model.encoder.embed)(model.log_mel(audio[:, 0])[:, None, :, :, :32])
        expected = model.encoder.embed(model.log_mel(audio[:, 0])[..., :32])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=0)


def test_gradients_flow_after_inference(model):
    audio = clips(1, 16_000)
    fast(model, audio)
    model.scene(audio).sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_masked_tokens_are_masked(model):
    tokens = torch.randn(2, 12, model.config.embed_dim)
    is_audio = torch.arange(12) < torch.tensor([[7], [12]])
    expected = model.encoder.encode(tokens, is_audio=is_audio)[0].detach()
    with torch.no_grad():
        found = model.encoder.encode(tokens, is_audio=is_audio)[0]
    torch.testing.assert_close(found[0, :8], expected[0, :8], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=0)


def test_several_layers(model):
    audio = clips(2, 20_000)
    expected = [x.detach() for x in model.intermediates(audio, (0, -1))]
    with torch.no_grad():
        for found, wanted in zip(model.intermediates(audio, (0, -1)), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=4e-6, rtol=0)


def test_copies_and_pickles_do_not_carry_packed_weights(model):
    audio = clips(1, 16_000)
    fast(model, audio)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_packed(twin) and is_packed(model)
        in_place(twin.encoder.blocks[0].mlp.fc2.weight)
        torch.testing.assert_close(fast(twin, audio), plain(twin, audio), atol=2e-6, rtol=0)
