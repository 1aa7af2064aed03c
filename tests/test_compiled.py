"""The compiled encoder: few shapes, the plain encoder's numbers."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from conftest import TINY, random_model

import m2d_embed
from m2d_embed.model import compiled
from m2d_embed.model.compiled import CompiledEncoder, padded_width


def clips(batch: int, samples: int) -> torch.Tensor:
    """White noise in [-1, 1]."""
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def test_widths_are_quarters_of_the_window():
    assert [padded_width(n, 38) for n in (1, 10, 11, 20, 21, 30, 31, 38)] == [10, 10, 20, 20, 30, 30, 38, 38]
    assert [padded_width(n, 3) for n in (1, 2, 3)] == [1, 2, 3]
    assert all(padded_width(n, 200) >= n for n in range(1, 201))


def test_numbers_and_shapes(monkeypatch):
    plain = random_model(TINY)
    model = copy.deepcopy(plain)
    seen: Counter[tuple[int, ...]] = Counter()
    original = compiled._features

    def features(encoder, log_mel, layers, is_audio):
        seen[tuple(log_mel.shape)] += 1  # runs while torch traces, once a shape
        return original(encoder, log_mel, layers, is_audio)

    monkeypatch.setattr(compiled, "_features", features)
    model._compiled = CompiledEncoder(model.encoder, backend="eager")
    frames = TINY.hop_length
    with torch.no_grad():
        for batch in (1, 3):
            for length in (900, 40 * frames, 151 * frames):
                audio = clips(batch, length)
                torch.testing.assert_close(model.scene(audio), plain.scene(audio), atol=5e-6, rtol=0)
        log_mel = model.log_mel(clips(3, 30 * frames))
        for found, wanted in zip(
            model.intermediates(log_mel, (0, -1)), plain.intermediates(log_mel, (0, -1)), strict=True
        ):
            torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)
    widths = {shape[3] // TINY.patch_size[1] for shape in seen}
    assert widths <= {padded_width(n, TINY.grid_size[1]) for n in range(1, TINY.grid_size[1] + 1)}
    assert {shape[0] & (shape[0] - 1) for shape in seen} == {0}  # powers of two


def test_gradients_take_the_plain_encoder():
    model = random_model(TINY)
    model._compiled = CompiledEncoder(model.encoder, backend="eager")
    model.scene(clips(1, 8000)).sum().backward()
    assert model.encoder.blocks[0].mlp.fc1.weight.grad is not None


def test_changed_weights_count():
    model = random_model(TINY)
    model._compiled = CompiledEncoder(model.encoder, backend="eager")
    audio = clips(1, 8000)
    with torch.no_grad():
        before = model.scene(audio)
        model.encoder.blocks[0].mlp.fc1.weight.mul_(2)
        assert (model.scene(audio) - before).abs().max() > 1e-4


def test_copies_compile_their_own():
    model = random_model(TINY).compile_encoder()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._compiled.encoder is twin.encoder is not model.encoder


@pytest.mark.slow
def test_inductor():
    plain, model = m2d_embed.load_model(device="cpu"), m2d_embed.load_model(device="cpu", compile=True)
    audio = clips(3, 50_000)
    with torch.no_grad():
        torch.testing.assert_close(model.scene(audio), plain.scene(audio), atol=1e-5, rtol=0)
