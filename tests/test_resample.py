"""Tensors at another rate: the pass band and rejection of soxr, and embeddings that agree with its."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import DATA, TINY, random_model

import m2d_embed
from m2d_embed.config import ClapConfig, HeadConfig
from m2d_embed.errors import AudioError
from m2d_embed.model.resample import resample

RATES = [(44_100, 16_000), (48_000, 16_000), (22_050, 16_000), (8_000, 16_000), (96_000, 32_000), (11_025, 32_000)]


def tone(frequency: float, rate: int) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(2 * rate, dtype=torch.float64) / rate + 0.3)


def decibels(samples: np.ndarray) -> float:
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    return 10 * np.log10(2 * np.mean(np.square(middle, dtype=np.float64)) + 1e-20)


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_response_is_that_of_soxr(from_rate, to_rate):
    half = min(from_rate, to_rate) / 2
    for share, tolerance in ((0.01, 0.01), (0.5, 0.01), (0.9, 0.02), (0.913, 0.05), (0.95, 0.5)):
        sound = tone(share * half, from_rate)
        wanted = soxr.resample(sound.numpy(), from_rate, to_rate, quality="HQ")
        found = resample(sound, from_rate, to_rate).numpy()
        assert decibels(found) == pytest.approx(decibels(wanted), abs=tolerance)
        if share <= 0.913:  # no delay, no drift
            assert np.abs(found - wanted)[200:-200].max() < 2e-3  # of which soxr's own droop is half
    for share in (1.01, 1.2, 1.9):
        if share * half < from_rate / 2:
            assert decibels(resample(tone(share * half, from_rate), from_rate, to_rate).numpy()) < -120


@pytest.mark.parametrize(("from_rate", "to_rate"), [*RATES, (16_000, 44_100), (7_990, 16_000)])
@pytest.mark.parametrize("samples", [1, 2, 999, 1000, 44_100])
def test_length_is_that_of_soxr(from_rate, to_rate, samples):
    found = resample(torch.zeros(3, 2, samples), from_rate, to_rate)
    assert found.shape == (3, 2, max(1, (2 * samples * to_rate + from_rate) // (2 * from_rate)))
    streamed = soxr.resample(np.zeros(samples, np.float32), from_rate, to_rate, quality="HQ")
    assert abs(found.shape[-1] - max(1, len(streamed))) <= (0 if samples > 2 else 1)


def test_the_same_rate_is_the_same_samples(noise):
    assert torch.equal(resample(noise(0.1), 16_000, 16_000), noise(0.1))


def test_gradients():
    random = torch.Generator().manual_seed(0)
    audio = torch.randn(2, 50, dtype=torch.float64, generator=random, requires_grad=True)
    resample(audio, 3000, 2000).square().sum().backward()
    step = 1e-3 * torch.randn(2, 50, dtype=torch.float64, generator=random)
    up, down = (resample((audio + way * step).detach(), 3000, 2000).double().square().sum() for way in (1, -1))
    assert (audio.grad * step).sum().item() == pytest.approx((up - down).item() / 2, rel=1e-3)


@pytest.mark.parametrize("rate", [0, -1, 44_100.0, True, None, "44100"])
def test_rates_that_are_none(rate):
    with pytest.raises(AudioError, match="not a rate"):
        resample(torch.zeros(1, 10), rate, 16_000)


def test_rates_without_a_common_divisor_are_refused_before_memory_is_gone():
    with pytest.raises(AudioError, match=r"999983 Hz cannot be resampled to 16000 Hz .* divisor is 1"):
        resample(torch.zeros(1, 10), 999_983, 16_000)


def test_embeddings_agree_with_those_of_soxr(bundled):
    cosines = []
    for file in sorted((DATA / "sounds").iterdir()):
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        wanted = torch.from_numpy(bundled.encode(mono, sample_rate=rate))
        found = bundled.scene(torch.from_numpy(mono)[None], sample_rate=rate)[0]
        cosines.append(torch.cosine_similarity(found, wanted, dim=0).item())
    assert min(cosines) > 0.9999


def test_every_method_takes_a_rate(noise):
    clap = ClapConfig("mlp", (32, 24), (32, 24), "some/encoder", "mean")
    model = random_model(replace(TINY, head=HeadConfig(("a", "b")), clap=clap))
    audio = noise(1.0, batch=2)
    resampled = resample(audio, 22_050, 16_000)
    for method, *arguments in (
        (model,),
        (model.log_mel,),
        (model.encode_frames,),
        (model.scene,),
        (model.patches,),
        (model.logits,),
        (model.frame_logits,),
        (model.encode_audio_clap,),
        (model.intermediates, [0]),
        (model.timestamps,),
    ):
        found, wanted = method(audio, *arguments, sample_rate=22_050), method(resampled, *arguments)
        if isinstance(found, torch.Tensor):
            found, wanted = [found], [wanted]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), method


def test_gradients_reach_audio_of_another_rate(noise):
    model, audio = random_model(TINY), noise(0.5).requires_grad_()
    model(audio, sample_rate=22_050).sum().backward()
    assert audio.grad.abs().sum() > 0


def test_a_log_mel_has_no_other_rate(noise):
    model = random_model(TINY)
    log_mel = model.log_mel(noise(0.5))
    assert torch.equal(model(log_mel, sample_rate=16_000), model(log_mel))
    with pytest.raises(AudioError, match=r"not for torch\.float32 of shape"):
        model(log_mel, sample_rate=22_050)


def test_tensors_elsewhere_are_resampled_where_they_are(noise, monkeypatch):
    """As on a GPU: whatever is not in the CPU's memory does not go through soxr."""
    model, audio = random_model(TINY), noise(1.0)[0]
    monkeypatch.setattr("m2d_embed.m2d._is_on_device", lambda clip: isinstance(clip, torch.Tensor))
    found = model.encode([audio, torch.stack([audio, -audio / 2])], sample_rate=22_050, output="torch")
    torch.testing.assert_close(found[0], model.scene(audio[None], sample_rate=22_050)[0])
    torch.testing.assert_close(found[1], model.scene(audio[None] / 4, sample_rate=22_050)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(noise):
    audio = noise(1.0, batch=2)
    torch.testing.assert_close(resample(audio.cuda(), 44_100, 16_000).cpu(), resample(audio, 44_100, 16_000))
    model = m2d_embed.load_model()
    found = model.encode(list(audio.cuda()), sample_rate=44_100)
    np.testing.assert_allclose(found, model.encode(list(audio), sample_rate=44_100), atol=1e-2)
