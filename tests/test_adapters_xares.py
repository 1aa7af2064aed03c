"""The encoder for X-ARES, and the real X-ARES where it is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model

import m2d_embed.adapters
from m2d_embed import FeatureConfig
from m2d_embed.adapters.xares import M2DEncoder
from m2d_embed.errors import AudioError, ConfigError

FILE = Path(m2d_embed.adapters.__file__).with_name("xares.py")


def load_by_path():
    """The module as a fresh process sees it that is given its file."""
    spec = importlib.util.spec_from_file_location("some_encoder", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def saved(tmp_path):
    random_model(TINY).save_pretrained(tmp_path / "a-model")
    return tmp_path / "a-model"


def test_attributes_and_frames(bundled, noise):
    encoder = M2DEncoder()
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16_000, 960, 160)
    audio = noise(7.3, batch=2)
    with torch.no_grad():
        frames = encoder(audio)
        torch.testing.assert_close(frames, bundled(audio))
        torch.testing.assert_close(frames.mean(1), bundled.scene(audio)[:, :960])


@pytest.mark.parametrize("hop_ms", [None, 10, 40, 80, 160])
@pytest.mark.parametrize("samples", [400, 2_560, 3_760, 50_000, 16_000 * 7 + 123])
def test_hop_is_true_to_the_number_of_frames(saved, hop_ms, samples):
    encoder = M2DEncoder(saved, features=FeatureConfig(hop_ms=hop_ms))
    assert encoder.hop_size_in_ms == (hop_ms or 160)
    with torch.no_grad():
        frames = encoder(torch.rand(1, samples) - 0.5)
    expected = samples / 16 / encoder.hop_size_in_ms
    assert frames.shape[2] == encoder.output_dim == 160
    assert frames.shape[1] >= 1
    assert abs(frames.shape[1] - expected) <= 1


@pytest.mark.parametrize("hop_ms", [20, 40, 80, 160])
def test_each_frame_is_the_one_nearest_in_time(saved, hop_ms, noise):
    encoder, audio = M2DEncoder(saved, features=FeatureConfig(hop_ms=hop_ms)), noise(1.5)
    with torch.no_grad():
        frames = encoder(audio)[0]
        embeddings, times = (x[0] for x in encoder.model.timestamps(audio))
    assert len(frames) == round(1500 / hop_ms)
    for i, frame in enumerate(frames):
        nearest = (times - (i + 0.5) * hop_ms).abs().argmin()
        torch.testing.assert_close(frame, embeddings[nearest])


def test_features_and_dtype_are_passed_on(saved):
    encoder = M2DEncoder(saved, features=FeatureConfig(layers=(0, 2), layer_pooling="concat", flat=True), dtype="bf16")
    assert encoder.output_dim == 64
    assert encoder.model.dtype == torch.bfloat16
    assert encoder(torch.rand(1, 16_000)).dtype == torch.float32
    with pytest.raises(ConfigError, match="hop_ms=7"):
        M2DEncoder(saved, features=FeatureConfig(hop_ms=7))


def test_bad_audio_is_refused():
    encoder = M2DEncoder()
    with pytest.raises(AudioError, match=r"audio\[1\] has samples that are NaN"):
        encoder(torch.tensor([[0.0] * 800, [float("nan")] * 800]))
    with pytest.raises(AudioError, match="shape"):
        encoder(torch.zeros(800))


def test_the_environment_names_the_model_and_the_results(saved, monkeypatch, noise):
    monkeypatch.delenv("M2D_EMBED_MODEL", raising=False)
    assert load_by_path().M2DEncoder.__name__ == "M2DEncoder"
    monkeypatch.setenv("M2D_EMBED_MODEL", str(saved))
    encoder_class = load_by_path().M2DEncoder
    assert encoder_class.__name__.endswith("a_model_M2DEncoder")
    assert "/" not in encoder_class.__name__
    encoder, audio = encoder_class(), noise(1.0)
    assert encoder.output_dim == 160
    with torch.no_grad():
        torch.testing.assert_close(encoder(audio), random_model(TINY)(audio))
    assert encoder_class("").output_dim == 960  # an argument wins


def test_names_that_x_ares_looks_for():
    assert [name for name in dir(load_by_path()) if name.endswith("Encoder")] == ["M2DEncoder"]


@pytest.mark.parametrize("name", ["m2d_embed.adapters.xares", "m2d_embed/adapters/xares.py"])
def test_x_ares_finds_and_accepts_it(name):
    utils = pytest.importorskip("xares.utils", reason="X-ARES is not installed")
    from xares.audio_encoder_checker import check_audio_encoder

    encoder = utils.attr_from_py_path(name, endswith="Encoder")()
    assert check_audio_encoder(encoder)
    with torch.inference_mode():  # as X-ARES encodes
        assert encoder.to("cpu")(torch.randn(3, 16_000)).cpu().detach().numpy().shape == (3, 6, 960)


def test_x_ares_finds_a_subclass_in_a_file_of_its_own(saved, tmp_path, monkeypatch):
    utils = pytest.importorskip("xares.utils", reason="X-ARES is not installed")
    from xares.audio_encoder_checker import check_audio_encoder

    (tmp_path / "my_fine_file.py").write_text(
        "from m2d_embed import FeatureConfig\n"
        "from m2d_embed.adapters import xares\n"
        "class FineM2DEncoder(xares.M2DEncoder):\n"
        "    def __init__(self):\n"
        f"        super().__init__({str(saved)!r}, features=FeatureConfig(hop_ms=40))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = utils.attr_from_py_path("my_fine_file.py", endswith="Encoder")()
    assert check_audio_encoder(encoder)
    assert encoder(torch.randn(1, 50_000)).shape[1] == round(3125 / 40)
