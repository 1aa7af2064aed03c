"""The classification head: AudioSet's labels in the published order, and logits computed by hand."""

import copy
import csv
from dataclasses import replace

import pytest
import torch
from conftest import SHARED, TINY, random_model
from published import (
    FINE_TUNED,
    NAME,
    draw,
    encoder_state,
    head_state,
    log_mel,
    patch_features,
    save,
    under,
)

from m2d_embed.checkpoints.layouts import convert, read_checkpoint
from m2d_embed.config import HeadConfig
from m2d_embed.errors import UnsupportedError
from m2d_embed.m2d import M2D
from m2d_embed.model.heads.tagging import Tag, TaggingHead, audioset_labels

# --- labels ------------------------------------------------------------------------------------------------------


def test_527_labels_in_the_order_of_their_mids():
    labels = audioset_labels()
    assert len(labels) == len(set(labels)) == 527
    # mids /g/122z_qxw, /m/04rlf, /m/09x0r, /m/0bt9lr, /t/dd00136; in AudioSet's own order Speech is the first
    spots = {0: "Firecracker", 191: "Music", 405: "Speech", 413: "Dog", 526: "Whimper (dog)"}
    assert {index: labels[index] for index in spots} == spots


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_labels_are_those_of_the_published_list():
    with (SHARED / "data" / "audioset_labels.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    by_mid = {mid: label for _, mid, label in rows}
    assert audioset_labels() == tuple(by_mid[mid] for mid in sorted(by_mid))
    by_index = tuple(label for _, _, label in rows)
    assert audioset_labels() != by_index
    assert by_index[0] == "Speech"


# --- logits ------------------------------------------------------------------------------------------------------


def by_hand(state, features):
    """BatchNorm without affine by its running statistics, eps 1e-5, then Linear; in float64."""
    state = {name.removeprefix("module.head."): tensor.double() for name, tensor in state.items()}
    normalised = (features.double() - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt()
    return normalised @ state["mlp.mlp.0.weight"].T + state["mlp.mlp.0.bias"]


def fine_tuned(width: int, outputs: int = 527, **encoder) -> dict[str, torch.Tensor]:
    return under(FINE_TUNED, encoder_state(**encoder)) | head_state(width, outputs)


@pytest.mark.parametrize("kind, width", [("stacked", 960), ("flat", 192)])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_fine_tuned_head_on_stacked_and_flat_features(kind, width, wrap, tmp_path, noise):
    model = M2D.from_pretrained(save(tmp_path, wrap(fine_tuned(width))))
    assert model.config.head == HeadConfig(audioset_labels(), kind, multi_label=True)
    patches = patch_features(encoder_state(), (log_mel(noise(0.63, batch=2)) - -7.1) / 4.2)  # (2, 5, 4, 192)
    scene = patches.mean(dim=(1, 2)) if kind == "flat" else patches.mean(dim=2).flatten(1)
    with torch.no_grad():
        logits = model.logits(noise(0.63, batch=2))
    assert (logits.shape, logits.dtype) == ((2, 527), torch.float32)
    assert (logits - by_hand(head_state(width), scene)).abs().max() < 5e-4


def test_head_of_a_model_with_one_row_of_patches(tmp_path, noise):
    state = fine_tuned(192, patch=(80, 2), patches=32)
    model = M2D.from_pretrained(save(tmp_path, state, "m2d_s_vit_tiny-80x64p80x2-990101"))
    with torch.no_grad():
        logits = model.logits(noise(0.63))
        assert (logits - by_hand(head_state(192), model.scene(noise(0.63)))).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["module.head.", "head."])
@pytest.mark.parametrize("batches", ["number", "float", None])
def test_variants_of_the_head_in_the_file(prefix, batches, tmp_path):
    head = head_state(960)
    count = head.pop("module.head.norm.num_batches_tracked")
    if batches:
        head["module.head.norm.num_batches_tracked"] = count.float() if batches == "float" else count
    state = under("module.", encoder_state()) | {
        name.replace("module.head.", prefix): tensor for name, tensor in head.items()
    }
    file = save(tmp_path, state)
    assert read_checkpoint(file).tensors["head.norm.num_batches_tracked"].dtype == torch.int64
    model = M2D.from_pretrained(file)
    assert torch.equal(model.head.linear.weight, head_state(960)["module.head.mlp.mlp.0.weight"])
    assert torch.equal(model.head.norm.running_var, head_state(960)["module.head.norm.running_var"])
    assert model.head.norm.num_batches_tracked.item() == (7 if batches else 0)


def test_other_tasks_have_numbered_labels(tmp_path):
    model = M2D.from_pretrained(save(tmp_path, fine_tuned(960, outputs=3)))
    assert model.config.head.labels == ("class_0", "class_1", "class_2")


def test_head_survives_conversion(tmp_path, noise):
    file = save(tmp_path, fine_tuned(192))
    convert(file, tmp_path / "out", [torch.bfloat16])
    before, after = M2D.from_pretrained(file), M2D.from_pretrained(tmp_path / "out")
    assert after.config == before.config
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    with torch.no_grad():
        assert (after.logits(noise(1.0)) - before.logits(noise(1.0))).abs().max() < 1e-5
    half = M2D.from_pretrained(tmp_path / "out", dtype="bf16")
    assert half.head.linear.weight.dtype == torch.float32
    assert half.logits(noise(1.0)).dtype == torch.float32


# --- the head itself ---------------------------------------------------------------------------------------------


def tagger(features="stacked", labels=("a", "b", "c"), multi_label=True):
    config = TINY.__class__(**{**TINY.__dict__, "head": HeadConfig(labels, features, multi_label)})
    model = random_model(config)
    model.head.norm.running_mean.copy_(draw(model.head.norm.running_mean.shape, 1))
    model.head.norm.running_var.copy_(1 + draw(model.head.norm.running_var.shape, 2).abs())
    return model


@pytest.mark.parametrize("features", ["stacked", "flat"])
def test_the_head_is_linear_so_columns_average_to_the_clip(features, noise):
    model = tagger(features)
    with torch.no_grad():
        clip, columns = model.logits(noise(1.5, batch=2)), model.frame_logits(noise(1.5, batch=2))
    assert clip.shape == (2, 3)
    assert columns.shape == (2, 9, 3)
    assert (columns.mean(dim=1) - clip).abs().max() < 1e-5
    assert (columns - clip[:, None]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8)])
