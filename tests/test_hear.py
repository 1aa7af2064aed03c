"""The HEAR API, and the real hearvalidator where it is installed."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from conftest import TINY, random_model

import m2d_embed
from m2d_embed.checkpoints.layouts import Checkpoint, write_native
from m2d_embed.config import ModelConfig


def test_load_model_gives_the_bundled_model():
    assert m2d_embed.load_model(None).config == m2d_embed.M2D.from_pretrained(None).config
    model = m2d_embed.load_model()
    assert isinstance(model, torch.nn.Module)
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16_000, 1920, 960)
    assert not model.training
    assert m2d_embed.load_model(m2d_embed.registry.BUNDLED_NAME).config == model.config


def test_embeddings(bundled, noise):
    audio = noise(2.74, batch=3)
    scene = m2d_embed.get_scene_embeddings(audio, bundled)
    assert scene.shape == (3, 1920)
    assert scene.dtype == torch.float32
    embeddings, timestamps = m2d_embed.get_timestamp_embeddings(audio, bundled)
    assert embeddings.shape == (3, 17, 960)
    assert timestamps.dtype == embeddings.dtype == torch.float32
    assert timestamps[1, :3].tolist() == [75, 235, 395]
    assert not embeddings.requires_grad
    pooled = torch.cat([embeddings.mean(1), embeddings.std(1, correction=0)], dim=1)
    torch.testing.assert_close(pooled, scene, atol=1e-5, rtol=0)


def test_one_default_device_and_precision(monkeypatch, tmp_path):
    """A GPU where there is one, and float32 even where there is a half-precision file; the same for both ways."""
    folder = tmp_path
    write_native(folder, Checkpoint(TINY, random_model(TINY).state_dict()), [torch.float32, torch.bfloat16])
    for load in (m2d_embed.load_model, m2d_embed.M2D.from_pretrained):
        assert load(folder).dtype == torch.float32
        assert load(folder).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert load(folder, device="meta").dtype == torch.float32
        assert load(folder, device="meta", dtype="bf16").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("m2d_embed.m2d.parse_device", lambda device: torch.device({"cuda": "meta"}[device]))
    for load in (m2d_embed.load_model, m2d_embed.M2D.from_pretrained):
        assert load(folder).device.type == "meta"
        assert load(folder).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_of_the_audio_is_honoured(noise):
    model, audio = m2d_embed.load_model(device="cuda"), noise(1.0)
    for given in (audio, audio.cuda()):
        embeddings, timestamps = m2d_embed.get_timestamp_embeddings(given, model)
        assert embeddings.device == timestamps.device == given.device
        assert m2d_embed.get_scene_embeddings(given, model).device == given.device


@pytest.mark.parametrize(
    ("options", "scene", "frame"),
    [
        ({"layers": [2, 4, 7]}, 1920, 960),
        ({"layers": [3, -1], "layer_pooling": "concat"}, 3840, 1920),
        ({"layers": 5}, 1920, 960),
        ({"layers": None}, 1920, 960),
        ({"layers": np.arange(3)}, 1920, 960),
        ({"flat": True}, 384, 192),
        ({"dtype": "bf16"}, 1920, 960),
        ({"hop_ms": 40}, 1920, 960),
        ({"scene_pooling": "mean_std"}, 1920, 960),
        ({"scene_pooling": "mean"}, 960, 960),
        ({"scene_pooling": "mean", "flat": True}, 192, 192),
    ],
)
def test_options(options, scene, frame, noise):
    model = m2d_embed.load_model(**options)
    audio = noise(1.0, batch=2)
    assert m2d_embed.get_scene_embeddings(audio, model).shape == (2, scene)
    embeddings, timestamps = m2d_embed.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, timestamps.shape[1], frame)
    assert embeddings.dtype == torch.float32
    hop = options.get("hop_ms", 160)
    assert np.allclose(np.diff(timestamps.numpy()), hop)


def test_impossible_options():
    with pytest.raises(m2d_embed.ConfigError, match="hop_ms=30"):
        m2d_embed.load_model(hop_ms=30)
    for layers in (1.0, [1.0], True, "3"):
        with pytest.raises(m2d_embed.ConfigError, match="layers is a whole number"):
            m2d_embed.load_model(layers=layers)
    with pytest.raises(m2d_embed.ConfigError, match="device 'nonsense' cannot be used"):
        m2d_embed.load_model(device="nonsense")
    with pytest.raises(m2d_embed.ModelNotFoundError, match="neither a file"):
        m2d_embed.load_model("x" * 5000)
    with pytest.raises(TypeError, match="hop_size"):
        m2d_embed.load_model(hop_size=40)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(16_000), r"\(sounds, samples\)"),
        (torch.zeros(2, 0), "empty"),
        (torch.full((1, 100), torch.nan), "NaN"),
    ],
)
def test_bad_audio(bundled, audio, message):
    for function in (m2d_embed.get_scene_embeddings, m2d_embed.get_timestamp_embeddings):
        with pytest.raises(m2d_embed.AudioError, match=message):
            function(audio, bundled)


def test_import_is_light():
    """Nothing heavy is imported until it is used."""
    import subprocess

    heavy = ["transformers", "matplotlib", "sklearn", "scipy", "pyarrow", "huggingface_hub", "pandas"]
    code = f"import m2d_embed, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# What the validator always warns of, and what its advice on 160 ms steps amounts to.
pytestmark = pytest.mark.filterwarnings("ignore:.*(IMPORTANT|Your timestamps end|We suggest)")


@pytest.fixture
def validator(monkeypatch):
    """The real hearvalidator; it imports tensorflow only for isinstance checks, so an empty module will do."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})
    tensorflow.Tensor = type("Tensor", (), {})
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    pytest.importorskip("hearvalidator.validate", reason="pip install --no-deps --ignore-requires-python hearvalidator")
    return importlib.import_module("hearvalidator.validate").ValidateModel


