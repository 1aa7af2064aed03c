import matplotlib.image
import numpy as np
import pytest
import torch

from m2d_embed.errors import ConfigError
from m2d_embed.pretrain.mask_sheet import draw_sheet
from m2d_embed.pretrain.masking import STRATEGIES, MaskingConfig, draw_order, num_visible

GRIDS = [(1, 7), (5, 19), (5, 38), (1, 304), (10, 4), (12, 1), (2, 2)]
RATIOS = [0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95]
NOISES = [s for s in STRATEGIES if s.endswith("_noise")]


def visible_map(config, grid, rng):
    """(F, T) bool, True where visible."""
    image = np.zeros(grid, dtype=bool)
    image.flat[draw_order(config, grid, rng)[: num_visible(image.size, config.mask_ratio)]] = True
    return image


def draws(config, grid, count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([visible_map(config, grid, rng) for _ in range(count)])


def agreement(maps):
    """How often neighbours, in time or in mel, share their fate; the grid wraps around."""
    return np.mean([(maps == np.roll(maps, 1, axis)).mean() for axis in (1, 2) if maps.shape[axis] > 1])


def runs(line):
    """Lengths of the runs of True in a circle of bools."""
    line = np.roll(line, -int(np.argmin(line)))  # a False first: no run crosses the seam
    return [len(run) for run in "".join("x" if value else " " for value in line).split()]


@pytest.mark.parametrize("num_patches", [2, 19, 95, 190, 304, 1520])
def test_num_visible_is_the_published_formula(num_patches):
    for ratio in RATIOS:
        expected = int(num_patches * (1 - ratio))
        if expected > 0:
            assert num_visible(num_patches, ratio) == expected


def test_num_visible_of_the_published_settings():
    assert (num_visible(190, 0.7), num_visible(190, 0.6)) == (57, 76)


@pytest.mark.parametrize(("num_patches", "ratio"), [(1, 0.5), (3, 0.7), (19, 0.95), (0, 0.5), (95, 1e-20), (95, 0.0)])
def test_num_visible_needs_a_patch_of_each_kind(num_patches, ratio):
    with pytest.raises(ConfigError, match=rf"mask_ratio {ratio} leaves \d+ of {num_patches} patches visible"):
        num_visible(num_patches, ratio)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_an_order_is_a_permutation_of_all_patches(strategy, grid):
    rng = np.random.default_rng(1)
    for ratio in RATIOS:
        config = MaskingConfig(strategy, ratio)
        if int(grid[0] * grid[1] * (1 - ratio)) == 0:
            with pytest.raises(ConfigError, match="mask_ratio"):
                draw_order(config, grid, rng)
            continue
        order = draw_order(config, grid, rng)
        assert order.dtype == np.int64
        assert sorted(order) == list(range(grid[0] * grid[1]))
        assert torch.from_numpy(order).dtype == torch.int64  # refuses, e.g., a reversed view


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_generator_alone_decides(strategy):
    config, grid = MaskingConfig(strategy), (5, 19)
    first, again, other = draws(config, grid, 3), draws(config, grid, 3), draws(config, grid, 3, seed=1)
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("grid", "ratio"), [((5, 19), 0.7), ((5, 19), 0.5), ((4, 6), 0.9), ((1, 30), 0.7)])
def test_every_patch_is_visible_equally_often(strategy, grid, ratio):
    count = 1500
    maps = draws(MaskingConfig(strategy, ratio), grid, count)
    share = num_visible(grid[0] * grid[1], ratio) / (grid[0] * grid[1])
    error = (maps.mean(axis=0) - share) / np.sqrt(share * (1 - share) / count)  # in standard deviations
    assert np.abs(error).max() < 4.5
    assert np.sqrt((error**2).mean()) < 1.6  # 1 by chance; more if, say, edges are hidden less often


def test_random_hides_patches_independently():
    maps = draws(MaskingConfig("random", 0.7), (5, 19), 1000)
    share = 28 / 95
    assert agreement(maps) == pytest.approx(share**2 + (1 - share) ** 2, abs=0.02)


