"""Compiled kernels: the numbers of the blocks they stand for, for all shapes, batches and numbers of threads.

Each runs in all units of this processor, in generic vectors, and those of tiles, if the processor lacks their
instructions, in generic vectors too.
"""

import copy
import ctypes
import functools
import pickle
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, random_model
from generic_kernels import COMPILER, GENERIC, run_sanitized, units_here, use
from torch import Tensor

import m2d_embed
from m2d_embed.backends import native, selection
from m2d_embed.backends.devices import DTYPES
from m2d_embed.backends.native import NativeBlocks, NativeLogMel, Shape, library
from m2d_embed.backends.packed import PackedBlocks
from m2d_embed.backends.selection import Backend
from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.model.encoder import Block
from m2d_embed.model.frontend import LogMel

KINDS = ("fp32", "bf16", "int8")
HERE = units_here()
UNITS = [(kind, unit) for kind in KINDS for unit in dict.fromkeys([*HERE[kind], *GENERIC[kind]])]
#: Units whose int8 products have levels of A in 16 bits.
SIXTEEN_BITS = {"neon", "generic"}
#: How far a block may be from float32, as a share of what it adds.
CLOSE = {"fp32": 2e-6, "bf16": 6e-3, "int8": 2.2e-2}
CLOSE_OF_SEVEN_BITS = 3.3e-2  # of weights, on AVX2 without VNNI, whose products of more bits would overflow
ONE = range(1)
SHAPES = [(64, 2, 256), (192, 3, 768), (128, 1, 192), (768, 12, 3072)]  # width, heads, MLP


def units(*kinds: native.Arithmetic, but: frozenset[native.Unit] = frozenset()):
    """A fixture's parameters: all units of some kinds."""
    chosen = [(kind, unit) for kind, unit in UNITS if kind in kinds and unit not in but]
    return {"params": chosen, "ids": [" ".join(pair) for pair in chosen]}


def use_unit(request, monkeypatch) -> native.Arithmetic:
    """Have a fixture's unit compute its kind: as compiled for this processor, or in generic vectors."""
    kind, unit = request.param
    is_here = unit in HERE[kind]
    use(monkeypatch, {kind: unit}, native.kernels() if is_here else request.getfixturevalue("generic_kernels"))
    return kind


@pytest.fixture(**units(*KINDS))
def kind(request, monkeypatch):
    """Each kind of products in each unit."""
    return use_unit(request, monkeypatch)


@pytest.fixture(**units("fp32"))
def fp32(request, monkeypatch):
    return use_unit(request, monkeypatch)


@pytest.fixture(**units("int8"))
def int8(request, monkeypatch):
    return use_unit(request, monkeypatch)


@pytest.fixture(**units("fp32", "bf16", but=library.TILED))
def on_vectors(request, monkeypatch):
    """Products of float32, whatever the weights are stored in."""
    return use_unit(request, monkeypatch)


def unit_of(kind: native.Arithmetic) -> native.Unit:
    """What computes it in this test."""
    return native.blocks.available()[kind]


def close(kind: native.Arithmetic) -> float:
    return CLOSE_OF_SEVEN_BITS if (kind, unit_of(kind)) == ("int8", "avx2") else CLOSE[kind]


def is_slow() -> bool:
    """Whether kernels run in generic vectors."""
    return native.blocks.kernels() is not native.kernels()


