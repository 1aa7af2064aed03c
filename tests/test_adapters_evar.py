"""The representation for EVAR: over a stand-in for its base class, and over EVAR itself where it can be imported."""

import importlib
import sys
import types

import pytest
import torch
from conftest import TINY, random_model
from torch import nn

from m2d_embed.errors import AudioError, ConfigError, ModelNotFoundError, UnsupportedError

ADAPTER = "m2d_embed.adapters.evar"


class Settings(dict):
    """A dict whose items are attributes, too: what EVAR's settings are."""

    __getattr__ = dict.__getitem__


class BaseAudioRepr(nn.Module):
    """What an adapter sees of EVAR's base class."""

    def __init__(self, cfg, filename_mode=False):
        super().__init__()
        self.cfg, self.augment = Settings(cfg), None

    def precompute(self, device, data_loader):
        pass

    def set_augment_tf_feature_fn(self, augment):
        self.augment = augment

    def augment_if_training(self, features):
        return self.augment(features) if self.augment and self.training else features


def temporal_pooling(ar, frames):
    pooled = {"mean": frames.mean(-1), "max": frames.amax(-1), "mean_max": frames.mean(-1) + frames.amax(-1)}
    return pooled[ar.cfg.temporal_pooling_type]


def stand_in():
    package, module = types.ModuleType("evar"), types.ModuleType("evar.ar_base")
    package.__path__ = []
    package.ar_base = module
    module.BaseAudioRepr, module.temporal_pooling = BaseAudioRepr, temporal_pooling
    return {"evar": package, "evar.ar_base": module}


@pytest.fixture
def fresh():
    """Let the adapter be imported anew, and forgotten afterwards."""
    sys.modules.pop(ADAPTER, None)
    yield
    sys.modules.pop(ADAPTER, None)


@pytest.fixture(params=["stand-in", "EVAR"])
def adapter(request, monkeypatch, fresh):
    if request.param == "EVAR":
        pytest.importorskip("evar.ar_base", reason="EVAR is not on PYTHONPATH", exc_type=ImportError)
    else:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module(ADAPTER)


@pytest.fixture
def cfg(tmp_path):
    """Settings for a model of random weights, 160 values a column."""
    random_model(TINY).save_pretrained(tmp_path / "model")
    return Settings(weight_file=str(tmp_path / "model"), feature_d=160, sample_rate=16_000)


def test_embeddings_are_the_models(adapter, cfg, noise):
    ar, audio, model = adapter.AR_M2DEmbed(cfg).eval(), noise(1.3, batch=3), random_model(TINY)
    ar.precompute(torch.device("cpu"), None)
    with torch.no_grad():
        torch.testing.assert_close(ar(audio), model.scene(audio))
        torch.testing.assert_close(ar.encode_frames(audio), model(audio).transpose(1, 2))
        assert ar.encode_frames(audio).shape == (3, 160, 8)
        torch.testing.assert_close(nn.DataParallel(ar)(audio), model.scene(audio))  # as EVAR calls it


def test_no_weight_file_is_the_bundled_model(adapter, bundled, noise):
    for weight_file in ({"weight_file": ""}, {"weight_file": None}, {}):
        ar = adapter.AR_M2DEmbed(Settings(feature_d=960, sample_rate=16_000, **weight_file))
        with torch.no_grad():
            torch.testing.assert_close(ar(noise(1.0)), bundled.scene(noise(1.0))[:, :960])


def test_settings_of_features(adapter, cfg, noise):
    ar = adapter.AR_M2DEmbed(Settings(cfg, feature_d=64, output_layers=[0, -1], flat_features=True))
    first, last = random_model(TINY).intermediates(noise(1.0), (0, -1))
    expected = torch.cat([x.unflatten(2, (5, 32)).mean(2) for x in (first, last)], dim=-1)
    torch.testing.assert_close(ar.encode_frames(noise(1.0)), expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["mean", "max", "mean_max"])
def test_temporal_pooling(adapter, cfg, noise, kind):
    ar = adapter.AR_M2DEmbed(Settings(cfg, temporal_pooling_type=kind))
    frames = random_model(TINY)(noise(1.0)).transpose(1, 2)
    torch.testing.assert_close(ar(noise(1.0)), temporal_pooling(ar, frames))


def test_fine_tuning(adapter, cfg, noise):
    ar, shapes = adapter.AR_M2DEmbed(cfg), []

    def augment(log_mel):
        shapes.append(tuple(log_mel.shape))
        return log_mel * 0

    ar.set_augment_tf_feature_fn(augment)
    plain = ar.eval()(noise(1.0))
    assert not shapes
    augmented = ar.train()(noise(1.0))
    assert shapes == [(1, 1, 80, 101)]
    assert not torch.allclose(plain, augmented)
    augmented.sum().backward()
    assert all(p.grad is not None for p in ar.model.encoder.blocks.parameters())


@pytest.mark.parametrize(("key", "value", "right"), [("feature_d", 768, 160), ("sample_rate", 32_000, 16_000)])
def test_settings_that_contradict_the_model(adapter, cfg, key, value, right):
    with pytest.raises(ConfigError, match=rf"{key} is {value} .* set {key}: {right}\."):
        adapter.AR_M2DEmbed(Settings(cfg, **{key: value}))
    del cfg[key]
    with pytest.raises(ConfigError, match=f"{key} is None"):
        adapter.AR_M2DEmbed(cfg)


def test_other_errors(adapter, cfg):
    with pytest.raises(ModelNotFoundError, match="no-such-folder"):
        adapter.AR_M2DEmbed(Settings(cfg, weight_file="./no-such-folder"))
    with pytest.raises(ConfigError, match="layer 7"):
        adapter.AR_M2DEmbed(Settings(cfg, output_layers=[7]))
    with pytest.raises(AudioError, match=r"audio\[0\]"):
        adapter.AR_M2DEmbed(cfg)(torch.full((1, 800), float("inf")))


def test_without_evar(monkeypatch, fresh):
    for name in ("evar", "evar.ar_base"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"eval-audio-repr.*PYTHONPATH"):
        importlib.import_module(ADAPTER)