@pytest.mark.parametrize("grid", [(5, 19), (5, 38), (8, 8), (1, 30)])
def test_structured_masks_whole_lines_and_part_of_one(grid):
    for visible in draws(MaskingConfig("structured", 0.7), grid, 200):
        rows, columns = visible.any(axis=1), visible.any(axis=0)
        hidden_beside_lines = ~visible[rows][:, columns]
        # What lines do not explain lies in one row or in one column.
        assert min(hidden_beside_lines.any(axis=1).sum(), hidden_beside_lines.any(axis=0).sum()) <= 1


def test_structured_masks_rows_as_well_as_columns():
    maps = draws(MaskingConfig("structured", 0.7), (5, 19), 200)
    assert (~maps.any(axis=2)).any(axis=1).mean() > 0.5  # clips with a whole row hidden
    assert (~maps.any(axis=1)).any(axis=1).mean() > 0.9  # clips with a whole column hidden


@pytest.mark.parametrize("span", [1, 2, 4, 7])
@pytest.mark.parametrize("grid", [(5, 19), (5, 38), (1, 304)])
def test_spans_are_runs_of_whole_columns(grid, span):
    short = 0
    for visible in draws(MaskingConfig("spans", 0.6, span=span), grid, 100):
        mixed = visible.any(axis=0) & ~visible.all(axis=0)
        assert mixed.sum() <= 1  # one column is masked in part
        lengths = runs(~visible.any(axis=0))
        short += sum(length < span for length in lengths)
        assert sum(length < span for length in lengths) <= 1  # the last run ends where the count is met
    assert short < 100 or span > 1


def test_a_span_longer_than_the_clip_masks_one_run():
    for visible in draws(MaskingConfig("spans", 0.6, span=100), (5, 19), 50):
        assert len(runs(~visible.any(axis=0))) == 1


@pytest.mark.parametrize(("block", "grid"), [(2, (5, 19)), (3, (5, 38)), (3, (1, 304)), (4, (8, 8))])
def test_visible_patches_of_inverse_block_form_blocks(block, grid):
    for visible in draws(MaskingConfig("inverse_block", 0.8, block=block), grid, 100):
        height, width = min(block, grid[0]), min(block, grid[1])
        shifts = [(f, t) for f in range(height) for t in range(width)]
        whole = np.logical_and.reduce([np.roll(visible, (-f, -t), (0, 1)) for f, t in shifts])  # corners of full blocks
        covered = np.logical_or.reduce([np.roll(whole, (f, t), (0, 1)) for f, t in shifts])
        assert (visible & ~covered).sum() < height * width  # all but the patches of the last block, which is partial


def test_inverse_block_is_compact():
    def visible_neighbours(strategy):
        maps = draws(MaskingConfig(strategy, 0.8), (5, 38), 200)
        return sum((maps & np.roll(maps, 1, axis)).sum() for axis in (1, 2)) / maps.sum()

    assert visible_neighbours("inverse_block") > 2.5 * visible_neighbours("random")


@pytest.mark.parametrize("grid", [(5, 38), (16, 16), (1, 304)])
def test_noises_are_ordered_by_smoothness(grid):
    smoothness = {s: agreement(draws(MaskingConfig(s, 0.7), grid, 300)) for s in ["random", *NOISES]}
    assert smoothness["red_noise"] > smoothness["random"] + 0.15
    assert smoothness["blue_noise"] < smoothness["random"] - 0.03
    assert smoothness["blue_noise"] < smoothness["green_noise"] < smoothness["red_noise"]


