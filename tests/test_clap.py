"""M2D-CLAP: both kinds of audio projector and the text projector computed by hand; texts through a tiny BERT."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY, WORDS, random_model
from published import (
    FINE_TUNED,
    affine,
    draw,
    encoder_state,
    head_state,
    linear_state,
    log_mel,
    patch_features,
    save,
    semantic_projection,
    semantic_state,
    under,
)
from safetensors.torch import load_file

from m2d_embed.checkpoints.layouts import convert, read_checkpoint
from m2d_embed.config import ClapConfig
from m2d_embed.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from m2d_embed.m2d import M2D
from m2d_embed.model.heads.clap import ClapHead, SemanticProjector, TextEncoder

NAME = "m2d_clap_vit_tiny-80x64p16x16-990101"

AUDIO_MLP = linear_state("audio_proj.0", 192, 96, 70) | linear_state("audio_proj.2", 96, 48, 72)
TEXT_LINEAR = linear_state("text_proj", 32, 48, 74)
TEXT_MLP = linear_state("text_proj.0", 32, 40, 76) | linear_state("text_proj.2", 40, 48, 78)
SCALE = {"logit_scale": torch.tensor(3.1)}


def flat_features(audio):
    """(B, N, d), computed by hand."""
    return patch_features(encoder_state(), (log_mel(audio) - -7.1) / 4.2).flatten(1, 2)


def mlp(x, state, prefix):
    return affine(affine(x.double(), state, f"{prefix}.0").relu(), state, f"{prefix}.2")


# --- audio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("clap_prefix", ["", "backbone."])
def test_mlp_projector(prefix, clap_prefix, tmp_path, noise):
    state = under(prefix, encoder_state()) | under(clap_prefix, AUDIO_MLP | TEXT_LINEAR | SCALE)
    checkpoint = read_checkpoint(save(tmp_path, {"model": state}, NAME))
    assert checkpoint.config.clap == ClapConfig("mlp", (192, 96, 48), (32, 48), "thenlper/gte-base", "mean")
    assert checkpoint.unused == []
    model = M2D.from_pretrained(tmp_path / NAME)
    audio = noise(0.63, batch=2)
    expected = mlp(flat_features(audio).mean(dim=1), AUDIO_MLP, "audio_proj")
    with torch.no_grad():
        projected = model.encode_audio_clap(audio)
    assert (projected.shape, projected.dtype) == ((2, 48), torch.float32)
    assert (projected - expected).abs().max() < 1e-4
    assert model.clap.logit_scale.item() == pytest.approx(3.1)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_semantic_projector(depth, prefix, tmp_path, noise):
    projector = semantic_state(192, depth)
    state = under(prefix, encoder_state()) | projector | linear_state("text_proj", 32, 192, 74) | SCALE
    model = M2D.from_pretrained(save(tmp_path, state, NAME))
    assert model.config.clap == ClapConfig(
        "semantic", (192,), (32, 192), "thenlper/gte-base", "mean", depth, 192 if depth <= 2 else 384
    )
    audio = noise(0.63, batch=2)
    with torch.no_grad():
        projected = model.encode_audio_clap(audio)
    assert projected.shape == (2, 192)
    assert (projected - semantic_projection(projector, flat_features(audio))).abs().max() < 1e-4


def test_semantic_projector_norms_have_an_eps_of_1e_5():
    state = semantic_state(16, 2) | {"audio_proj.sem_token": draw((1, 1, 16), 1, 1e-3)}
    projector = SemanticProjector(16, depth=2, mlp_dim=16)
    projector.load_state_dict({name.removeprefix("audio_proj."): tensor for name, tensor in state.items()})
    quiet = draw((3, 6, 16), 2, 1e-3)  # a variance of 1e-6, so that the eps tells
    with torch.no_grad():
        assert (projector(quiet) - semantic_projection(state, quiet)).abs().max() < 1e-4


def test_semantic_projector_sees_all_windows_of_a_long_clip(tmp_path, noise):
    projector = semantic_state(192, 1)
    model = M2D.from_pretrained(save(tmp_path, encoder_state() | projector | TEXT_LINEAR | SCALE, NAME))
    audio = noise(1.8)  # 181 frames: two windows of 64 and one of 53, its last patch padded
    normalised = torch.nn.functional.pad((log_mel(audio) - -7.1) / 4.2, (0, 192 - 181))
    flat = torch.cat([patch_features(encoder_state(), part).flatten(1, 2) for part in normalised.split(64, -1)], dim=1)
    columns = 4 + 4 + 3  # the last column has 5 frames of 16 and is not kept
    kept = torch.cat([flat[:, :40], flat[:, 40:].view(1, 5, 4, 192)[:, :, :3].flatten(1, 2)], dim=1)
    with torch.no_grad():
        assert model.patches(audio).shape == (1, 5, columns, 192)
        assert (model.encode_audio_clap(audio) - semantic_projection(projector, kept)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "kind, text_state, layers",
    [("linear", TEXT_LINEAR, (32, 48)), ("mlp", TEXT_MLP, (32, 40, 48))],
)
def test_text_projector(kind, text_state, layers, tmp_path):
    model = M2D.from_pretrained(save(tmp_path, encoder_state() | AUDIO_MLP | text_state | SCALE, NAME))
    assert model.config.clap.text_layers == layers
    embeddings = draw((3, 32), 5)
    expected = (
        affine(embeddings.double(), text_state, "text_proj")
        if kind == "linear"
        else mlp(embeddings, text_state, "text_proj")
    )
    assert (model.clap.project_text(embeddings) - expected).abs().max() < 1e-5


def test_single_linear_audio_projector(tmp_path):
    state = encoder_state() | linear_state("audio_proj", 192, 48, 70) | TEXT_LINEAR | SCALE
    model = M2D.from_pretrained(save(tmp_path, state, NAME))
    assert model.config.clap.audio_layers == (192, 48)
    assert torch.equal(model.clap.audio_proj[0].weight, state["audio_proj.weight"])


@pytest.mark.parametrize("suffix, encoder, pooling", [("", "gte", "mean"), ("pB", "bert", "cls"), ("pN", "NV", "mean")])
def test_the_name_says_which_text_encoder(suffix, encoder, pooling, tmp_path):
    state = encoder_state() | AUDIO_MLP | TEXT_LINEAR | SCALE
    clap = read_checkpoint(save(tmp_path, state, NAME.replace("-990101", f"{suffix}-990101"))).config.clap
    assert encoder in clap.text_encoder
    assert clap.text_pooling == pooling


def test_scale_may_be_missing_or_a_list_of_one(tmp_path):
    state = encoder_state() | AUDIO_MLP | TEXT_LINEAR
    without = M2D.from_pretrained(save(tmp_path, state, NAME))
    assert without.clap.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-4)
    listed = M2D.from_pretrained(save(tmp_path, state | {"logit_scale": torch.tensor([3.1])}, NAME))
    assert listed.clap.logit_scale.shape == ()
    assert listed.clap.logit_scale.item() == pytest.approx(3.1)


def test_fine_tuned_clap_checkpoint_with_the_audio_side_only(tmp_path, noise):
    state = under(FINE_TUNED, encoder_state() | AUDIO_MLP) | head_state(960)
    model = M2D.from_pretrained(save(tmp_path, {"model": state}, NAME))
    with torch.no_grad():
        expected = mlp(flat_features(noise(0.63)).mean(dim=1), AUDIO_MLP, "audio_proj")
        assert (model.encode_audio_clap(noise(0.63)) - expected).abs().max() < 1e-4
        assert model.logits(noise(0.63)).shape == (1, 527)
    with pytest.raises(UnsupportedError, match="audio projector only"):
        model.clap.project_text(torch.zeros(1, 32))
    with pytest.raises(UnsupportedError, match="audio projector only"):
        model.encode_text(["a"])


def test_a_text_projector_alone_is_no_clap_model(tmp_path, noise):
    checkpoint = read_checkpoint(save(tmp_path, encoder_state() | TEXT_LINEAR | SCALE, NAME))
    assert checkpoint.config.clap is None
    assert sorted(checkpoint.unused) == ["logit_scale", "text_proj.bias", "text_proj.weight"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"audio_proj.0.weight": draw((96, 100), 0)}, "clap.audio_layers begins with 100, but embed_dim is 192"),
        ({"audio_proj.0.weight": draw((96,), 0)}, r"clap\.audio_proj\.0\.weight has shape \(96,\)"),
        ({"audio_proj.2.weight": draw((48, 50), 0)}, r"clap\.audio_proj\.2\.weight has shape \(48, 50\)"),
        ({"audio_proj.2.bias": None}, r"clap\.audio_proj\.2\.bias is missing"),
        ({"audio_proj.4.extra": draw((1,), 0)}, r"clap\.audio_proj\.4\.extra is not part of the model"),
        ({"text_proj.bias": None}, r"clap\.text_proj\.0\.bias is missing"),
        ({"audio_proj.sem_token": torch.zeros(1, 1, 192)}, r"clap\.audio_proj\.norm\.weight is missing"),
        (
            {"audio_proj.sem_token": torch.zeros(1, 1, 192), "audio_proj.sem_blocks.0.norm1.bias": torch.zeros(192)},
            r"clap\.audio_proj\.sem_blocks\.0\.mlp\.fc1\.weight is missing",
        ),
    ],
)
def test_projectors_that_do_not_fit(change, message, tmp_path):
    state = encoder_state() | AUDIO_MLP | TEXT_LINEAR | SCALE | change
    with pytest.raises(CheckpointError, match=message):
        M2D.from_pretrained(save(tmp_path, {k: t for k, t in state.items() if t is not None}, NAME))


@pytest.mark.parametrize("projector", [AUDIO_MLP, semantic_state(192, 3)], ids=["mlp", "semantic"])
def test_clap_survives_conversion_and_saving(projector, tmp_path, noise):
    state = encoder_state() | projector | TEXT_MLP | SCALE
    first = M2D.from_pretrained(save(tmp_path, state, NAME))
    convert(tmp_path / NAME, tmp_path / "converted", [torch.bfloat16])
    first.save_pretrained(tmp_path / "saved")
    for folder in ("converted", "saved"):
        again = M2D.from_pretrained(tmp_path / folder)
        assert again.config == first.config
        assert again.state_dict().keys() == first.state_dict().keys()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, first.state_dict()[name]), name
    half = M2D.from_pretrained(tmp_path / "converted", dtype="bf16")
    assert {parameter.dtype for parameter in half.clap.parameters()} == {torch.float32}
    assert half.encode_audio_clap(noise(0.63)).dtype == torch.float32


def test_similarity_is_a_scaled_cosine():
    head = ClapHead(ClapConfig("mlp", (4, 3), (4, 3), "", "mean"))
    audio, text = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    cosines = torch.tensor([[1.0, 0.5**0.5], [0.0, 0.5**0.5]])
    assert torch.allclose(head.similarity(audio, text), cosines / 0.07, rtol=1e-4)
    head.logit_scale.data.fill_(9.0)  # beyond the cap of 100
    assert torch.allclose(head.similarity(audio, text), 100 * cosines)


def test_models_without_clap_say_so(tiny, noise):
    for call in (lambda: tiny.encode_audio_clap(noise(0.5)), lambda: tiny.encode_text(["a"])):
        with pytest.raises(UnsupportedError, match="has no audio-text projectors; take a CLAP checkpoint"):
            call()


# --- text --------------------------------------------------------------------------------------------------------

TEXTS = ["a dog barks", "rain", "rain on the roof a dog barks on the roof"]


def hidden_states(folder, text, weights=None):
    """(tokens, 32) of one text alone, from the ids written out here."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(folder).eval()
    if weights:
        model.load_state_dict(weights)
    ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0]


