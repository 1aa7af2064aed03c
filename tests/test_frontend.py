"""The log-mel: agreement with nnAudio, streaming, precision, and very short clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from m2d_embed.backends.native import NativeLogMel
from m2d_embed.config import FRONT_ENDS, ModelConfig
from m2d_embed.model.frontend import LogMel


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def way(request, monkeypatch):
    """Both ways: what PyTorch computes, and where there is one the compiled kernel."""
    if request.param == "torch":
        monkeypatch.setattr(NativeLogMel, "fits", lambda n_fft: False)
    elif not NativeLogMel.fits(400):
        pytest.skip("no kernel was built, or it does not suit this CPU")
    return request.param


def config_at(rate: int) -> ModelConfig:
    return ModelConfig(sample_rate=rate, **FRONT_ENDS[rate])


@pytest.mark.parametrize("rate", [16_000, 32_000])
def test_agrees_with_nnaudio(rate, noise):
    from nnAudio.features import MelSpectrogram

    config = config_at(rate)
    reference = MelSpectrogram(
        sr=rate,
        n_fft=config.n_fft,
        win_length=config.n_fft,
        hop_length=config.hop_length,
        n_mels=80,
        fmin=config.f_min,
        fmax=config.f_max,
        center=True,
        power=2,
        verbose=False,
    )
    audio = noise(1.5, batch=2) * torch.tensor([[1.0], [1e-3]])
    expected = (torch.log(reference(audio) + torch.finfo(torch.float32).eps) + 7.1) / 4.2
    torch.testing.assert_close(LogMel(config)(audio)[:, 0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 100, 200, 201, 399, 400, 401, 1599, 1600, 16_000, 700_000])
def test_frame_count_and_values_are_finite(num_samples, noise):
    front_end = LogMel(ModelConfig())
    log_mel = front_end(noise(num_samples / 16_000))
    assert log_mel.shape == (1, 1, 80, 1 + num_samples // 160)
    assert torch.isfinite(log_mel).all()


def test_silence_is_the_log_of_eps():
    log_mel = LogMel(ModelConfig(norm_stats=(0.0, 1.0)))(torch.zeros(1, 16_000))
    torch.testing.assert_close(log_mel, torch.full_like(log_mel, np.log(torch.finfo(torch.float32).eps)))


@pytest.mark.parametrize("rate", [16_000, 32_000])
@pytest.mark.parametrize("num_samples", [1, 150, 401, 33_333])
@pytest.mark.parametrize("block", [31, 160, 4_096, 100_000])
@pytest.mark.parametrize("frames_a_piece", [1, 7, 4_096])
def test_streaming_equals_one_piece(rate, num_samples, block, frames_a_piece, noise, monkeypatch):
    monkeypatch.setattr("m2d_embed.model.frontend._BLOCK_FRAMES", frames_a_piece)
    front_end = LogMel(config_at(rate))
    audio = noise(num_samples / 16_000)[0]
    pieces = list(front_end.stream(torch.split(audio, block)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), front_end(audio[None])[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("hop_length", [300, 500])
def test_streaming_with_a_long_hop(hop_length, noise, monkeypatch):
    """So long that what is left of a block can be shorter than what is mirrored at the end."""
    front_end = LogMel(replace(ModelConfig(), hop_length=hop_length))
    audio = noise(2.0)[0]
    monkeypatch.setattr("m2d_embed.model.frontend._BLOCK_FRAMES", 1)
    for num_samples in range(1_200, 2_500, 50):
        pieces = list(front_end.stream(torch.split(audio[:num_samples], 100)))
        expected = front_end(audio[None, :num_samples])[0, 0]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


def test_a_short_clip_is_streamed_in_one_piece(noise):
    blocks = [block.numpy() for block in torch.split(noise(30.0)[0], 20_000)]
    (piece,) = LogMel(ModelConfig()).framed(blocks)
    assert len(piece) == 400 + 160 * (30 * 16_000 // 160)


def test_streaming_nothing_gives_nothing():
    assert list(LogMel(ModelConfig()).stream([])) == []


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_stays_float32_when_cast(cast, noise):
    audio = noise(1.0)
    expected = LogMel(ModelConfig())(audio)
    front_end = getattr(LogMel(ModelConfig()), cast)()
    assert front_end.window.dtype == front_end.filterbank.dtype == torch.float32
    assert torch.equal(front_end(audio), expected)


def test_stays_float32_under_autocast(noise):
    audio, front_end = noise(1.0), LogMel(ModelConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(front_end(audio), front_end(audio).float())
        under_autocast = front_end(audio)
    assert torch.equal(under_autocast, front_end(audio))


def test_moves_with_the_model():
    assert LogMel(ModelConfig()).to("meta").window.device.type == "meta"


def test_is_differentiable(noise):
    audio = noise(0.5).requires_grad_()
    LogMel(ModelConfig())(audio).sum().backward()
    assert torch.isfinite(audio.grad).all()
    assert audio.grad.abs().sum() > 0