def test_any_leading_dimensions(shape):
    head = TaggingHead(8, HeadConfig(("a", "b"))).eval()
    head.norm.running_mean.copy_(draw((8,), 1))
    head.norm.running_var.copy_(1 + draw((8,), 2).abs())
    x = draw(shape, 3)
    weight, bias = head.linear.weight.double(), head.linear.bias.double()
    expected = ((x.double() - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt()) @ weight.T + bias
    assert head(x).shape == (*shape[:-1], 2)
    assert torch.allclose(head(x).double(), expected, atol=1e-5)
    assert torch.allclose(head(x.half()), head(x), atol=1e-2)


def test_transposed_features():
    head = TaggingHead(8, HeadConfig(("a", "b"))).eval()
    x = draw((8, 3, 2), 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.equal(head(x), head(x.contiguous()))


def test_probabilities():
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    multi = TaggingHead(4, HeadConfig(("a", "b", "c"))).probabilities(logits)
    single = TaggingHead(4, HeadConfig(("a", "b", "c"), multi_label=False)).probabilities(logits)
    assert torch.allclose(multi, torch.tensor([[0.5, 0.880797, 0.268941]]), atol=1e-6)
    assert torch.allclose(single, torch.tensor([[0.114195, 0.843795, 0.042010]]), atol=1e-6)


@pytest.mark.parametrize("multi_label", [True, False])
def test_top_tags_come_best_first(multi_label):
    head = TaggingHead(4, HeadConfig(("a", "b", "c", "d"), multi_label=multi_label))
    logits = torch.tensor([0.5, -3.0, 2.0, 1.0])
    scores = head.probabilities(logits)
    tags = head.top_tags(logits, 3)
    assert tags == [Tag("c", scores[2].item()), Tag("d", scores[3].item()), Tag("a", scores[0].item())]
    assert [tag.label for tag in head.top_tags(logits, 100)] == ["c", "d", "a", "b"]
    assert head.top_tags(logits, 0) == []


def test_tagging_without_a_head(tiny, noise):
    for method in (tiny.logits, tiny.frame_logits):
        with pytest.raises(UnsupportedError, match="has no tagging head; take a fine-tuned checkpoint"):
            method(noise(0.5))


def test_published_name_is_kept(tmp_path):
    assert M2D.from_pretrained(save(tmp_path, fine_tuned(960))).config.name == NAME


@pytest.mark.parametrize("pooling, scenes", [("mean", "mean_std"), ("mean_std", "mean"), ("mean_std", "mean_std")])
def test_a_head_takes_what_it_was_trained_on_whatever_scene_embeddings_are(pooling, scenes, noise):
    head = HeadConfig(("a", "b"), scene_pooling=pooling)
    model = random_model(replace(TINY, scene_pooling=scenes, head=head))
    audio = noise(0.9, batch=2)
    with torch.no_grad():
        frames = model.patches(audio).transpose(1, 2).flatten(2)  # (B, T, F * d)
        scene = torch.cat([frames.mean(1), frames.std(1, correction=0)], -1)[:, : model.config.head_dim]
        expected = model.tagging_head()(scene)
        torch.testing.assert_close(model.logits(audio), expected, rtol=1e-4, atol=1e-4)
        model.features = model.head_features()
        torch.testing.assert_close(model.tagging_head()(model.scene(audio)), expected, rtol=1e-4, atol=1e-4)


def test_a_head_of_standard_deviations_judges_no_single_column(noise):
    model = random_model(replace(TINY, name="barks", head=HeadConfig(("a", "b"), scene_pooling="mean_std")))
    with pytest.raises(UnsupportedError, match=r"head of barks takes standard deviations.*scene_pooling=mean"):
        model.frame_logits(noise(0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_learns_the_statistics(dtype):
    """They are kept in float32: in half precision, steps of a tenth of what is left would end far from the mean."""
    head = TaggingHead(8, HeadConfig(("a", "b"))).to(dtype).train()
    assert head.norm.running_mean.dtype == head.norm.running_var.dtype == torch.float32
    assert head.linear.weight.dtype == dtype
    features = 100 + 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        head(features)
    torch.testing.assert_close(head.norm.running_mean, features.mean(0))
    torch.testing.assert_close(head.norm.running_var, features.var(0))
    assert head.norm.num_batches_tracked == 200
    head.eval()
    assert torch.equal(head(features), head(features))


def test_statistics_keep_every_digit_when_a_model_is_cast(noise):
    model = random_model(replace(TINY, head=HeadConfig(("a", "b"))))
    mean = torch.randn(model.config.head_dim)
    model.head.norm.running_mean.copy_(mean)
    for cast in (model.half(), model.bfloat16(), model.to(torch.float16), copy.deepcopy(model).float()):
        assert torch.equal(cast.head.norm.running_mean, mean)
        assert cast.head.norm.num_batches_tracked.dtype == torch.long
    assert torch.isfinite(model.float().eval().logits(noise(0.5))).all()


def test_a_head_without_memory_gets_it():
    with torch.device("meta"):
        head = TaggingHead(8, HeadConfig(("a", "b"))).half()
    assert head.to_empty(device="cpu").norm.running_var.device.type == "cpu"