def clap_model(text_encoder, pooling="mean", **changes):
    clap = ClapConfig("mlp", (32, 24), (32, 24), str(text_encoder), pooling)
    return random_model(replace(TINY, clap=replace(clap, **changes)))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encode_text(pooling, bert):
    model = clap_model(bert, pooling)
    pooled = [h.mean(dim=0) if pooling == "mean" else h[0] for h in (hidden_states(bert, text) for text in TEXTS)]
    linear = model.clap.text_proj[0]
    with torch.no_grad():
        together = model.encode_text(TEXTS)
        assert (together.shape, together.dtype) == ((3, 24), torch.float32)
        assert (together - (torch.stack(pooled) @ linear.weight.T + linear.bias)).abs().max() < 1e-5
        for row, text in zip(together, TEXTS, strict=True):  # padding changes nothing
            assert (model.encode_text([text])[0] - row).abs().max() < 1e-5
        assert model.encode_text(tuple(TEXTS)).equal(together)
        assert model.encode_text([]).shape == (0, 24)


def test_a_text_that_is_too_long(bert):
    model = clap_model(bert)
    assert model.encode_text([" ".join(["dog"] * 14)]).shape == (1, 24)  # 16 tokens with [CLS] and [SEP]
    with pytest.raises(UnsupportedError, match=r"'dog dog .* is longer than the 16 tokens the encoder takes"):
        model.encode_text(["a", " ".join(["dog"] * 15)])


