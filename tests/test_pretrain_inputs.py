"""From batches to examples; schedules; positions of another window."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_model

from m2d_embed.errors import ConfigError
from m2d_embed.model.encoder import sincos_positions
from m2d_embed.model.frontend import LogMel
from m2d_embed.pretrain.batches import Batch
from m2d_embed.pretrain.inputs import (
    Inputs,
    PatchTeacher,
    Teacher,
    blank_padding,
    mix,
    resample_columns,
)
from m2d_embed.pretrain.objectives import M2D
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.warm_start import Start, apply_start
from m2d_embed.training.positions import resize_positions
from m2d_embed.training.schedule import ema_decay, learning_rate

CONFIG = replace(TINY, norm_stats=(-7.0, 4.0))
SAMPLES = 63 * 160


def batch_of(audio, **parts):
    count = len(audio)
    order = torch.stack([torch.randperm(20) for _ in range(count)])
    return Batch(audio, None, torch.full((count,), 64), order, names=["a"] * count, **parts)


def test_log_mel_is_that_of_inference(noise):
    audio = noise(1)[:, :SAMPLES]
    example = Inputs(CONFIG, 6, 0.0, None)(batch_of(audio))
    torch.testing.assert_close(example.log_mel, random_model(CONFIG).log_mel(audio), rtol=1e-5, atol=1e-5)
    assert example.visible == 6
    assert example.offline is None


def test_cached_log_mels_give_the_same_as_audio(noise):
    audio = noise(1)[:, :SAMPLES]
    inputs = Inputs(CONFIG, 6, 0.0, None)
    raw = LogMel(replace(CONFIG, norm_stats=(0.0, 1.0)))(audio).half()
    from_cache = inputs(replace(batch_of(audio), audio=None, log_mel=raw))
    torch.testing.assert_close(from_cache.log_mel, inputs(batch_of(audio)).log_mel, rtol=0, atol=5e-3)


def test_padding_is_zero_after_normalisation():
    log_mel = torch.ones(2, 1, 3, 5)
    blanked = blank_padding(log_mel, torch.tensor([2, 5]))
    assert blanked[0, 0].sum(0).tolist() == [3, 3, 0, 0, 0]
    assert torch.equal(blanked[1], log_mel[1])


def test_noise_is_mixed_in_the_linear_domain():
    clean, noise = torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4, 6)
    wanted = (0.3 * noise.exp() + 0.7 * clean.exp()).log()
    torch.testing.assert_close(mix(clean, noise, 0.3), wanted)
    torch.testing.assert_close(mix(clean, noise, 0.0), clean)
    assert torch.isfinite(mix(clean - 200, noise + 200, 0.3)).all()


def test_m2d_sees_the_noise_and_the_teacher_does_not(noise):
    audio, background = noise(1)[:, :SAMPLES], noise(1, seed=5)[:, :SAMPLES]
    seen = []

    def offline(batch, log_mel):
        seen.append(log_mel)
        return torch.zeros(1)

    inputs = Inputs(CONFIG, 6, 0.5, offline)
    example = inputs(batch_of(audio, noise_audio=background))
    clean = LogMel(replace(CONFIG, norm_stats=(0.0, 1.0)))(audio)
    torch.testing.assert_close(seen[0], clean)
    raw_noise = LogMel(replace(CONFIG, norm_stats=(0.0, 1.0)))(background)
    torch.testing.assert_close(example.log_mel, (mix(clean, raw_noise, 0.5) + 7) / 4)


def test_teacher_of_the_same_front_end_is_fed_by_the_log_mel(noise):
    audio = noise(1, batch=2)[:, :SAMPLES]
    model = random_model(replace(CONFIG, norm_stats=(-5.0, 3.0)))
    wanted = model.encode_frames(audio).detach()
    teacher = Teacher(model, CONFIG)
    log_mel = LogMel(replace(CONFIG, norm_stats=(0.0, 1.0)))(audio)
    torch.testing.assert_close(teacher(batch_of(audio), log_mel), wanted, rtol=1e-3, atol=1e-4)
    assert wanted.shape == (2, 4, teacher.dim)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher_of_another_front_end_and_window_is_fed_by_the_audio(noise):
    audio = noise(1, batch=2)[:, :SAMPLES]
    model = random_model(replace(CONFIG, f_max=7000.0, patch_size=(80, 4)))
    teacher = Teacher(model, CONFIG)
    frames = teacher(batch_of(audio), torch.zeros(2, 1, 80, 64))
    wanted = model.encode_frames(audio).detach().view(2, 4, 4, -1).mean(2)  # 16 columns of 40 ms -> 4 of 160 ms
    torch.testing.assert_close(frames, wanted)
    with pytest.raises(ConfigError, match=r"data\.cache"):
        teacher(replace(batch_of(audio), audio=None), torch.zeros(2, 1, 80, 64))


def test_teacher_of_salt_gives_the_latents_of_the_patches_that_the_encoder_numbers(noise):
    audio = noise(1, batch=2)[:, :SAMPLES]
    model = random_model(replace(CONFIG, norm_stats=(-5.0, 3.0), input_size=(80, 608)))
    teacher = PatchTeacher(model, CONFIG)
    latents = teacher(batch_of(audio), LogMel(replace(CONFIG, norm_stats=(0.0, 1.0)))(audio))
    assert latents.shape == (2, 20, teacher.dim)
    frames = model.encode_frames(audio).detach().view(2, 4, 5, -1)  # (B, T, F, d)
    torch.testing.assert_close(latents.view(2, 5, 4, -1).transpose(1, 2), frames, rtol=1e-3, atol=1e-4)
    for other in ({"patch_size": (16, 8)}, {"f_max": 7000.0}):
        with pytest.raises(ConfigError, match="salt learns patch by patch"):
            PatchTeacher(random_model(replace(CONFIG, **other)), CONFIG)


def test_teacher_of_another_rate_is_refused():
    config = replace(CONFIG, sample_rate=32_000, n_fft=800, hop_length=320, f_max=16_000.0)
    with pytest.raises(ConfigError, match="32000 Hz"):
        Teacher(random_model(config), CONFIG)


def test_columns_are_averaged_or_interpolated():
    frames = torch.arange(12.0).view(1, 12, 1)
    assert resample_columns(frames, 4).flatten().tolist() == [1, 4, 7, 10]
    assert resample_columns(frames, 12) is frames
    finer = resample_columns(frames, 24).flatten()
    assert finer.diff().min() >= 0
    assert finer[1:-1].tolist() == pytest.approx((np.arange(1, 23) * 0.5 - 0.25).tolist())


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 300, 20 / 300, 2.0) for step in range(300)]
    assert rates[0] == pytest.approx(2.0 / 21)
    assert np.diff(rates[:20]) == pytest.approx(2.0 / 21)
    assert rates[20] == max(rates) == 2.0
    assert rates[160] == pytest.approx(1.0)
    assert all(np.diff(rates[20:]) < 0)
    assert 0 < rates[-1] < 1e-3
    assert [learning_rate(step, 2, 0.0, 2.0) for step in range(2)] == [2.0, 1.0]
    assert all(math.isfinite(learning_rate(0, 1, warmup, 1.0)) for warmup in (0.0, 0.5, 0.99))


def test_ema_decay_is_linear():
    assert [ema_decay(step, 3, 0.5, 0.9) for step in range(3)] == pytest.approx([0.5, 0.7, 0.9])
    assert ema_decay(0, 1, 0.5, 0.9) == 0.5


def test_fixed_positions_are_rebuilt_for_another_window():
    old, new = sincos_positions(32, (5, 4)), sincos_positions(32, (5, 9))
    assert torch.equal(resize_positions(old, (5, 4), new, (5, 9)), new)
    assert torch.equal(resize_positions(old.half(), (5, 4), new, (5, 9)), new)


def test_positions_that_a_checkpoint_leaves_out_are_built():
    source = M2D(CONFIG, PredictorConfig(16, 1, 2))
    tensors = {name: t for name, t in source.state_dict().items() if not name.endswith("pos_embed")}
    wider = M2D(replace(CONFIG, input_size=(80, 96)), PredictorConfig(16, 1, 2))
    apply_start(wider, Start(CONFIG, tensors, "here"), "all")
    assert torch.equal(wider.encoder.pos_embed, sincos_positions(32, (5, 6)))
    assert torch.equal(wider.predictor.pos_embed, sincos_positions(16, (5, 6)))
    assert torch.equal(wider.predictor.mask_token, source.predictor.mask_token)


def test_learned_positions_are_interpolated():
    learned = torch.randn(1, 1 + 20, 32)
    fixed = sincos_positions(32, (5, 8))
    resized = resize_positions(learned, (5, 4), fixed, (5, 8))
    assert resized.shape == fixed.shape
    assert torch.equal(resized[:, 0], learned[:, 0])
    rows = resized[0, 1:].view(5, 8, 32).mean(1)
    torch.testing.assert_close(rows, learned[0, 1:].view(5, 4, 32).mean(1), rtol=0, atol=0.5)
    assert torch.equal(resize_positions(learned, (5, 4), sincos_positions(32, (5, 4)), (5, 4)), learned)
    with pytest.raises(ConfigError, match="21 positions do not belong to a grid of 5 x 5"):
        resize_positions(learned, (5, 5), fixed, (5, 8))