def band_power(strategy, low, high):
    """Mean power of masks between two spatial frequencies in cycles per patch, relative to random masks."""
    grid = (24, 24)
    frequency = np.hypot(np.fft.fftfreq(grid[0])[:, None], np.fft.fftfreq(grid[1]))
    band = (frequency >= low) & (frequency < high)

    def power(name):
        maps = draws(MaskingConfig(name, 0.5), grid, 100)
        return (np.abs(np.fft.fft2(maps - maps.mean())) ** 2)[:, band].mean()

    return power(strategy) / power("random")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("red_noise", "+ -"), ("green_noise", "-+-"), ("blue_noise", "- +"), ("purple_noise", "+-+")],
)
def test_noises_have_the_spectrum_of_their_colour(strategy, expected):
    bands = [(0.01, 0.07), (0.13, 0.22), (0.4, 0.71)]
    for (low, high), sign in zip(bands, expected, strict=True):
        power = band_power(strategy, low, high)
        assert {"+": power > 1.1, "-": power < 0.6, " ": True}[sign], (low, high, power)


def test_wider_filters_make_larger_patches():
    narrow, wide = (
        agreement(draws(MaskingConfig("red_noise", sigmas=(0.4, sigma)), (16, 16), 100)) for sigma in (0.6, 2.0)
    )
    assert wide > narrow + 0.1


def test_patches_that_a_filter_makes_equal_are_hidden_at_random():
    # So wide a filter leaves whole columns equal up to rounding, of which one is hidden in part.
    partly = np.zeros(5)
    for visible in draws(MaskingConfig("red_noise", 0.7, sigmas=(1.0, 12.0)), (5, 19), 400):
        mixed = visible.any(axis=0) & ~visible.all(axis=0)
        partly += visible[:, mixed].any(axis=1)
    assert partly.min() > 50
    assert partly.max() < 1.5 * partly.min()


def test_a_filter_that_leaves_nothing_is_an_error():
    config = MaskingConfig("green_noise", 0.5, sigmas=(50.0, 60.0))
    with pytest.raises(ConfigError, match=r"sigmas \(50.0, 60.0\) leave nothing of green_noise on a grid of \(1, 8\)"):
        draw_order(config, (1, 8), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "pink_noise"}, "strategy is 'pink_noise', not one of random"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"span": 0}, "span"),
        ({"span": 1.5}, "span"),
        ({"block": 0}, "block"),
        ({"block": True}, "block"),
        ({"sigmas": (1.0, 1.0)}, "sigmas"),
        ({"sigmas": (0.0, 1.0)}, "sigmas"),
        ({"sigmas": (1.0, float("inf"))}, "sigmas"),
        ({"sigmas": (1.0,)}, "sigmas"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        MaskingConfig(**fields)


def count_pixels(file, colour):
    pixels = (matplotlib.image.imread(file)[..., :3] * 255).round()
    return (pixels == colour).all(axis=-1).sum()


def test_sheet_shows_the_share_of_visible_patches(tmp_path):
    for ratio, file in [(0.7, tmp_path / "a.png"), (0.3, tmp_path / "b.PNG")]:
        draw_sheet(file, (5, 19), ratio, examples=3)
        visible, masked = count_pixels(file, (0xFF, 0xC5, 0x3D)), count_pixels(file, (0x20, 0x30, 0x4F))
        assert visible / (visible + masked) == pytest.approx(num_visible(95, ratio) / 95, abs=0.02)


def test_sheet_depends_on_the_seed_alone(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        draw_sheet(tmp_path / f"{name}.png", (1, 12), 0.5, seed, examples=1, strategies=["random"])
    a, b, c = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("a.pdf", {}, r"a\.pdf: mask sheets are PNG files"),
        ("nowhere/a.png", {}, "the folder .*nowhere does not exist"),
        ("a.png", {"examples": 0}, "nothing to draw"),
        ("a.png", {"strategies": []}, "nothing to draw"),
        ("a.png", {"strategies": ["grey"]}, "strategy is 'grey'"),
        ("a.png", {"mask_ratio": 0.999}, "leaves 0 of 95"),
    ],
)
def test_sheet_refuses(tmp_path, name, fields, message):
    with pytest.raises(ConfigError, match=message):
        draw_sheet(tmp_path / name, **{"grid": (5, 19), "mask_ratio": 0.7, **fields})
    assert not list(tmp_path.iterdir())
