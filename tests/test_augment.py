"""Augmentation: mixtures as formulas say, masks of the sizes asked for, patch dropout by rows and columns."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY, random_model
from nnAudio.librosa_functions import mel_frequencies

from m2d_embed.errors import ConfigError
from m2d_embed.finetune.augment import frequency_warp, kept_patches, mixup, random_gain, spec_augment
from m2d_embed.finetune.crops import Batch
from m2d_embed.model.frontend import LogMel

MEAN, STD = -7.1, 4.2
FRAMES = 64


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch_of(valid: list[int], frame_targets: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    count = len(valid)
    valid_frames = torch.tensor(valid)
    log_mel = torch.randn(count, 1, 80, FRAMES, generator=generator)
    log_mel[torch.arange(FRAMES).expand(count, 1, 80, FRAMES) >= valid_frames.view(-1, 1, 1, 1)] = 0
    mask = torch.arange(4) < (valid_frames // 16)[:, None]
    targets = torch.eye(count)
    if frame_targets:
        targets = targets[:, None] * mask[..., None]
    return Batch(log_mel, targets, mask, valid_frames, [str(i) for i in range(count)])


@pytest.mark.parametrize("frame_targets", [False, True])
def test_mixup_is_a_mixture_of_mel_power_and_of_targets(frame_targets):
    batch = batch_of([64, 64, 32, 48, 16], frame_targets)
    mixed = mixup(batch, 0.4, STD, rng(1))
    draws = rng(1)
    partner, shares = draws.permutation(5), draws.beta(0.4, 0.4, size=5)
    assert (partner != np.arange(5)).any()
    power = np.exp(batch.log_mel.double().numpy() * STD + MEAN)
    power[(batch.log_mel == 0).numpy()] = 0  # padding is silence
    for i, (other, share) in enumerate(zip(partner, shares, strict=True)):
        valid = max(int(batch.valid_frames[i]), int(batch.valid_frames[other]))
        mixture = share * power[i, ..., :valid] + (1 - share) * power[other, ..., :valid]
        expected = (np.log(mixture) - MEAN) / STD
        np.testing.assert_allclose(mixed.log_mel[i, ..., :valid].numpy(), expected, atol=1e-5)
        assert (mixed.log_mel[i, ..., valid:] == 0).all()
        assert mixed.valid_frames[i] == valid
        assert mixed.mask[i].tolist() == [column < valid // 16 for column in range(4)]
        target = share * batch.targets[i] + (1 - share) * batch.targets[other]
        torch.testing.assert_close(mixed.targets[i], target.float())
    assert mixed.log_mel.dtype == mixed.targets.dtype == torch.float32
    assert mixed.names == batch.names


def test_mixup_of_targets_of_several_labels_stays_within_0_and_1():
    batch = batch_of([64] * 8)
    mixed = mixup(batch, 1.0, STD, rng())
    assert mixed.targets.min() >= 0
    assert torch.allclose(mixed.targets.sum(dim=1), torch.ones(8))
    assert ((mixed.targets > 0.01) & (mixed.targets < 0.99)).any()


def test_mixup_is_stable_where_powers_are_far_apart():
    """Levels of which float32 holds no exponential."""
    batch = batch_of([64, 64])
    loud = Batch(
        torch.tensor([60.0, -60.0]).view(2, 1, 1, 1).expand(2, 1, 80, FRAMES), batch.targets, batch.mask,
        batch.valid_frames, batch.names,
    )  # fmt: skip
    for seed in range(20):
        mixed = mixup(loud, 0.01, STD, rng(seed))  # shares of nearly 0 and 1
        assert torch.isfinite(mixed.log_mel).all()
        assert torch.isfinite(mixed.targets).all()


def test_mixup_without_alpha_changes_nothing_and_alpha_decides_how_even_mixtures_are():
    batch = batch_of([64] * 200)
    assert mixup(batch, 0.0, STD, rng()) is batch
    partner_share = [mixup(batch, alpha, STD, rng()).targets.sort(dim=1).values[:, -2].mean() for alpha in (0.1, 1, 10)]
    assert partner_share == sorted(partner_share)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="alpha"):
            mixup(batch, alpha, STD, rng())


def test_everything_is_the_same_for_the_same_generator_and_changes_no_input():
    batch = batch_of([64, 40, 20])
    before = batch.log_mel.clone()
    for change in (
        lambda g: mixup(batch, 0.5, STD, g).log_mel,
        lambda g: random_gain(batch, 6.0, STD, g).log_mel,
        lambda g: frequency_warp(batch, 0.2, TINY, g).log_mel,
        lambda g: spec_augment(batch.log_mel, 2, 20, 2, 20, g),
    ):
        first = change(rng(5))
        assert torch.equal(first, change(rng(5)))
        assert not torch.equal(first, change(rng(6)))
        assert not torch.equal(first, before)
    assert torch.equal(batch.log_mel, before)


def test_gain_is_in_decibels_of_power_one_a_clip_and_leaves_padding():
    batch = batch_of([64] * 100 + [20])
    changed = random_gain(batch, 6.0, STD, rng())
    decibels = (changed.log_mel - batch.log_mel) * STD * 10 / np.log(10)
    per_clip = decibels[..., :20].mean(dim=(1, 2, 3))
    assert torch.allclose(decibels[:100], per_clip[:100].view(-1, 1, 1, 1).expand_as(decibels[:100]), atol=1e-4)
    assert (changed.log_mel[100, ..., 20:] == 0).all()
    assert 5 < per_clip.max() < 6
    assert -6 < per_clip.min() < -5
    with pytest.raises(ConfigError, match="max_db"):
        random_gain(batch, -1.0, STD, rng())


@pytest.mark.parametrize("hertz", [500.0, 3000.0])
def test_frequency_warp_scales_frequencies_as_another_pitch_would(hertz):
    """The log-mel of a tone, warped by a, is about that of a tone of another frequency."""
    front_end = LogMel(TINY)
    seconds = torch.arange(8000) / TINY.sample_rate

    def peak(log_mel: torch.Tensor) -> torch.Tensor:
        return centres[log_mel.mean(dim=-1)[:, 0].argmax(dim=1)]

    centres = torch.from_numpy(mel_frequencies(82, TINY.f_min, TINY.f_max)[1:-1]).float()
    log_mel = front_end(torch.sin(2 * torch.pi * hertz * seconds)[None].expand(200, -1))
    batch = dataclasses.replace(batch_of([64] * 200), log_mel=log_mel)
    factors = peak(frequency_warp(batch, 0.25, TINY, rng()).log_mel) / hertz
    assert 0.78 < factors.min() < 0.84
    assert 1.19 < factors.max() < 1.29
    assert 0.96 < factors.log().mean().exp() < 1.04
    width = (centres[1:] / centres[:-1]).log()[centres[1:] > hertz].max()  # one band
    assert (peak(log_mel) / hertz).log().abs().max() < width


def test_frequency_warp_leaves_padding_and_level_spectra():
    batch = batch_of([64, 20])
    warped = frequency_warp(batch, 0.3, TINY, rng())
    assert (warped.log_mel[1, ..., 20:] == 0).all()
    level = dataclasses.replace(batch, log_mel=torch.full_like(batch.log_mel, 0.7))
    torch.testing.assert_close(frequency_warp(level, 0.3, TINY, rng()).log_mel, level.log_mel)
    assert frequency_warp(batch, 0.0, TINY, rng()) is batch
    with pytest.raises(ConfigError, match="frequency warp"):
        frequency_warp(batch, -0.1, TINY, rng())


# --- SpecAugment ------------------------------------------------------------------------------------------------------


def masks_of(log_mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, mels) and (B, frames): what is blank over all of the other axis."""
    blank = log_mel[:, 0] == 0
    return blank.all(dim=2), blank.all(dim=1)