def test_hearvalidator_on_the_bundled_model(validator, capsys):
    with pytest.warns(UserWarning, match="interval between timestamps"):  # 160 ms; HEAR suggests 50 or less
        validator("m2d_embed", "", device="cpu")()
    assert "(4, 1920)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("input_size", "patch_size"), [((80, 608), (16, 16)), ((80, 200), (16, 4)), ((80, 100), (80, 2))]
)
def test_hearvalidator_on_other_shapes(validator, tmp_path, input_size, patch_size, capsys):
    config = ModelConfig(embed_dim=64, depth=2, num_heads=2, input_size=input_size, patch_size=patch_size)
    random_model(config).save_pretrained(tmp_path)
    validator("m2d_embed", str(tmp_path), device="cpu")()
    size = 64 * 80 // patch_size[0]
    assert f"Received embedding of shape: (4, {size})" in capsys.readouterr().out


def test_hearvalidator_with_a_hop_of_40_ms(validator, monkeypatch, recwarn):
    """As HEAR asks: a step of at most 50 ms, so the validator has nothing to say about it."""
    module = types.ModuleType("m2d_embed_40ms")
    module.load_model = lambda path="": m2d_embed.load_model(path, hop_ms=40)
    module.get_scene_embeddings = m2d_embed.get_scene_embeddings
    module.get_timestamp_embeddings = m2d_embed.get_timestamp_embeddings
    monkeypatch.setitem(sys.modules, "m2d_embed_40ms", module)
    validator("m2d_embed_40ms", "", device="cpu")()
    assert not [w for w in recwarn if "interval between timestamps" in str(w.message)]


def test_tiny_configuration_is_hear_compatible():
    model = random_model(TINY)
    assert m2d_embed.get_scene_embeddings(torch.zeros(1, 16_000), model).shape == (1, 160)
