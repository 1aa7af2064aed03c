"""The training benchmark: its count of operations, the peer it compares with, and that it runs and is rendered."""

import os
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import render, training
from benchmarks.reference_style import Attention, ExplicitAttention, MelFolder, ReferenceStyleM2D
from m2d_embed.pretrain.objectives import M2D, Example
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.recipe import ModelSection

PREDICTOR = PredictorConfig(dim=16, depth=2, num_heads=2)
SECTION = ModelSection(embed_dim=32, depth=2, num_heads=2, input_size=(80, 64), patch_size=(16, 16))
SHAPE = training.Shape("ViT-Test", SECTION, PREDICTOR, batch=2, steps=1)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return training.make_sounds(tmp_path_factory.mktemp("sounds"), 3)


@pytest.mark.parametrize("visible", [3, 12])
@pytest.mark.parametrize("config", [TINY, replace(TINY, patch_size=(80, 4), depth=1, mlp_ratio=2.0)])
def test_operations_are_those_that_pytorch_counts(config, visible):
    objective, batch = M2D(config, PREDICTOR), 3
    patches = config.grid_size[0] * config.grid_size[1]
    order = torch.rand(batch, patches).argsort(dim=1)
    example = Example(torch.randn(batch, 1, *config.input_size), order, visible)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(example)["loss"].backward()
    expected = batch * training.training_flops(config, PREDICTOR, visible)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_peer_is_of_the_same_size_and_learns():
    torch.manual_seed(0)
    peer, ours = ReferenceStyleM2D(TINY, PREDICTOR), M2D(TINY, PREDICTOR)
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (peer, ours)]
    assert count[0] == count[1]
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-3)
    log_mel, losses = torch.randn(4, 1, 80, 64), []
    for _ in range(30):
        loss = peer(log_mel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    before = peer.target_norm.weight.clone()
    peer.update_target(0.25)
    assert torch.allclose(peer.target_norm.weight, 0.25 * before + 0.75 * peer.norm.weight)


def test_peer_predicts_what_ours_does():
    """With the same weights and masks the peer's loss is ours, so both do the same work."""
    torch.manual_seed(0)
    peer, ours = ReferenceStyleM2D(TINY, PREDICTOR).eval(), M2D(TINY, PREDICTOR).eval()
    ours.init_weights()
    theirs = peer.state_dict()
    names = {"encoder.": "", "predictor.blocks": "decoder_blocks", "target.blocks": "target_blocks"}
    names |= {"target.norm": "target_norm", "predictor.norm": "decoder_norm", "predictor.embed": "decoder_embed"}
    names |= {"predictor.out": "decoder_pred", "predictor.mask_token": "mask_token", "patch_embed.proj": "patch_embed"}
    names |= {"predictor.pos_embed": "decoder_pos_embed", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for name, tensor in ours.state_dict().items():
        for ours_part, peers_part in names.items():
            name = name.replace(ours_part, peers_part)
        theirs[name].copy_(tensor[:, 1:] if name == "pos_embed" else tensor)
    log_mel = torch.randn(2, 1, 80, 64)
    torch.manual_seed(1)
    order = torch.rand(2, 20).argsort(dim=1)
    torch.manual_seed(1)
    loss = peer(log_mel)
    assert torch.allclose(loss, ours(Example(log_mel, order, peer.visible))["loss"], atol=1e-5)


def test_explicit_attention_is_the_fused_one():
    fused, explicit = Attention(16, 2), ExplicitAttention(16, 2)
    explicit.load_state_dict(fused.state_dict())
    x = torch.randn(2, 7, 16)
    assert torch.allclose(fused(x), explicit(x), atol=1e-6)


def test_peer_reads_crops_of_whole_log_mels(sounds):
    crops = MelFolder(sounds.mels, SHAPE.config)
    assert crops[0].shape == (1, 80, 64)
    assert crops[0].dtype == torch.float32
    assert not torch.equal(crops[0], crops[3])  # another crop of the same file
    assert abs(float(crops[0].mean())) < 2


def test_contestants_run_and_are_rendered(sounds):
    with training.training_on("cpu") as device:
        compared = training.compare(SHAPE, sounds, training.Place(device), rounds=2)
    rows = compared["loops"]
    assert [row["loop"] for row in rows] == [
        "reference style, fp32",
        "m2d-embed, fp32",
        "m2d-embed, bf16",
        "m2d-embed, bf16, from audio files",
    ]
    for row in rows:
        assert row["clips per second"] > 0
        assert 0 <= row["data share"] < 1
        assert len(row["rounds"]) == 2
    result = {
        "command": "python -m benchmarks.training",
        "machine": training.machine(),
        "data": "3 clips of 10 s",
        "matrix products, GFLOP/s": {"float32": 100.0, "bfloat16": 190.0},
        "models": {SHAPE.name: compared},
    }
    table = render.training_table(result)
    assert "| ViT-Test, batch 2 | m2d-embed, bf16 |" in table
    assert "x1.9." in table
    for row in rows:
        row |= {"utilisation": 0.4, "peak memory, GiB": 1.5}
    on_gpu = {**result, "gpu": "A GPU", "data workers": 8, "bf16 products, TFLOP/s": 790.0}
    assert "| 40.0% | 1.5 GiB |" in render.gpu_training_table(on_gpu)


def test_precisions_are_those_of_the_recipes(sounds):
    """Two runs live side by side in one process: the later must not change the earlier's precision."""
    with training.training_on("cpu") as device:
        built = training.contestants(SHAPE, sounds, training.Place(device, workers=0))
        exact, half = built[training.EXACT](), built[training.HALF]()
    log_mel, order = torch.randn(2, 1, 80, 64), torch.rand(2, 20).argsort(dim=1)
    seen = []
    for contestant in (exact, half):
        linear = contestant.trainer.task.network.encoder.blocks[0].attn.qkv
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        contestant.trainer.task.model(Example(log_mel, order, 6))
    assert seen == [torch.float32, torch.bfloat16]


def test_the_device_is_the_cpu_where_that_is_measured(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with training.training_on("cpu"):
        assert Accelerator().device.type == "cpu"
        assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in os.environ
