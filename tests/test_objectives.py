"""Objectives against the reference numbers, and what sets each apart."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ORACLE, OracleCase

from m2d_embed.config import ClapConfig, ModelConfig
from m2d_embed.model.encoder import sincos_positions
from m2d_embed.pretrain import objectives
from m2d_embed.pretrain.objectives import Example
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.warm_start import our_names

PRETRAIN = ORACLE / "pretrain"
CASES = sorted(p.name for p in PRETRAIN.iterdir()) if PRETRAIN.exists() else []

CONFIG = ModelConfig(embed_dim=32, depth=2, num_heads=2, input_size=(80, 64), patch_size=(16, 16))
PREDICTOR = PredictorConfig(dim=16, depth=1, num_heads=2)
PATCHES = 20
CLAP = ClapConfig("mlp", (32, 24, 24), (12, 24), "none", "mean")


def build(case: OracleCase) -> objectives.Objective:
    info = case.info
    config = ModelConfig(
        embed_dim=info["embed_dim"],
        depth=info["depth"],
        num_heads=info["num_heads"],
        input_size=tuple(info["input_size"]),
        patch_size=tuple(info["patch_size"]),
        norm_eps=info["norm_eps"],
    )
    predictor = PredictorConfig(
        info["decoder_embed_dim"], info["decoder_depth"], info["decoder_num_heads"], info["mlp_ratio"]
    )
    layout = json.loads((case.folder / "layout.json").read_text())
    if "off_emb_dim" in info:
        per_column = len(case.expected["offline_target"].shape) == 3
        kind = objectives.M2DX if per_column else objectives.M2DAS
        objective = kind(config, predictor, info["off_emb_dim"], (info.get("loss_m2d", 1.0), info["loss_off"]))
    elif any(name.startswith("target_blocks") for name in layout):
        objective = objectives.M2D(config, predictor)
    else:
        objective = objectives.MSMMAE(config, predictor)
    tensors = our_names(case.state_dict())
    missing, unexpected = objective.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) == {"encoder.pos_embed", "predictor.pos_embed"}
    return objective


def example_of(case: OracleCase) -> Example:
    expected = case.expected
    offline = torch.from_numpy(expected["offline_target"]) if "offline_target" in expected.files else None
    order = torch.from_numpy(expected["ids_shuffle"])
    return Example(torch.from_numpy(expected["input"]), order, int(expected["len_keep"]), offline)


@pytest.mark.skipif(not CASES, reason="needs ../shared/oracle/pretrain")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    case = OracleCase(PRETRAIN / name)
    expected, objective, example = case.expected, build(case), example_of(case)
    for mine, theirs in (("encoder", "pos_embed"), ("predictor", "decoder_pos_embed")):
        torch.testing.assert_close(getattr(objective, mine).pos_embed, torch.from_numpy(expected[theirs]))

    outputs = objective(example)
    outputs["loss"].backward()

    close = {"rtol": 0, "atol": 1e-5}
    for key in ("loss", "loss_online", "loss_offline"):
        if key in expected.files:
            assert float(outputs[key.replace("_", "/")].detach()) == pytest.approx(float(expected[key]), abs=1e-5)
    for key in ("target", "latent"):
        if key in expected.files:
            torch.testing.assert_close(outputs[key].detach(), torch.from_numpy(expected[key]), **close)
    prediction = torch.from_numpy(expected["prediction"])
    if prediction.shape[1] == example.order.shape[1]:  # of all patches, in place
        prediction = objectives.take(prediction, example.order[:, example.visible :])
    torch.testing.assert_close(outputs["prediction"].detach(), prediction, **close)

    parameters = dict(objective.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.grad is not None}
    gradients = {next(iter(our_names({str(n): torch.empty(0)}))): n for n in expected["grad_names"]}
    assert trained == set(gradients)
    for norm, mine in zip(expected["grad_norms"], gradients, strict=True):
        assert float(parameters[mine].grad.norm()) == pytest.approx(norm, rel=1e-4)
    for key in [key for key in expected.files if key.startswith("grad:")]:
        [mine] = our_names({key.removeprefix("grad:"): torch.empty(0)})
        wanted = torch.from_numpy(expected[key])
        assert (parameters[mine].grad - wanted).norm() < 1e-4 * wanted.norm()

    if "ema_decay" in expected.files:
        objective.update_target(float(expected["ema_decay"]))
        for key in [key for key in expected.files if key.startswith("target_after_ema:")]:
            [mine] = our_names({key.partition(":")[2]: torch.empty(0)})
            torch.testing.assert_close(parameters[mine].detach(), torch.from_numpy(expected[key]))


def make(kind, *arguments):
    torch.manual_seed(0)
    objective = kind(CONFIG, PREDICTOR, *arguments)
    objective.init_weights()
    return objective


def make_example(batch=4, offline=None, visible=6):
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(PATCHES, generator=generator) for _ in range(batch)])
    return Example(torch.randn(batch, 1, 80, 64, generator=generator), order, visible, offline)


EVERY = {
    "m2d": (objectives.M2D, (), None),
    "data2vec": (objectives.Data2Vec, (), None),
    "msm_mae": (objectives.MSMMAE, (), None),
    "salt": (objectives.SALT, (32,), torch.randn(4, PATCHES, 32)),
    "msm_mae_s": (objectives.MSMMAES, (40, (1.0, 0.5)), torch.randn(4, 4, 40)),
    "m2d_x": (objectives.M2DX, (40, (1.0, 1.0)), torch.randn(4, 4, 40)),
    "m2d_s": (objectives.M2DS, (40, (1.0, 1.0)), torch.randn(4, 4, 40)),
    "m2d_as": (objectives.M2DAS, (7, (1.0, 0.5)), torch.eye(7)[:4]),
    "m2d_clap": (objectives.M2DCLAP, (CLAP, (1.0, 1.0)), torch.randn(4, 12)),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_few_steps_lower_the_loss_and_leave_nothing_out(name):
    kind, arguments, offline = EVERY[name]
    objective, example = make(kind, *arguments), make_example(offline=offline)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    first = float(objective(example)["loss"].detach())
    for _ in range(40):
        loss = objective(example)["loss"]
        loss.backward()
        unused = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.9 * first


@pytest.mark.parametrize("name", EVERY)
def test_outputs_are_of_the_masked_patches(name):
    kind, arguments, offline = EVERY[name]
    outputs = make(kind, *arguments)(make_example(offline=offline))
    width = 256 if name.startswith("msm_mae") else 32
    assert outputs["prediction"].shape == outputs["target"].shape == (4, PATCHES - 6, width)
    assert outputs["latent"].shape == (4, 1 + 6, 32)
    assert not outputs["target"].requires_grad
    parts = [outputs[k] for k in outputs if k.startswith("loss/")]
    if parts:
        weights = arguments[-1]
        torch.testing.assert_close(outputs["loss"], weights[0] * parts[0] + weights[1] * parts[1])


@pytest.mark.parametrize("name", EVERY)
def test_a_clip_does_not_depend_on_the_order_in_which_its_patches_are_listed(name):
    kind, arguments, offline = EVERY[name]
    objective, example = make(kind, *arguments), make_example(offline=offline)
    visible, masked = objectives.split(example)
    reordered = Example(example.log_mel, torch.cat([visible.flip(1), masked.flip(1)], 1), example.visible, offline)
    torch.testing.assert_close(objective(example)["loss"], objective(reordered)["loss"])


def test_target_of_m2d_does_not_see_the_visible_patches_and_that_of_data2vec_does():
    example = make_example()
    changed = Example(example.log_mel.clone(), example.order, example.visible)
    for clip, patch in enumerate(example.order[:, 0].tolist()):
        row, column = divmod(patch, 4)
        changed.log_mel[clip, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 5
    m2d, data2vec = make(objectives.M2D), make(objectives.Data2Vec)
    assert torch.equal(m2d(example)["target"], m2d(changed)["target"])
    assert not torch.allclose(data2vec(example)["target"], data2vec(changed)["target"], atol=1e-3)


def test_prediction_does_not_see_the_masked_patches():
    example = make_example()
    changed = Example(example.log_mel.clone(), example.order, example.visible)
    for clip, patch in enumerate(example.order[:, -1].tolist()):
        row, column = divmod(patch, 4)
        changed.log_mel[clip, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 5
    for kind in (objectives.M2D, objectives.Data2Vec, objectives.MSMMAE):
        objective = make(kind)
        assert torch.equal(objective(example)["prediction"], objective(changed)["prediction"])


def test_salt_learns_the_latents_of_masked_patches():
    latents = torch.randn(4, PATCHES, 24)
    example = make_example(offline=latents)
    outputs = make(objectives.SALT, 24)(example)
    for clip, masked in enumerate(example.order[:, 6:].tolist()):
        assert torch.equal(outputs["target"][clip], latents[clip, masked])


def test_target_follows_the_encoder():
    objective = make(objectives.M2D)
    online = objective.encoder.blocks[0].attn.qkv.weight
    before = objective.target.blocks[0].attn.qkv.weight.clone()
    assert torch.equal(before, online)  # it starts as a copy
    with torch.no_grad():
        online += 1
    objective.update_target(0.75)
    torch.testing.assert_close(objective.target.blocks[0].attn.qkv.weight, before + 0.25)
    objective.update_target(1.0)
    torch.testing.assert_close(objective.target.blocks[0].attn.qkv.weight, before + 0.25)
    objective.reset_target()
    assert torch.equal(objective.target.blocks[0].attn.qkv.weight, online)


def test_patch_pixels_are_the_patches_the_encoder_sees():
    log_mel = torch.randn(2, 1, 80, 70)  # the last 6 frames make no patch
    pixels = objectives.patch_pixels(log_mel, (16, 16))
    assert pixels.shape == (2, PATCHES, 256)
    projection = make(objectives.M2D).encoder.patch_embed.proj
    embedded = pixels @ projection.weight.flatten(1).T + projection.bias
    torch.testing.assert_close(embedded, projection(log_mel).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_columns_are_put_back_in_place():
    patches = torch.arange(PATCHES).float().view(1, PATCHES, 1).expand(2, -1, 32)
    example = make_example(batch=2)
    visible, masked = objectives.split(example)
    latent, filled_in = objectives.take(patches, visible), objectives.take(patches, masked)
    columns = objectives.stack_columns(example.order, latent, filled_in, (5, 4))
    assert columns.shape == (2, 4, 5 * 32)
    wanted = torch.tensor([[f * 4 + t for f in range(5)] for t in range(4)]).float()
    assert torch.equal(columns[0].view(4, 5, 32)[..., 0], wanted)


def test_msm_mae_s_adds_to_the_loss_of_msm_mae_what_latents_tell_of_the_teacher():
    offline = torch.randn(4, 4, 40)
    objective, example = make(objectives.MSMMAES, 40, (2.0, 0.25)), make_example(offline=offline)
    plain = make(objectives.MSMMAE)
    tensors = {k: v for k, v in objective.state_dict().items() if not k.startswith(("offline", "predictor.out"))}
    tensors |= {f"predictor.out.{k}": v[:256] for k, v in objective.predictor.out.state_dict().items()}
    plain.load_state_dict(tensors)
    outputs, expected = objective(example), plain(example)
    torch.testing.assert_close(outputs["loss/online"], expected["loss"])
    torch.testing.assert_close(outputs["prediction"], expected["prediction"])
    torch.testing.assert_close(outputs["loss"], 2 * outputs["loss/online"] + 0.25 * outputs["loss/offline"])
    perfect = objective.offline(
        objectives.stack_columns(
            example.order,
            outputs["latent"][:, 1:],
            objective.predictor(outputs["latent"], *objectives.split(example))[..., 256:],
            (5, 4),
        )
    ).detach()
    known = objective(make_example(offline=perfect))
    assert float(known["loss/offline"].detach()) < 0.1 < float(outputs["loss/offline"].detach())


def test_cosine_loss_is_zero_for_any_scale_and_shift_of_the_target():
    target = torch.randn(3, 5, 64)
    assert float(objectives.cosine_loss(objectives.standardize(target) * 7, target * 3 + 2)) == pytest.approx(
        0, abs=1e-4
    )
    assert float(objectives.cosine_loss(-objectives.standardize(target), target)) == pytest.approx(4, abs=1e-4)


def test_text_and_audio_of_a_clip_attract():
    objective = make(objectives.M2DCLAP, CLAP, (0.0, 1.0))
    assert float(objective.clap.logit_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-3)
    example = make_example(offline=torch.randn(4, 12))
    outputs = objective(example)
    audio = F.normalize(objective.clap.project_audio(outputs["latent"][:, 1:]), dim=-1)
    text = F.normalize(objective.clap.project_text(example.offline), dim=-1)
    logits = audio @ text.T / 0.07
    wanted = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(outputs["loss"], wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        objective.clap.logit_scale.fill_(math.log(1e6))
    assert objective.clap.similarity(audio, text).abs().max() <= 100.001


def test_an_objective_without_its_offline_target_says_so():
    with pytest.raises(ValueError, match="offline"):
        make(objectives.M2DAS, 7, (1.0, 1.0))(make_example())


def test_other_patch_shapes():
    for patch in ((80, 2), (16, 4), (20, 16)):
        config = ModelConfig(embed_dim=32, depth=1, num_heads=2, input_size=(80, 32), patch_size=patch)
        rows, columns = config.grid_size
        count = rows * columns
        for kind in (objectives.M2D, objectives.MSMMAE):
            objective = kind(config, PREDICTOR)
            objective.init_weights()
            order = torch.stack([torch.randperm(count) for _ in range(2)])
            outputs = objective(Example(torch.randn(2, 1, 80, 32), order, count // 3))
            assert outputs["prediction"].shape[1] == count - count // 3
        assert torch.equal(objective.predictor.pos_embed, sincos_positions(16, (rows, columns)))
