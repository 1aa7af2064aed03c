"""The vision transformer: against timm's, positions, layers, precision."""

import numpy as np
import pytest
import torch
from conftest import ORACLE, TINY, random_model
from torch import nn

from m2d_embed.errors import ConfigError
from m2d_embed.m2d import M2D
from m2d_embed.model.encoder import sincos_positions


def torch_layers(model: M2D) -> list[nn.TransformerEncoderLayer]:
    """The model's blocks as torch's own pre-norm transformer layers, with the same weights."""
    layers = []
    for block in model.encoder.blocks:
        config = model.config
        layer = nn.TransformerEncoderLayer(
            config.embed_dim,
            config.num_heads,
            dim_feedforward=int(config.embed_dim * config.mlp_ratio),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.norm_eps,
            batch_first=True,
            norm_first=True,
        )
        theirs = {
            "self_attn.in_proj_": block.attn.qkv,
            "self_attn.out_proj.": block.attn.proj,
            "linear1.": block.mlp.fc1,
            "linear2.": block.mlp.fc2,
            "norm1.": block.norm1,
            "norm2.": block.norm2,
        }
        layer.load_state_dict({f"{k}{n}": p for k, module in theirs.items() for n, p in module.named_parameters()})
        layers.append(layer.eval())
    return layers


def test_agrees_with_torchs_own_transformer(tiny):
    encoder, (rows, columns) = tiny.encoder, TINY.grid_size
    log_mel = torch.randn(2, 1, *TINY.input_size)
    patches = nn.functional.unfold(log_mel, TINY.patch_size, stride=TINY.patch_size).transpose(1, 2)
    projection = encoder.patch_embed.proj
    with torch.no_grad():
        x = patches @ projection.weight.flatten(1).T + projection.bias + encoder.pos_embed[:, 1:]
        x = torch.cat([encoder.cls_token.expand(2, -1, -1), x], dim=1)
        for layer in torch_layers(tiny):
            x = layer(x)
        expected = encoder.norm(x)[:, 1:].view(2, rows, columns, -1)
        torch.testing.assert_close(encoder(log_mel)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/oracle")
def test_positions_agree_with_the_reference():
    expected = np.load(ORACLE / "pretrain" / "m2d" / "expected.npz")
    np.testing.assert_allclose(sincos_positions(96, (5, 4)).numpy(), expected["pos_embed"], atol=1e-6)
    np.testing.assert_allclose(sincos_positions(64, (5, 4)).numpy(), expected["decoder_pos_embed"], atol=1e-6)


def test_first_half_of_the_positions_encodes_time():
    positions = sincos_positions(8, (2, 3))[0, 1:].view(2, 3, 8)
    assert torch.equal(positions[0, :, :4], positions[1, :, :4])
    assert torch.equal(positions[:, 0, 4:], positions[:, 2, 4:])
    assert not torch.equal(positions[0, 0, :4], positions[0, 1, :4])
    assert sincos_positions(8, (2, 3))[0, 0].abs().sum() == 0


def test_shorter_input_takes_the_first_columns(tiny):
    log_mel = torch.randn(1, 1, 80, 64)
    whole, part = tiny.encoder.embed(log_mel), tiny.encoder.embed(log_mel[..., :32])
    torch.testing.assert_close(whole.view(1, 5, 4, -1)[:, :, :2], part.view(1, 5, 2, -1))


def test_layers_are_read_in_the_order_asked_for(tiny):
    log_mel = torch.randn(1, 1, 80, 64)
    every = tiny.encoder(log_mel, [0, 1, 2])
    again = tiny.encoder(log_mel, [-1, 0])
    assert torch.equal(again[0], every[2])
    assert torch.equal(again[1], every[0])
    assert torch.equal(tiny.encoder(log_mel)[0], every[2])
    assert not torch.equal(every[0], every[1])


@pytest.mark.parametrize("layers", [[], [3], [-4], [1.0]])
def test_impossible_layers_are_refused(tiny, layers):
    with pytest.raises(ConfigError, match="layer"):
        tiny.encoder(torch.randn(1, 1, 80, 64), layers)


def test_fresh_weights_follow_the_published_initialisation():
    torch.manual_seed(0)
    encoder = M2D(TINY).encoder
    weight = encoder.blocks[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert encoder.blocks[0].mlp.fc1.bias.abs().sum() == 0
    patches = encoder.patch_embed.proj.weight
    bound = (6 / (patches.shape[0] + patches[0].numel())) ** 0.5
    assert 0.9 * bound < patches.abs().max() <= bound
    assert 0.01 < encoder.cls_token.std() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_matrices_keep_a_float32_stream(dtype):
    exact, half = random_model(TINY), random_model(TINY).set_dtype(dtype)
    assert half.dtype == dtype
    assert half.encoder.norm.weight.dtype == half.encoder.patch_embed.proj.weight.dtype == torch.float32
    log_mel = torch.randn(2, 1, 80, 64)
    got, expected = half.encoder(log_mel)[0], exact.encoder(log_mel)[0]
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999
    assert not torch.equal(got, expected)