def test_a_single_text_is_not_taken_for_its_letters(bert):
    with pytest.raises(UnsupportedError, match=r"takes a list of texts, not a single one: \['a dog'\]"):
        clap_model(bert).encode_text("a dog")


def test_text_encoder_is_loaded_once(bert, monkeypatch):
    model = clap_model(bert)
    first = model.encode_text(["rain"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert torch.equal(model.encode_text(["rain"]), first)


def fine_tuned_bert(bert):
    """Weights that differ from those in the folder."""
    return {name: tensor + 0.1 for name, tensor in load_file(bert / "model.safetensors").items()}


def clap_checkpoint(tmp_path, bert, prefix, drop=(), **changes):
    """A published checkpoint with its own text encoder; its configuration, once converted, names the local BERT."""
    weights = {name: tensor for name, tensor in fine_tuned_bert(bert).items() if not name.startswith(tuple(drop))}
    state = encoder_state() | AUDIO_MLP | TEXT_LINEAR | SCALE | under(prefix, weights | changes)
    file = save(tmp_path, {"model": state}, NAME.replace("-990101", "pBpTI-990101"))
    convert(file, tmp_path / "converted", [torch.bfloat16])
    config = tmp_path / "converted" / "config.json"
    content = json.loads(config.read_text())
    content["clap"]["text_encoder"] = str(bert)
    config.write_text(json.dumps(content))
    return file


PREFIXES = ["text_encoder.", "backbone.text_encoder.", "text_encoder.model.", "module.text_encoder.bert."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_fine_tuned_text_weights_are_used_and_kept(prefix, tmp_path, bert):
    file = clap_checkpoint(tmp_path, bert, prefix)
    published = read_checkpoint(file)
    assert published.unused == []
    inside = prefix.partition("text_encoder.")[2]
    assert published.text_encoder.keys() == {f"{inside}{name}" for name in fine_tuned_bert(bert)}
    names = ["README.md", "config.json", "model.bf16.safetensors", "model.safetensors", "text_encoder.safetensors"]
    assert sorted(p.name for p in (tmp_path / "converted").iterdir()) == names

    expected = torch.stack([hidden_states(bert, text, fine_tuned_bert(bert))[0] for text in TEXTS])  # pB: first token
    expected = affine(expected.double(), TEXT_LINEAR, "text_proj")
    model = M2D.from_pretrained(tmp_path / "converted")
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted again")
    for folder in ("converted", "saved", "converted again"):
        loaded = M2D.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert (loaded.encode_text(TEXTS) - expected).abs().max() < 1e-5
    stock = torch.stack([hidden_states(bert, text)[0] for text in TEXTS])
    assert (affine(stock.double(), TEXT_LINEAR, "text_proj") - expected).abs().max() > 1e-2


def test_text_weights_of_a_pth_are_used_and_saved(tmp_path, bert):
    file = clap_checkpoint(tmp_path, bert, "text_encoder.")
    model = M2D.from_pretrained(file)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "text_encoder.safetensors")
    assert saved.keys() == fine_tuned_bert(bert).keys()
    assert all(torch.equal(tensor, fine_tuned_bert(bert)[name]) for name, tensor in saved.items())
    text_encoder = TextEncoder(replace(model.config.clap, text_encoder=str(bert)), model._text_weights, model.device)
    expected = torch.stack([hidden_states(bert, text, fine_tuned_bert(bert))[0] for text in TEXTS])
    assert (text_encoder(TEXTS) - expected).abs().max() < 1e-5


def test_saving_over_itself_keeps_the_text_weights(tmp_path, bert):
    clap_checkpoint(tmp_path, bert, "text_encoder.")
    model = M2D.from_pretrained(tmp_path / "converted")
    before = model.encode_text(TEXTS)
    model.save_pretrained(tmp_path / "converted")
    assert (M2D.from_pretrained(tmp_path / "converted").encode_text(TEXTS) - before).abs().max() < 1e-6


def test_the_pooler_of_the_text_encoder_may_be_missing(tmp_path, bert):
    clap_checkpoint(tmp_path, bert, "text_encoder.", drop=["pooler."])
    expected = hidden_states(bert, "rain", fine_tuned_bert(bert))[0]
    with torch.no_grad():
        encoded = M2D.from_pretrained(tmp_path / "converted").encode_text(["rain"])[0]
    assert (encoded - affine(expected.double(), TEXT_LINEAR, "text_proj")).abs().max() < 1e-5


def test_text_weights_that_lack_a_layer(tmp_path, bert):
    clap_checkpoint(tmp_path, bert, "text_encoder.", drop=["encoder.layer.1.output"])
    with pytest.raises(CheckpointError, match=r"text encoder lacks encoder\.layer\.1\.output.*\(4 in all\)"):
        M2D.from_pretrained(tmp_path / "converted").encode_text(["rain"])


def test_text_weights_of_another_size(tmp_path, bert):
    other = {"embeddings.word_embeddings.weight": torch.zeros(99, 32)}
    clap_checkpoint(tmp_path, bert, "text_encoder.", **other)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its configuration.*word_embeddings"):
        M2D.from_pretrained(tmp_path / "converted").encode_text(["rain"])


def test_damaged_text_weights(tmp_path, bert):
    clap_checkpoint(tmp_path, bert, "text_encoder.")
    (tmp_path / "converted" / "text_encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"text_encoder\.safetensors: damaged"):
        M2D.from_pretrained(tmp_path / "converted").encode_text(["rain"])


def test_half_precision_text_encoder_computes_in_float32(tmp_path, bert):
    transformers = pytest.importorskip("transformers")
    transformers.BertModel.from_pretrained(bert).half().save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    rounded = {name: t.half().float() for name, t in load_file(bert / "model.safetensors").items()}
    expected = torch.stack([hidden_states(bert, text, rounded).mean(dim=0) for text in TEXTS])
    text_encoder = TextEncoder(clap_model(tmp_path).config.clap, None, torch.device("cpu"))
    assert (text_encoder(TEXTS) - expected).abs().max() < 1e-5


# --- what is refused ---------------------------------------------------------------------------------------------


def test_text_encoder_that_runs_foreign_code():
    with pytest.raises(UnsupportedError, match=r"nvidia/NV-Embed-v2 runs code from its repository.*project_text"):
        clap_model("nvidia/NV-Embed-v2").encode_text(["rain"])


@pytest.mark.parametrize("weights", [None, {}])
def test_code_of_a_text_encoders_repository_does_not_run(weights, tmp_path, bert, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a hasty user answers where transformers asks
    folder, marker = tmp_path / "repository", tmp_path / "ran"
    folder.mkdir()
    content = json.loads((bert / "config.json").read_text()) | {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "foreign.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in ("model.safetensors", "vocab.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((bert / name).read_bytes())
    with pytest.raises(UnsupportedError, match="runs code from its repository, which m2d-embed never does"):
        TextEncoder(clap_model(folder).config.clap, weights, torch.device("cpu"))
    assert not marker.exists()


def test_without_transformers(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"needs transformers: pip install 'm2d-embed\[clap\]'"):
        clap_model(bert).encode_text(["rain"])


def test_text_encoder_that_is_not_there(tmp_path, bert):
    with pytest.raises(ModelNotFoundError, match=r"the text encoder .*nowhere cannot be loaded"):
        clap_model(tmp_path / "nowhere").encode_text(["rain"])
