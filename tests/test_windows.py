"""Cutting into windows: no frame lost between them, the streamed cut the same, times true."""

import pytest
import torch

from m2d_embed.config import ModelConfig
from m2d_embed.model.windows import WindowCutter, column_times, cut, interleave, pad_to_patch

SHAPES = [((80, 64), (16, 16)), ((80, 70), (16, 16)), ((80, 20), (16, 4)), ((80, 12), (80, 2))]


def config_of(input_size, patch_size) -> ModelConfig:
    return ModelConfig(input_size=input_size, patch_size=patch_size)


@pytest.mark.parametrize(("input_size", "patch_size"), SHAPES)
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_windows_are_consecutive_and_complete(input_size, patch_size, shift):
    config = config_of(input_size, patch_size)
    patch = patch_size[1]
    for num_frames in range(1, 230):
        windows = cut(num_frames, config, shift)
        covered = shift
        for window in windows:
            assert window.start == covered
            covered = window.stop
        remaining = num_frames - shift
        full, rest = divmod(max(remaining, 0), patch)
        expected = full + (2 * rest >= patch)
        if remaining <= input_size[1]:
            expected = min(expected, input_size[1] // patch)  # what fits one window is the reference's
        if shift == 0:
            expected = max(expected, 1)
        assert sum(w.columns for w in windows) == expected, num_frames


@pytest.mark.parametrize(("input_size", "patch_size"), SHAPES)
@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("piece", [1, 7, 50, 1000])
def test_streamed_cut_is_the_same(input_size, patch_size, shift, piece):
    config = config_of(input_size, patch_size)
    for num_frames in [*range(1, 75), 128, 129, 200, 213]:
        log_mel = torch.arange(num_frames, dtype=torch.float32)[None]
        expected = [(log_mel[:, w.start : w.stop], w.columns) for w in cut(num_frames, config, shift)]
        cutter = WindowCutter(config, shift)
        got = [window for part in torch.split(log_mel, piece, dim=1) for window in cutter.push(part)]
        got += list(cutter.finish())
        assert [columns for _, columns in got] == [columns for _, columns in expected], num_frames
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(got, expected, strict=True)), num_frames


def test_reference_cases():
    base = ModelConfig()  # 80x608, 16x16
    assert sum(w.columns for w in cut(108, base)) == 7
    assert sum(w.columns for w in cut(751, base)) == 47
    assert sum(w.columns for w in cut(609, base)) == 38  # 6.08 s: the 39th column would hold one real frame
    long = ModelConfig(input_size=(80, 1001))
    assert [(w.start, w.columns) for w in cut(1001, long)] == [(0, 62)]  # 10 s fit the window, as in the reference
    assert [(w.start, w.columns) for w in cut(2001, long)] == [(0, 62), (992, 62), (1984, 1)]  # no frame is dropped


def test_padding_fills_the_last_patch_or_cuts_to_the_grid():
    config = ModelConfig(input_size=(80, 70), patch_size=(16, 16))
    assert pad_to_patch(torch.ones(80, 17), config).shape == (80, 32)
    assert pad_to_patch(torch.ones(80, 17), config)[:, 17:].abs().sum() == 0
    assert pad_to_patch(torch.ones(80, 70), config).shape == (80, 64)


def test_interleave_stops_at_the_first_gap():
    a, b, c = (torch.arange(n, dtype=torch.float32)[:, None] + 10 * i for i, n in enumerate((3, 2, 3)))
    assert interleave([a, b, c])[:, 0].tolist() == [0, 10, 20, 1, 11, 21, 2]


def test_column_times_are_centres_within_the_clip():
    config = ModelConfig()
    assert column_times(3, 16, config, 1000.0).tolist() == [75.0, 235.0, 395.0]
    assert column_times(3, 16, config, 300.0).tolist() == [75.0, 235.0]
    assert column_times(4, 4, config, 1000.0).tolist() == [75.0, 115.0, 155.0, 195.0]
    assert column_times(1, 16, config, 30.0).tolist() == [15.0]  # ends before its first centre
    assert column_times(2, 4, ModelConfig(input_size=(80, 200), patch_size=(16, 4)), 99.0).tolist() == [15.0, 55.0]
