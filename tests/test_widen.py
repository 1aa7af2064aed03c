"""A model twice as wide that computes the same."""

import pytest
import torch
from conftest import random_model

import m2d_embed
from benchmarks.pretraining.widen import main
from m2d_embed.config import ModelConfig

NARROW = ModelConfig(embed_dim=128, depth=2, num_heads=2, input_size=(80, 64), norm_stats=(-7.0, 4.0))


@pytest.fixture
def narrow():
    model = random_model(NARROW)
    torch.manual_seed(1)
    for parameter in model.encoder.parameters():  # biases and norms that are not the first ones, too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def wide(narrow, tmp_path):
    narrow.save_pretrained(tmp_path / "narrow")
    main(str(tmp_path / "narrow"), tmp_path / "wide")
    return m2d_embed.load_model(tmp_path / "wide")


def test_computes_the_same(narrow, wide, noise):
    assert (wide.config.embed_dim, wide.config.num_heads, wide.config.depth) == (256, 4, 2)
    with torch.no_grad():
        expected = narrow.encode_frames(noise(2.0, batch=2)).unflatten(2, (5, 128))  # (B, T, F, dim)
        got = wide.encode_frames(noise(2.0, batch=2)).unflatten(2, (5, 256))
    torch.testing.assert_close(got[..., :128], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[..., 128:], expected, atol=2e-5, rtol=1e-4)


def test_gradients_tell_the_copies_apart(wide, noise):
    wide.train()
    frames = wide.encode_frames(noise(1.0))
    (frames * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for block in wide.encoder.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            outputs = layer.weight.grad
            halves = outputs.unflatten(0, (3, 2, -1)).transpose(0, 1) if layer is block.attn.qkv else outputs.chunk(2)
            assert (halves[0] - halves[1]).norm() > 0.1 * halves[0].norm()