def test_one_mask_of_each_kind_is_one_band_of_every_width_at_every_place():
    log_mel = torch.rand(3000, 1, 20, 30) + 1
    augmented = spec_augment(log_mel, 1, 4, 1, 7, rng())
    for mask, widest, size in zip(masks_of(augmented), (4, 7), (20, 30), strict=True):
        starts = torch.diff(mask.int(), prepend=torch.zeros(len(mask), 1), dim=1) == 1
        assert starts.sum(dim=1).max() == 1
        widths = mask.sum(dim=1)
        assert torch.bincount(widths).tolist() == pytest.approx([3000 / (widest + 1)] * (widest + 1), rel=0.2)
        assert mask[:, 0].any()
        assert mask[:, size - 1].any()
        ones = starts[widths == 1].int().argmax(dim=1)
        assert torch.bincount(ones, minlength=size).min() > 0
    kept = augmented != 0
    assert torch.equal(augmented[kept], log_mel[kept])
    freq, time = masks_of(augmented)
    assert torch.equal(~kept[:, 0], freq[:, :, None] | time[:, None, :])  # nothing else is blank


def test_clips_have_masks_of_their_own_and_there_may_be_several():
    log_mel = torch.ones(50, 1, 80, 100)
    freq, time = masks_of(spec_augment(log_mel, 2, 10, 3, 12, rng()))
    assert len({tuple(row.tolist()) for row in freq}) > 45
    bands = (torch.diff(time.int(), prepend=torch.zeros(50, 1), dim=1) == 1).sum(dim=1)
    assert bands.max() == 3
    assert freq.sum(dim=1).max() <= 20
    assert freq.sum(dim=1).max() > 10
    assert time.sum(dim=1).max() <= 36