def random_block(dim: int, heads: int, hidden: int, seed: int = 0) -> Block:
    """Weights of the size that makes activations of about 1, and norms and biases that do something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        block = Block(dim, heads, hidden, 1e-6).eval()
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.1)
    return block.requires_grad_(False)


def tokens(windows: int, count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(windows, count, dim, generator=torch.Generator().manual_seed(seed))


def kernel(kind: native.Arithmetic, *modules: Block) -> NativeBlocks:
    """Of blocks, with a norm that does something."""
    norm = torch.nn.LayerNorm(modules[0].norm1.normalized_shape[0], eps=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    return NativeBlocks(modules, norm.requires_grad_(False), kind)


def error(block: Block, as_kernel: NativeBlocks, x: Tensor) -> float:
    expected = block(x)
    found = as_kernel(x.clone(), ONE)
    assert found.shape == x.shape and found.isfinite().all()
    return float((found - expected).norm() / (expected - x).norm())


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    or COMPILER is None,
    reason="no kernels for this system",
)
def test_the_kernels_were_built():
    assert native.kernels() is not None


def test_generic_vectors_are_for_tests_alone():
    assert not {unit for units in library._FEATURES.values() for unit in units if unit.startswith("generic")}
    assert set(native.available().values()) <= {unit for units in HERE.values() for unit in units}


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("count", [1, 6, 16, 20, 31, 33, 96, 191])
def test_a_block_has_the_numbers_of_its_module(kind, shape, count, threads):
    block = random_block(*shape)
    for windows in (1, 3) if is_slow() else (1, 3, 8):
        assert error(block, kernel(kind, block), tokens(windows, count, shape[0])) < close(kind)


@pytest.mark.parametrize("count", [5, 33])
def test_a_block_of_odd_widths(kind, count, threads):
    """Multiples of 32 that are none of 64."""
    if kind == "int8":
        pytest.skip("int8 tiles are 64 values long")
    block = random_block(96, 3, 160)
    assert error(block, kernel(kind, block), tokens(3, count, 96)) < close(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_read_as_they_are(on_vectors, dtype):
    """And multiplied in float32; float16 has values below its smallest normal one, too."""
    block = random_block(*SHAPES[1])
    block.mlp.fc1.weight[::7] *= 1e-5
    for layer in filter(lambda module: isinstance(module, torch.nn.Linear), block.modules()):
        layer.to(dtype)
    rounded = copy.deepcopy(block).float()
    as_kernel = kernel(on_vectors, block)
    assert error(rounded, as_kernel, tokens(3, 33, 192)) < CLOSE["fp32"]
    assert not as_kernel._matrices
    x = tokens(2, 20, 192)
    expected = kernel(on_vectors, rounded)(x.clone(), ONE)
    torch.testing.assert_close(as_kernel(x.clone(), ONE), expected, atol=0, rtol=0)


def test_int8_of_bfloat16_weights(int8):
    block = random_block(*SHAPES[1])
    for layer in filter(lambda module: isinstance(module, torch.nn.Linear), block.modules()):
        layer.to(torch.bfloat16)
    x = tokens(2, 20, 192)
    expected = kernel(int8, copy.deepcopy(block).float())(x.clone(), ONE)
    torch.testing.assert_close(kernel(int8, block)(x.clone(), ONE), expected, atol=0, rtol=0)


LARGEST_WEIGHTS = {
    "all positive": lambda signs: np.ones_like(signs),
    "all negative": lambda signs: -np.ones_like(signs),
    "alternating": lambda signs: np.where(np.arange(signs.size) % 2, 1, -1),
    "in pairs": lambda signs: np.where(np.arange(signs.size) // 2 % 2, 1, -1),
    "in fours": lambda signs: np.where(np.arange(signs.size) // 4 % 2, 1, -1),
    "of any signs": lambda signs: signs,
}


@pytest.mark.parametrize("dim", [64, 192, 768, 3072])
def test_sums_of_the_largest_levels_are_exact(int8, dim):
    """Weights of the largest levels, and inputs of the largest magnitude: sums of products that saturate would show.

    What the second layer of attention multiplies are the biases of the first one; all other weights are 0.
    """
    generator = np.random.default_rng(0)
    signs = generator.choice([-1, 1], (40, dim))
    most = 63 if unit_of(int8) == "avx2" else 127
    weights = most * np.array([make(signs[0]) for make in LARGEST_WEIGHTS.values()] + [*signs[1:20]])
    any_sizes = generator.integers(-most, most + 1, (dim - len(weights), dim))
    any_sizes[:, 0] = most  # so that a step of each row is worth 1
    weights = np.concatenate([weights, any_sizes])
    block = Block(dim, dim // 64, 64, 1e-6)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.attn.proj.weight.copy_(torch.from_numpy(weights))
    as_kernel = kernel(int8, block.requires_grad_(False))
    largest = np.float32(min(2047, (2**31 - 1) // (128 * dim)) if unit_of(int8) in SIXTEEN_BITS else 127)
    small = torch.from_numpy(generator.uniform(-1, 1, dim)).bfloat16().float().numpy()
    small[1] = 1
    patterns = [make(signs[20]).astype(np.float32) for make in LARGEST_WEIGHTS.values()]
    if not (is_slow() and dim == 3072):
        patterns += [*signs[21:30].astype(np.float32)]
    for inputs in [*patterns, small]:
        block.attn.qkv.bias[2 * dim :] = torch.from_numpy(inputs)
        step = np.float32(1) / largest
        levels = np.rint(inputs * (np.float32(1) / step)).astype(np.int64)
        assert np.abs(levels).max() == largest
        sums = weights.astype(np.int64) @ levels
        assert np.abs(sums).max() < 2**31
        found = as_kernel(torch.zeros(2, 8, dim), ONE)
        expected = torch.from_numpy(sums.astype(np.float32) * step).expand(2, 8, dim)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_block_of_the_size_of_a_base_model(kind):
    block = random_block(*SHAPES[3])
    windows, count = (1, 50) if is_slow() else (3, 191)
    assert error(block, kernel(kind, block), tokens(windows, count, 768)) < close(kind)


@pytest.mark.parametrize("name", ["attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "norm1.bias"])
def test_parameters_that_are_missing(kind, name):
    block = random_block(64, 2, 256)
    parent, _, parameter = name.rpartition(".")
    block.get_submodule(parent).register_parameter(parameter, None)
    assert error(block, kernel(kind, block), tokens(2, 31, 64)) < close(kind)


def test_biases_of_other_dtypes(kind):
    block = random_block(64, 2, 256)
    as_kernel = kernel(kind, block)
    assert error(block, as_kernel, tokens(2, 31, 64)) < close(kind)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        half = block.mlp.fc1.bias.data.to(dtype)
        block.mlp.fc1.bias.data = half
        expected = random_block(64, 2, 256)
        expected.mlp.fc1.bias.data = half.float()
        assert error(expected, as_kernel, tokens(2, 31, 64)) < close(kind)
        half.add_(1)  # in place: the same address
        expected.mlp.fc1.bias.data = half.float()
        assert error(expected, as_kernel, tokens(2, 31, 64)) < close(kind)
        block.mlp.fc1.bias.data = random_block(64, 2, 256).mlp.fc1.bias.data


def test_large_and_small_values(kind):
    """Scores of thousands, where a softmax overflows unless it is careful, and tokens that are all alike."""
    block = random_block(64, 2, 256)
    block.attn.qkv.weight *= 30
    as_kernel = kernel(kind, block)
    x = tokens(2, 40, 64)
    x[0] *= 1e4
    x[1] = 1e-6
    expected, found = block(x), as_kernel(x.clone(), ONE)
    assert found.isfinite().all()
    if kind == "fp32":
        assert (found[0] - expected[0]).norm() / (expected[0] - x[0]).norm() < 1e-3  # differences of large scores
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_window(kind, value):
    block = random_block(64, 2, 256)
    x = tokens(3, 20, 64)
    expected = kernel(kind, block)(x.clone(), ONE)
    x[1, 3, 5] = value
    found = kernel(kind, block)(x.clone(), ONE)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=0, rtol=0)
    assert (kind == "int8" and unit_of(kind) in library.TILED) or not found[1].isfinite().all()


def test_memory_that_held_something_else(kind):
    """What is left of scratch from a call before must not come into the numbers, not even NaN times 0."""
    as_kernel = kernel(kind, random_block(64, 2, 256))
    x = tokens(1, 17, 64)
    expected = as_kernel(x.clone(), ONE)
    as_kernel.scratch.memory.fill_(255)
    torch.testing.assert_close(as_kernel(x.clone(), ONE), expected, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [SHAPES[1], (128, 2, 3072)])  # the second one's MLP goes in parts
def test_a_window_does_not_depend_on_the_others(kind, shape, threads):
    """Not even in the last bit, in any unit: neither its rounding nor the order of its sums."""
    block = random_block(*shape)
    as_kernel = kernel(kind, block)
    x = tokens(7, 50, shape[0])
    x[::2] *= 100
    together = as_kernel(x.clone(), ONE)
    for index in range(7):
        alone = as_kernel(x[index : index + 1].clone(), ONE)
        torch.testing.assert_close(together[index : index + 1], alone, atol=0, rtol=0)


def test_two_threads_of_python_at_once(kind):
    block = random_block(192, 3, 768)
    as_kernel = kernel(kind, block)
    inputs = [tokens(2, 40 + 20 * index, 192) for index in range(4)]
    expected = [as_kernel(x.clone(), ONE) for x in inputs]
    wrong: list[int] = []

    def run(index: int) -> None:
        with torch.no_grad():
            results = (as_kernel(inputs[index].clone(), ONE) for _ in range(5 if is_slow() else 50))
            wrong.extend(index for result in results if not torch.equal(result, expected[index]))

    workers = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_mask_goes_to_the_blocks_themselves(kind):
    modules = torch.nn.ModuleList([random_block(64, 2, 256), random_block(64, 2, 256, seed=1)])
    attended = (torch.arange(20) < torch.tensor([[12], [20]]))[:, None, None]
    x = tokens(2, 20, 64)
    backend = Backend("native", kind, "")
    found = PackedBlocks(modules, torch.nn.LayerNorm(64), kind == "int8", backend)(x.clone(), range(2), attended)
    torch.testing.assert_close(found, modules[1](modules[0](x, attended), attended))


@pytest.mark.parametrize("windows", [1, 3, 8])
def test_blocks_run_one_after_the_other(kind, threads, windows):
    modules = [random_block(64, 2, 256, seed) for seed in range(4)]
    together = kernel(kind, *modules)
    x = tokens(windows, 50, 64)
    expected = x.clone()
    for module in modules[1:]:
        expected = kernel(kind, module)(expected, ONE)
    torch.testing.assert_close(together(x.clone(), range(1, 4)), expected, atol=0, rtol=0)
    torch.testing.assert_close(together(together(x.clone(), range(1, 3)), range(3, 4)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("windows", [1, 3, 8])
@pytest.mark.parametrize("layers", [[0], [2], [1, 0, 3], [2, 2]])
def test_features_are_what_the_norm_makes_of_the_tokens(kind, threads, windows, layers):
    rows, columns = 5, 7
    modules = [random_block(64, 2, 256, seed) for seed in range(4)]
    as_kernel = kernel(kind, *modules)
    x = tokens(windows, 1 + rows * columns, 64)
    found = as_kernel.features(x.clone(), layers, rows)
    assert len(found) == len(layers)
    for layer, features in zip(layers, found, strict=True):
        after = as_kernel(x.clone(), range(layer + 1))
        expected = as_kernel._norm(after[:, 1:]).view(windows, rows, columns, 64).transpose(1, 2)
        torch.testing.assert_close(features, expected, atol=2e-6, rtol=2e-6)


def test_features_through_a_norm_without_parameters(fp32):
    block = random_block(64, 2, 256)
    norm, x = torch.nn.LayerNorm(64, elementwise_affine=False), tokens(2, 13, 64)
    found = NativeBlocks([block], norm, "fp32").features(x.clone(), [0], 3)[0]
    expected = norm(block(x)[:, 1:]).view(2, 3, 4, 64).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_tokens_that_are_not_contiguous(kind):
    block = random_block(64, 2, 256)
    wide = tokens(2, 20, 128)
    expected = kernel(kind, block)(wide[..., ::2].contiguous(), ONE)
    torch.testing.assert_close(kernel(kind, block)(wide[..., ::2], ONE), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_fit(kind):
    assert not native.fits(Shape(32, 128, 2), kind)
    assert not native.fits(Shape(192, 768, 12), kind)  # 16 values a head
    assert native.fits(Shape(96, 160, 3), kind) == (kind != "int8")
    assert native.fits(Shape(192, 768, 3), kind)


def test_a_model_uses_them(kind):
    config = ModelConfig(embed_dim=64, depth=2, num_heads=2, input_size=(80, 64), patch_size=(16, 16))
    model = random_model(config).set_dtype(DTYPES[kind])
    assert selection.choose_backend(model.encoder, torch.zeros(1)).engine == "modules"  # gradients are on
    with torch.no_grad():
        assert selection.choose_backend(model.encoder, torch.zeros(1)).engine == "native"
        model.scene(tokens(1, 8000, 1)[..., 0])
    assert model.encoder._packed is not None
    assert model.encoder._packed.kernel is not None and not model.encoder._packed.copies
    assert model.encoder._packed.kernel.kind == kind


def test_float32_keeps_no_copies_of_weights(fp32):
    block = random_block(192, 3, 768)
    as_kernel = kernel("fp32", block)
    as_kernel(tokens(1, 8, 192), ONE)
    assert not as_kernel._matrices
    parameters = [*block.parameters(), *as_kernel._norm.parameters()]
    assert {t.data_ptr() for t in as_kernel._pointed.kept} == {p.data_ptr() for p in parameters}


@pytest.mark.parametrize("patch", [(16, 16), (16, 8), (80, 2), (8, 4)])
@pytest.mark.parametrize("windows", [1, 3, 20])
@pytest.mark.parametrize("columns", [1, 7, 12])
def test_tokens_have_the_numbers_of_the_modules(fp32, patch, windows, columns, threads):
    """Of whole windows and shorter ones, cut out of a longer log-mel."""
    encoder = random_model(
        ModelConfig(embed_dim=96, depth=1, num_heads=3, input_size=(80, 12 * patch[1]), patch_size=patch)
    ).encoder
    generator = torch.Generator().manual_seed(0)
    log_mel = torch.randn(windows, 1, 80, 15 * patch[1], generator=generator)[..., 3 : 3 + columns * patch[1]]
    with torch.no_grad():
        found = encoder._tokens(log_mel)
        expected = encoder.with_class_token(encoder.embed(log_mel))
        assert encoder._has_kernel(log_mel)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        in_other_order = log_mel.transpose(2, 3).contiguous().transpose(2, 3)
        torch.testing.assert_close(encoder._tokens(in_other_order), found, atol=0, rtol=0)
        encoder.patch_embed.proj.bias = None
        expected = encoder.with_class_token(encoder.embed(log_mel))
        torch.testing.assert_close(encoder._tokens(log_mel), expected, atol=2e-5, rtol=1e-5)


def test_tokens_that_no_kernel_makes(fp32):
    """Hooks are called, other dtypes and gradients go through PyTorch, and what does not fit is refused."""
    encoder = random_model(
        ModelConfig(embed_dim=64, depth=1, num_heads=2, input_size=(80, 64), patch_size=(16, 16))
    ).encoder
    log_mel = torch.zeros(1, 1, 80, 32)
    assert not encoder._has_kernel(log_mel)  # gradients
    with torch.no_grad():
        assert encoder._has_kernel(log_mel)
        assert not encoder._has_kernel(log_mel.double())
        for wrong in (torch.zeros(1, 1, 80, 80), torch.zeros(1, 1, 64, 32), torch.zeros(1, 1, 80, 33), log_mel[0]):
            assert not encoder._has_kernel(wrong)
        for module in (encoder.patch_embed, encoder.patch_embed.proj):
            handle = module.register_forward_hook(lambda *_: None)
            assert not encoder._has_kernel(log_mel)
            handle.remove()
        encoder.patch_embed = torch.nn.Sequential(encoder.patch_embed)
        assert not encoder._has_kernel(log_mel)
    small = random_model(
        ModelConfig(embed_dim=16, depth=1, num_heads=1, input_size=(80, 64), patch_size=(16, 16))
    ).encoder
    with torch.no_grad():
        assert not small._has_kernel(log_mel)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(kind, unit) for kind, unit in UNITS if unit in HERE[kind] or unit == "generic"]
)
def test_embeddings_do_not_depend_on_the_batch(request, monkeypatch, dtype, unit):
    """Not in the last bit, from files to embeddings, whatever the lengths of the clips beside one."""
    clips = [*sorted((DATA / "digits").glob("*.opus"))[:5], *sorted((DATA / "sounds").glob("*.oga"))]
    if unit == "generic":  # which take their time
        use(monkeypatch, dict.fromkeys({"fp32", dtype}, "generic"), request.getfixturevalue("generic_kernels"))
        clips = clips[:6]
    else:
        use(monkeypatch, {kind: HERE[kind][0] for kind in {"fp32", dtype}} | {dtype: unit}, native.kernels())
    model = m2d_embed.load_model(device="cpu", dtype=dtype)
    together = model.encode(clips, batch_size=32)
    assert model.encoder._packed.kernel is not None and model.frontend._kernel is not None
    for clip, expected in zip(clips, together, strict=True):
        np.testing.assert_array_equal(model.encode(clip), expected)


@pytest.mark.parametrize("n_fft", [16, 32, 80, 144, 400, 800, 960, 1024, 2048, 3072])
@pytest.mark.parametrize("num_frames", [1, 15, 16, 33])
def test_log_mel_of_all_lengths(fp32, n_fft, num_frames, threads):
    """Against float64: every radix, and a last group of fewer than 16 frames."""
    assert NativeLogMel.fits(n_fft)
    generator = torch.Generator().manual_seed(0)
    hop = n_fft // 3
    audio = torch.randn(3, n_fft + (num_frames - 1) * hop, generator=generator)
    window = torch.rand(n_fft, generator=generator)
    filterbank = torch.rand(n_fft // 2 + 1, 7, generator=generator) * (
        torch.rand(n_fft // 2 + 1, 7, generator=generator) < 0.3
    )
    filterbank[:, 3] = 0  # a band with no bins
    frames = audio.unfold(-1, n_fft, hop)
    power = torch.fft.rfft(frames.double() * window.double()).abs().square() @ filterbank.double()
    expected = (torch.log(power + 1e-7) - 1.5) / 2.5
    found = NativeLogMel(window, filterbank, hop, 1e-7, (1.5, 2.5))(frames)
    torch.testing.assert_close(found, expected.transpose(1, 2).float(), atol=2e-5, rtol=2e-5)


def test_log_mels_without_a_kernel(fp32):
    assert not NativeLogMel.fits(400 * 7)  # a prime factor that there is no radix for
    assert not NativeLogMel.fits(8192)
    assert not NativeLogMel.fits(40)
    front_end = LogMel(ModelConfig(n_fft=448, hop_length=160))
    assert front_end(torch.zeros(1, 1600)).shape == (1, 1, 80, 11)
    assert front_end._kernel is None


def test_log_mel_gradients_copies_and_pickles(fp32):
    front_end = LogMel(ModelConfig())
    audio = tokens(1, 3200, 1)[..., 0]
    expected = front_end(audio)
    assert front_end._kernel is not None
    for twin in (copy.deepcopy(front_end), pickle.loads(pickle.dumps(front_end))):
        assert twin._kernel is None
        torch.testing.assert_close(twin(audio), expected, atol=0, rtol=0)
    audio.requires_grad_()
    torch.testing.assert_close(front_end(audio), expected, atol=2e-5, rtol=0)
    front_end(audio).sum().backward()
    assert audio.grad.abs().sum() > 0


# --- which library, and what of it ------------------------------------------------------------------------------------


def test_without_the_library_onednn_does_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "kernels.so")
    assert "not compiled when" in str(library._attempt.__wrapped__())
    monkeypatch.setattr(library, "kernels", lambda: None)
    assert library.available.__wrapped__() == {}
    modules = torch.nn.ModuleList([random_block(64, 2, 256)])
    x = tokens(2, 20, 64)
    found = PackedBlocks(modules, torch.nn.LayerNorm(64), False, Backend("widened", "fp32", ""))
    assert found.kernel is None and not found.can_read
    torch.testing.assert_close(found(x.clone(), ONE, None), modules[0](x), atol=1e-5, rtol=0)


def test_what_is_no_library_is_said_once(monkeypatch, tmp_path, caplog):
    (tmp_path / "kernels.so").write_text("no library")
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "kernels.so")
    assert "is no library for this system" in str(library._attempt.__wrapped__())
    assert caplog.text.count("install m2d-embed again") == 1


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("header", "was", "becomes"),
    [
        ("blocks.h", "  float eps;\n", "  double eps;\n"),  # where there was a gap
        ("blocks.h", "int64_t windows, tokens;", "int64_t tokens, windows;"),  # exchanged: the same size
        ("log_mel.h", "float eps, mean, std;", "float eps, mean, std, gain, floor;"),
        ("parallel.h", "int (*num_threads)(void);\n", "int (*num_threads)(void);\n  void* more;\n"),
        ("abi.c", "enum { MEANING = 3 };", "enum { MEANING = 4 };"),
    ],
)
def test_a_library_of_other_sources_is_never_called(monkeypatch, tmp_path, caplog, header, was, becomes):
    folder = tmp_path / "native"
    shutil.copytree(Path(native.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.py"))
    text = (folder / header).read_text()
    assert was in text
    (folder / header).write_text(text.replace(was, becomes))
    stale = tmp_path / "kernels.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", folder / "abi.c", "-o", stale], check=True)
    with pytest.raises(library.LoadError, match=r"kernels.so is not of these sources, its ABI number is [0-9a-f]{8}"):
        library.load(stale)
    monkeypatch.setattr(library, "_LIBRARY", stale)
    monkeypatch.setattr(library, "_attempt", functools.cache(library._attempt.__wrapped__))
    assert native.kernels() is None and library.available.__wrapped__() == {}
    assert "install m2d-embed again" in native.why_no_kernels()
    assert caplog.text.count("is not of these sources") == 1


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_library_without_an_abi_number_is_never_called(tmp_path):
    (tmp_path / "other.c").write_text("int m2d_fp32_run(void) { return 1; }")
    subprocess.run([COMPILER, "-shared", "-fPIC", tmp_path / "other.c", "-o", tmp_path / "kernels.so"], check=True)
    with pytest.raises(library.LoadError, match="states no ABI number"):
        library.load(tmp_path / "kernels.so")


def test_the_number_is_that_of_these_sources(generic_kernels):
    assert generic_kernels.library.m2d_abi() == library.abi_number()


def test_impossible_limits_are_refused(monkeypatch):
    monkeypatch.setenv("M2D_EMBED_ISA", "sse9")
    with pytest.raises(
        ConfigError, match="M2D_EMBED_ISA=sse9 is not possible; choose one of off, avx2, avx_vnni, avx512,"
    ):
        m2d_embed.load_model(device="cpu")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A checkout's kernels, and the hook that compiles them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    folder = tmp_path / "m2d_embed" / "backends" / "native"
    shutil.copytree(Path(native.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.mark.skipif(native.kernels() is None, reason="no kernels were built")
def test_the_build_hook_compiles_what_the_package_loads(sources, monkeypatch):
    """Without a warning."""
    import hatch_build

    monkeypatch.setenv("CC", f"{COMPILER} -Wall -Wextra -Werror")
    target = hatch_build.compile_kernels(sources.parents[2])
    assert target is not None
    compiled = ctypes.CDLL(str(sources / "kernels.so"))
    compiled.m2d_abi.restype = ctypes.c_uint32
    assert compiled.m2d_abi() == library.abi_number()
    is_arm = target.machine == "aarch64"
    assert_has_all(
        compiled, {unit for units in library._FEATURES.values() for unit in units if ("neon" in unit) == is_arm}
    )


def assert_has_all(compiled: ctypes.CDLL, of: set[native.Unit]) -> None:
    """Every function that the package calls by the names of these units."""
    for kind, units in library._FEATURES.items():
        for unit in of & units.keys():
            assert hasattr(compiled, f"m2d_{library.functions_of(kind, unit)}_run")
    for unit in of & library._FEATURES["fp32"].keys():
        assert hasattr(compiled, f"m2d_{unit}_float_tokens_run") and hasattr(compiled, f"m2d_{unit}_log_mel_run")


@pytest.mark.parametrize(
    ("target", "symbols", "expected"),
    [
        (("x86_64", "linux"), b"\0libc.so.6\0GLIBC_2.2.5\0GLIBC_2.14\0", "manylinux_2_17_x86_64"),
        (("x86_64", "linux"), b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4\0", "manylinux_2_34_x86_64"),
        (("aarch64", "linux"), b"\0GLIBC_2.17\0", "manylinux_2_17_aarch64"),
        (("aarch64", "darwin"), b"\0libSystem\0", "macosx_11_0_arm64"),
        (
            ("x86_64", "linux"),
            b"\0libc.musl-x86_64.so.1\0",
            sysconfig.get_platform().replace("-", "_").replace(".", "_"),
        ),
    ],
)
def test_a_wheel_names_the_systems_that_it_runs_on(target, symbols, expected, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    import hatch_build

    (tmp_path / "kernels.so").write_bytes(symbols)
    assert hatch_build.platform_tag(tmp_path / "kernels.so", hatch_build.Target(*target)) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        ("x86_64-linux-gnu", ("x86_64", "linux")),
        ("x86_64-pc-linux-musl", ("x86_64", "linux")),
        ("aarch64-linux-gnu", ("aarch64", "linux")),
        ("arm64-apple-darwin23.6.0", ("aarch64", "darwin")),
        ("x86_64-apple-darwin23.6.0", None),
        ("x86_64-w64-mingw32", None),
        ("riscv64-linux-gnu", None),
    ],
)
def test_the_compiler_says_what_it_compiles_for(sources, triple, expected, monkeypatch, tmp_path, capfd):
    import hatch_build

    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\necho {triple}\n")
    compiler.chmod(0o755)
    assert hatch_build.target_of([str(compiler)]) == expected
    if expected is None:
        monkeypatch.setenv("CC", str(compiler))
        assert hatch_build.compile_kernels(sources.parents[2]) is None
        assert "no kernels for what this compiler compiles for" in capfd.readouterr().err


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_no_library(sources, compiler, monkeypatch, capfd):
    import hatch_build

    (sources / "kernels.so").write_text("of other sources")
    monkeypatch.setenv("CC", compiler)
    assert not hatch_build.compile_kernels(sources.parents[2])
    assert "the kernels do not compile, PyTorch takes their place" in capfd.readouterr().err
    assert not (sources / "kernels.so").exists()


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs a C compiler and its sanitizers")
def test_nothing_is_read_or_written_beyond_its_end(pytestconfig):
    """Every kernel under the address and undefined-behaviour sanitizers."""
    ended = run_sanitized(pytestconfig.cache.mkdir("kernels"))
    assert ended.returncode == 0, ended.stderr
