"""What training code asks of a model: a head for its labels, drop path, gradient checkpointing, no weight decay."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model

from m2d_embed.config import HeadConfig
from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.finetune.optim import layer_groups
from m2d_embed.m2d import M2D
from m2d_embed.model.encoder import Block
from m2d_embed.pretrain import objectives
from m2d_embed.pretrain.predictor import PredictorConfig

LABELS = ("dog", "cat", "rain")


@pytest.fixture
def model():
    return random_model(dataclasses.replace(TINY, depth=3))


@pytest.fixture
def log_mel():
    return torch.randn(6, 1, 80, 64, generator=torch.Generator().manual_seed(0))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_for_labels_of_ones_own(model, log_mel, tmp_path):
    with pytest.raises(UnsupportedError):
        model.logits(log_mel)
    assert model.with_head(LABELS) is model
    assert model.config.head == HeadConfig(LABELS, "stacked", False, "mean")
    assert not model.head.training
    with torch.no_grad():
        logits = model.logits(log_mel)
        assert logits.shape == (6, 3)
        assert model.frame_logits(log_mel).shape == (6, 4, 3)
    assert 0 < model.head.linear.weight.std() < 0.03
    model.save_pretrained(tmp_path / "model")
    again = M2D.from_pretrained(tmp_path / "model", device="cpu")
    assert again.config.head == model.config.head
    with torch.no_grad():
        torch.testing.assert_close(again.logits(log_mel), logits)


@pytest.mark.parametrize(
    "features, pooling, width", [("flat", "mean", 1), ("flat", "mean_std", 2), ("stacked", None, 10)]
)
def test_a_head_is_as_wide_as_its_features(features, pooling, width, log_mel):
    model = random_model(dataclasses.replace(TINY, scene_pooling="mean_std"))
    model.with_head(iter(LABELS), multi_label=True, features=features, scene_pooling=pooling)
    assert model.head.linear.in_features == width * TINY.embed_dim
    assert model.config.head.scene_pooling == (pooling or "mean_std")
    assert model.head.probabilities(model.logits(log_mel)).sum(dim=1).max() > 1.1  # sigmoids


def test_another_head_takes_the_place_of_the_first(model, log_mel):
    model.with_head(LABELS).train()
    first = model.head
    model.with_head(["a", "b"])
    assert model.head is not first
    assert model.head.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    targets = torch.tensor([0, 1, 0, 1, 0, 1])
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model.logits(log_mel), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("labels", [(), "dog", ("dog", "dog")])
def test_labels_that_are_none(model, labels):
    with pytest.raises(ConfigError, match="one or more different names"):
        model.with_head(labels)


# --- drop path --------------------------------------------------------------------------------------------------------


def test_drop_path_rises_linearly_over_the_blocks(model):
    model.set_drop_path(0.2)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0.0, 0.1, 0.2])
    single = M2D(dataclasses.replace(TINY, depth=1))
    single.set_drop_path(0.5)
    assert single.encoder.blocks[0].drop_path == 0.0
    for rate in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="drop_path"):
            model.set_drop_path(rate)


def test_drop_path_leaves_whole_branches_out_and_keeps_their_mean():
    torch.manual_seed(0)
    block = Block(8, 2, 16, 1e-6).train()
    x = torch.randn(1, 3, 8).expand(4000, -1, -1)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
        branch = block(x)[0] - x[0]
        block.drop_path = 0.25
        dropped = block(x) - x
    scales = (dropped / branch).flatten(1)
    torch.testing.assert_close(scales, scales[:, :1].expand_as(scales), rtol=1e-3, atol=1e-3)  # one draw a clip
    kept = scales[:, 0] > 0.5
    torch.testing.assert_close(scales[kept, 0], torch.full((int(kept.sum()),), 4 / 3), rtol=1e-3, atol=1e-3)
    assert scales[~kept].abs().max() < 1e-5
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)


def test_drop_path_is_off_by_default_and_in_inference(model, log_mel):
    with torch.no_grad():
        plain = model.eval().scene(log_mel)
        first, second = (model.train().encoder(log_mel)[0] for _ in range(2))
        assert torch.equal(first, second)
        model.set_drop_path(0.9)
        assert not torch.equal(model.encoder(log_mel)[0], model.encoder(log_mel)[0])
        assert torch.equal(model.eval().scene(log_mel), plain)
    torch.testing.assert_close(
        model.scene(log_mel), plain, rtol=1e-4, atol=1e-5
    )  # with gradients: the blocks themselves


def test_the_target_network_drops_nothing():
    objective = objectives.M2D(TINY, PredictorConfig(16, 1, 2))
    objective.encoder.set_drop_path(0.5)
    assert {block.drop_path for block in objective.target.blocks} == {0.0}


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointed_gradients_are_the_same_with_less_kept(model, log_mel, drop_path):
    model.train().set_drop_path(drop_path)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.encode_frames(log_mel).square().mean()
        model.zero_grad()
        loss.backward()
        found.append((kept, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert found[1][0] < found[0][0] / 3
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(found[1][1][name], gradient), name


def test_checkpointing_leaves_inference_alone(model, log_mel):
    model.eval()
    with torch.no_grad():
        before = model.scene(log_mel)
        model.set_grad_checkpointing()
        assert torch.equal(model.scene(log_mel), before)
    model.set_grad_checkpointing(False)
    assert not model.encoder.grad_checkpointing


# --- weight decay -----------------------------------------------------------------------------------------------------


def test_tokens_and_positions_are_not_to_be_decayed(model):
    assert model.encoder.no_weight_decay() == {"cls_token", "pos_embed"}
    assert model.no_weight_decay() <= model.state_dict().keys()
    model.with_head(LABELS)
    for group in layer_groups(model, 1e-3, 0.75, 0.05):
        for name, parameter in model.named_parameters():
            if any(parameter is p for p in group["params"]):
                exempt = parameter.ndim < 2 or name in model.no_weight_decay()
                assert group["weight_decay"] == (0.0 if exempt else 0.05), name