def test_no_masks_change_nothing_and_impossible_ones_are_refused():
    log_mel = torch.randn(2, 1, 80, 50)
    assert torch.equal(spec_augment(log_mel, 0, 10, 0, 10, rng()), log_mel)
    assert torch.equal(spec_augment(log_mel, 3, 0, 3, 0, rng()), log_mel)
    for settings in ((1, 81, 0, 0), (0, 0, 1, 51), (-1, 5, 0, 0), (1, -1, 0, 0)):
        with pytest.raises(ConfigError, match="SpecAugment"):
            spec_augment(log_mel, *settings, rng())


# --- patch dropout ----------------------------------------------------------------------------------------------------


def test_patch_dropout_drops_whole_rows_and_columns():
    kept = kept_patches((5, 38), 2, 10, rng())
    assert (len(kept.rows), len(kept.columns), len(kept.tokens)) == (3, 28, 84)
    grid = torch.zeros(5, 38, dtype=torch.bool)
    grid.view(-1)[kept.tokens] = True
    assert (grid.sum(dim=1) == 28).sum() == 3
    assert (grid.sum(dim=0) == 3).sum() == 28
    for indices in kept:
        assert indices.dtype == torch.int64
        assert (indices.diff() > 0).all()


def test_kept_tokens_are_those_of_the_kept_rows_and_columns_as_the_encoder_orders_them():
    encoder = random_model(TINY).encoder
    log_mel = torch.randn(2, 1, 80, 64)
    kept = kept_patches(TINY.grid_size, 2, 1, rng())
    tokens = encoder.embed(log_mel)
    by_place = tokens.view(2, *TINY.grid_size, -1)[:, kept.rows][:, :, kept.columns]
    assert torch.equal(tokens[:, kept.tokens].view_as(by_place), by_place)


def test_every_row_and_column_is_dropped_now_and_then():
    generator = rng()
    rows, columns = np.zeros(5), np.zeros(8)
    for _ in range(400):
        kept = kept_patches((5, 8), 1, 2, generator)
        rows[kept.rows] += 1
        columns[kept.columns] += 1
    assert rows == pytest.approx(np.full(5, 320), rel=0.1)
    assert columns == pytest.approx(np.full(8, 300), rel=0.1)


def test_dropping_nothing_keeps_all_and_dropping_all_is_refused():
    assert kept_patches((5, 4), 0, 0, rng()).tokens.tolist() == list(range(20))
    for rows, columns in ((5, 0), (0, 4), (-1, 0)):
        with pytest.raises(ConfigError, match="one must be left"):
            kept_patches((5, 4), rows, columns, rng())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    batch = batch_of([64, 40, 20], frame_targets=True)
    on_gpu = batch.to("cuda")
    torch.testing.assert_close(mixup(on_gpu, 0.4, STD, rng()).log_mel.cpu(), mixup(batch, 0.4, STD, rng()).log_mel)
    torch.testing.assert_close(mixup(on_gpu, 0.4, STD, rng()).targets.cpu(), mixup(batch, 0.4, STD, rng()).targets)
    torch.testing.assert_close(
        random_gain(on_gpu, 6.0, STD, rng()).log_mel.cpu(), random_gain(batch, 6.0, STD, rng()).log_mel
    )
    torch.testing.assert_close(
        spec_augment(on_gpu.log_mel, 2, 20, 2, 20, rng()).cpu(), spec_augment(batch.log_mel, 2, 20, 2, 20, rng())
    )
