"""Batches: the same for any number of workers and processes, from any step on, and what is in them."""

import dataclasses
import itertools
import math
import os
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY

from m2d_embed.audio.clips import load_audio
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.model.frontend import LogMel
from m2d_embed.pretrain.datasets import (
    Batch,
    BatchSpec,
    CropDataset,
    DataConfig,
    find_labels,
    loader,
    measure_stats,
    open_dataset,
)
from m2d_embed.pretrain.masking import MaskingConfig
from m2d_embed.pretrain.sources import Item, read_source
from m2d_embed.training.bad_files import BadFiles
from m2d_embed.training.sampling import ItemOrder

RATE = 16_000
RAW = LogMel(dataclasses.replace(TINY, norm_stats=(0.0, 1.0)))
WINDOW = 63 * 160  # samples of 64 frames


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Thirteen clips of 0.7 to 3 seconds, each of another level; two shorter than the window of 0.63 s."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(13):
        seconds = 0.25 + 0.1 * number if number < 2 else 0.7 + 0.2 * number
        noise = rng.uniform(-1, 1, round(seconds * RATE)) * 0.5**number
        soundfile.write(folder / f"{number:02d}.wav", noise, RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noises")
    for number in range(3):
        soundfile.write(
            folder / f"{number}.wav", np.full(4_000 + 9_000 * number, 0.1 * number + 0.1), RATE, subtype="FLOAT"
        )
    return folder


def spec_of(source, **fields) -> BatchSpec:
    known = {f.name for f in dataclasses.fields(BatchSpec)}
    rest = {name: fields.pop(name) for name in list(fields) if name in known}
    return BatchSpec(DataConfig(str(source), **fields), TINY, MaskingConfig(), **rest)


def open_crops(source, **fields) -> CropDataset:
    dataset = open_dataset(spec_of(source, **fields))
    assert isinstance(dataset, CropDataset)
    return dataset


def take(dataset, count: int, *arguments, **options) -> list[Batch]:
    return list(itertools.islice(loader(dataset, *arguments, **options), count))


def assert_same(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        mine, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other), field.name
        else:
            assert mine == other, field.name


# --- reproducible --------------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_number_of_workers(corpus, noises):
    dataset = open_crops(corpus, noise=str(noises), seed=7)
    expected = take(dataset, 6, 4, workers=0)
    for workers in (1, 2):
        for mine, other in zip(take(dataset, 6, 4, workers=workers), expected, strict=True):
            assert_same(mine, other)


@pytest.mark.parametrize(("world_size", "accumulation", "batch_size"), [(2, 1, 6), (3, 2, 2), (1, 4, 3), (4, 3, 1)])
def test_processes_and_accumulation_share_a_step(corpus, world_size, accumulation, batch_size):
    """The clips of one step are the same, in the same order, however the step is divided."""
    dataset = open_crops(corpus)
    whole = take(dataset, 3, 12, workers=0)
    ranks = [
        take(dataset, 3 * accumulation, batch_size, rank, world_size, accumulation, workers=0)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(world_size)]
        assert torch.equal(torch.cat([part.audio for part in parts]), batch.audio)
        assert torch.equal(torch.cat([part.order for part in parts]), batch.order)
        assert [name for part in parts for name in part.names] == batch.names


def test_a_run_goes_on_at_any_step(corpus):
    dataset = open_crops(corpus)
    expected = take(dataset, 10, 2, 1, 2, accumulation=2, workers=0)
    for step, workers in ((1, 0), (3, 2)):
        resumed = take(dataset, 4, 2, 1, 2, accumulation=2, first_step=step, workers=workers)
        for mine, other in zip(resumed, expected[2 * step :], strict=False):
            assert_same(mine, other)


def test_loading_leaves_the_random_numbers_of_the_process_alone(corpus):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(open_crops(corpus), 1, 2, workers=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_leave_ctrl_c_to_the_main_process(corpus):
    dataset = open_crops(corpus)
    batches = loader(dataset, 4, workers=2)
    mine = [next(batches) for _ in range(2)]  # by now both workers have begun
    for worker in batches._batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    mine += [next(batches) for _ in range(8)]
    for batch, other in zip(mine, take(dataset, 10, 4, workers=0), strict=True):
        assert_same(batch, other)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_epochs_hold_every_file_once_in_new_crops_and_masks(corpus):
    dataset = open_crops(corpus)
    assert dataset.num_items == 13
    first, second = take(dataset, 2, 13, workers=0)
    assert sorted(first.names) == sorted(second.names) == [str(file) for file in sorted(corpus.iterdir())]
    assert first.names != second.names
    long = first.names.index(str(corpus / "12.wav"))
    again = second.names.index(str(corpus / "12.wav"))
    assert not torch.equal(first.audio[long], second.audio[again])
    assert len({tuple(order.tolist()) for order in [*first.order, *second.order]}) == 26


def test_seeds_differ(corpus):
    one, two = (open_crops(corpus, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.order, two.order)


def test_weights_of_a_manifest_count(corpus, tmp_path):
    lines = [f"{file},{1 if file.stem == '05' else 0}" for file in sorted(corpus.iterdir())]
    (tmp_path / "list.csv").write_text("file,weight\n" + "\n".join(lines))
    assert set(take(open_crops(tmp_path / "list.csv"), 1, 8, workers=0)[0].names) == {str(corpus / "05.wav")}


def test_a_dataset_can_be_sent_to_a_process(corpus, noises, tmp_path):
    dataset = open_crops(corpus, noise=str(noises), cache=str(tmp_path / "cache"), workers=0)
    expected = dataset.__getitems__([3, 40])
    assert_same(pickle.loads(pickle.dumps(dataset)).__getitems__([3, 40]), expected)


# --- contents ------------------------------------------------------------------------------------------------------


def test_a_batch_of_audio(corpus):
    batch = take(open_crops(corpus), 1, 13, workers=0)[0]
    assert batch.audio.shape == (13, WINDOW)
    assert batch.audio.dtype == torch.float32
    assert RAW(batch.audio).shape == (13, 1, 80, 64)
    assert (batch.order.shape, batch.order.dtype) == ((13, 20), torch.int64)
    assert torch.equal(batch.order.sort().values, torch.arange(20).expand(13, 20))
    assert batch.valid_frames.tolist() == [64] * 13
    absent = (batch.log_mel, batch.noise_audio, batch.noise_log_mel, batch.labels, batch.captions, batch.features)
    assert all(part is None for part in absent)
    assert not batch.bad


def test_crops_are_stretches_of_their_files(corpus):
    batch = take(open_crops(corpus), 1, 13, workers=0)[0]
    for name, audio in zip(batch.names, batch.audio.numpy(), strict=True):
        whole = load_audio(name, RATE)
        if len(whole) > WINDOW:
            starts = np.flatnonzero(whole == audio[0])
            assert any(np.array_equal(whole[start : start + WINDOW], audio) for start in starts)


@pytest.mark.parametrize("how", ["repeat", "pad"])
def test_short_clips(corpus, how):
    batch = take(open_crops(corpus, short_clips=how), 1, 13, workers=0)[0]
    row = batch.names.index(str(corpus / "00.wav"))
    whole = load_audio(corpus / "00.wav", RATE)
    assert len(whole) == 4_000
    expected = np.resize(whole, WINDOW) if how == "repeat" else np.pad(whole, (0, WINDOW - len(whole)))
    np.testing.assert_array_equal(batch.audio[row], expected)
    assert batch.valid_frames[row] == (64 if how == "repeat" else 26)
    assert batch.valid_frames[batch.names.index(str(corpus / "12.wav"))] == 64


def test_noise_comes_with_every_clip(corpus, noises):
    batch = take(open_crops(corpus, short_clips="pad", noise=str(noises)), 1, 26, workers=0)[0]
    assert batch.noise_audio.shape == batch.audio.shape
    levels = batch.noise_audio[:, 0]
    assert torch.equal(batch.noise_audio, levels[:, None].expand(-1, WINDOW))  # repeated, whatever short clips are
    assert {round(level, 4) for level in levels.tolist()} == {0.1, 0.2, 0.3}
    plain = take(open_crops(corpus, short_clips="pad"), 1, 26, workers=0)[0]
    assert torch.equal(plain.audio, batch.audio)  # noise draws from numbers of its own


def write_manifest(folder: Path, corpus: Path, dim: int = 2) -> Path:
    """The corpus with labels, captions, and features whose first value is the time in seconds, 100 of them each."""
    rows = []
    for number, file in enumerate(sorted(corpus.iterdir())):
        hop = 0.025
        times = (np.arange(math.ceil(soundfile.info(file).duration / hop)) + 0.5) * hop
        np.save(folder / f"{number}.npy", np.stack([times, np.full(len(times), number)][:dim], axis=1).astype("f4"))
        rows.append(f"{file},{'odd;' * (number % 2)}{'big' if number > 9 else ''},clip {number // 2},{number}.npy")
    (folder / "list.csv").write_text("file,labels,caption,features\n" + "\n".join(rows))
    return folder / "list.csv"


def test_labels_captions_and_features(corpus, tmp_path):
    source = write_manifest(tmp_path, corpus)
    assert find_labels(str(source)) == ("big", "odd")
    fields = {"labels": ("odd", "big"), "captions": True, "features": True, "feature_hop_ms": 25.0}
    dataset = open_crops(source, **fields)
    batch = take(dataset, 1, 13, workers=0)[0]
    numbers = [int(Path(name).stem) for name in batch.names]
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [[float(n % 2), float(n > 9)] for n in numbers]
    assert batch.captions == [f"clip {n // 2}" for n in numbers]
    assert (batch.features.shape, batch.features.dtype) == ((13, 4, 2), torch.float32)
    assert batch.features[:, :, 1].tolist() == [[n] * 4 for n in numbers]


def test_features_are_those_of_the_times_of_the_columns(corpus, tmp_path):
    """Column i of 16 frames is centred at (16 i + 7.5) x 10 ms after the start of the crop."""
    dataset = open_crops(write_manifest(tmp_path, corpus), features=True, feature_hop_ms=25.0)
    batch = take(dataset, 1, 13, workers=0)[0]
    for name, audio, features in zip(batch.names, batch.audio.numpy(), batch.features, strict=True):
        whole = load_audio(name, RATE)
        start = next(s for s in np.flatnonzero(whole == audio[0]) if np.array_equal(whole[s : s + 99], audio[:99]))
        expected = start / RATE + np.array([0.075, 0.235, 0.395, 0.555])
        if len(whole) < WINDOW:
            expected %= len(whole) / RATE
        expected = expected.clip(0.0125, None)
        np.testing.assert_allclose(features[:, 0], expected, atol=0.01 if len(whole) < WINDOW else 1e-5)


def test_features_past_the_end_are_those_of_the_end(corpus, tmp_path):
    dataset = open_crops(write_manifest(tmp_path, corpus), features=True, feature_hop_ms=25.0, short_clips="pad")
    batch = take(dataset, 1, 13, workers=0)[0]
    row = batch.names.index(str(corpus / "00.wav"))  # 0.25 s: 10 frames of features, the last at 0.2375 s
    np.testing.assert_allclose(batch.features[row, :, 0], [0.075, 0.235, 0.2375, 0.2375], atol=1e-6)


def test_what_the_manifest_lacks(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"00\.wav: has no features; the manifest's column 'features'"):
        open_crops(corpus, features=True)
    with pytest.raises(ConfigError, match=r"00\.wav: has no caption"):
        open_crops(corpus, captions=True)
    with pytest.raises(ConfigError, match="no labels; give a manifest a column"):
        find_labels(str(corpus))
    with pytest.raises(ConfigError, match=r"01\.wav: its label 'odd' is not one of the 1 given"):
        open_crops(write_manifest(tmp_path, corpus), labels=("big",))


def test_features_of_another_size(corpus, tmp_path):
    source = write_manifest(tmp_path, corpus)
    np.save(tmp_path / "3.npy", np.zeros((40, 5), np.float32))
    with pytest.raises(AudioError, match=r"features have .* values a frame, but those of"):
        take(open_crops(source, features=True), 1, 13, workers=0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}], dtype=object), "cannot be read .*Python objects"),
        (np.zeros(5, np.float32), "shape .frames, values"),
        (np.zeros((5, 2), np.int64), "floating-point"),
        (np.zeros((0, 2), np.float32), "floating-point"),
        (np.full((90, 2), np.nan, np.float32), "not finite"),
    ],
)
def test_features_that_cannot_be_used(corpus, tmp_path, array, message):
    source = write_manifest(tmp_path, corpus)
    np.save(tmp_path / "5.npy", array, allow_pickle=True)
    batch = take(open_crops(source, features=True), 1, 13, workers=0)[0]
    assert list(batch.bad) == [str(corpus / "05.wav")]
    assert str(tmp_path / "5.npy") in batch.bad[str(corpus / "05.wav")]
    assert re.search(message, batch.bad[str(corpus / "05.wav")])


def test_a_batch_moves(corpus, noises):
    batch = open_crops(corpus, noise=str(noises)).__getitems__([0, 1, 2])
    moved = batch.to("meta")
    tensors = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.audio.device.type == "cpu"
    assert (moved.names, len(moved)) == (batch.names, 3)


# --- cache ---------------------------------------------------------------------------------------------------------


def test_a_cache_gives_the_log_mels(corpus, noises, tmp_path):
    dataset = open_crops(corpus, cache=str(tmp_path / "cache"), noise=str(noises), workers=0)
    assert {folder.name for folder in (tmp_path / "cache").iterdir()} == {"clips", "noise"}
    batch = take(dataset, 1, 13, workers=0)[0]
    assert batch.audio is None
    assert batch.noise_audio is None
    assert (batch.log_mel.shape, batch.log_mel.dtype) == ((13, 1, 80, 64), torch.float16)
    assert (batch.noise_log_mel.shape, batch.noise_log_mel.dtype) == ((13, 1, 80, 64), torch.float16)
    for name, mels in zip(batch.names, batch.log_mel[:, 0].float(), strict=True):
        whole = RAW(torch.from_numpy(load_audio(name, RATE))[None])[0, 0]
        if whole.shape[1] < 64:
            whole = whole[:, torch.arange(64) % whole.shape[1]]
        starts = range(whole.shape[1] - 63)
        assert min((whole[:, s : s + 64] - mels).abs().max() for s in starts) < 0.01
    for workers in (1, 2):
        assert_same(take(dataset, 1, 13, workers=workers)[0], batch)


def test_a_cache_agrees_with_the_audio_where_crops_match(corpus, tmp_path):
    """The 26 frames of a short padded clip, which has no choice of its place."""
    batches = [
        take(open_crops(corpus, short_clips="pad", cache=cache, workers=0), 1, 13, workers=0)[0]
        for cache in (None, str(tmp_path / "cache"))
    ]
    assert torch.equal(batches[0].valid_frames, batches[1].valid_frames)
    assert torch.equal(batches[0].order, batches[1].order)
    row = batches[0].names.index(str(corpus / "00.wav"))
    direct = RAW(batches[0].audio[row : row + 1])[0, 0]
    inner = slice(2, 24)  # at the end, the padding is seen in one case and the mirrored clip in the other
    torch.testing.assert_close(batches[1].log_mel[row, 0, :, inner].float(), direct[:, inner], atol=0.01, rtol=0)
    assert batches[1].log_mel[row, 0, :, 26:].eq(0).all()


def test_features_with_a_cache(corpus, tmp_path):
    source = write_manifest(tmp_path, corpus)
    dataset = open_crops(source, cache=str(tmp_path / "cache"), features=True, feature_hop_ms=25.0, workers=0)
    batch = take(dataset, 1, 13, workers=0)[0]
    row = batch.names.index(str(corpus / "12.wav"))
    np.testing.assert_allclose(np.diff(batch.features[row, :, 0]), 0.16, atol=1e-5)


# --- bad files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(corpus, tmp_path) -> Path:
    """A manifest with one clip that is not audio and one that is missing."""
    (tmp_path / "broken.wav").write_text("not audio")
    lines = [str(file) for file in sorted(corpus.iterdir())]
    (tmp_path / "list.csv").write_text("\n".join(["file", *lines[:6], "broken.wav", "gone.wav", *lines[6:]]))
    return tmp_path / "list.csv"


@pytest.mark.parametrize("cached", [False, True])
def test_bad_files_are_replaced_and_named(spoilt, tmp_path, cached):
    fields = {"cache": str(tmp_path / "cache"), "workers": 0} if cached else {}
    dataset = open_crops(spoilt, **fields)
    batch = take(dataset, 1, 15, workers=0)[0]
    assert len(batch) == 15
    assert {Path(name).name: reason for name, reason in batch.bad.items()} == {
        "broken.wav": f"{spoilt.parent / 'broken.wav'}: not audio that can be read (Format not recognised.).",
        "gone.wav": f"{spoilt.parent / 'gone.wav'}: no such file.",
    }
    assert not {Path(name).name for name in batch.names} & {"broken.wav", "gone.wav"}
    for workers in (1, 2):
        assert_same(take(dataset, 1, 15, workers=workers)[0], batch)
    order = ItemOrder(np.ones(15), 0)
    names = [read_source(str(spoilt))[order.item_at(i)].file.name for i in range(15)]
    kept = [i for i, name in enumerate(names) if name not in ("broken.wav", "gone.wav")]
    assert [Path(batch.names[i]).name for i in kept] == [names[i] for i in kept]


def test_bad_noise_is_replaced_and_named(corpus, tmp_path):
    soundfile.write(tmp_path / "n.wav", np.full(20_000, 0.25), RATE)
    (tmp_path / "broken.wav").write_text("not audio")
    batch = take(open_crops(corpus, noise=str(tmp_path)), 1, 13, workers=0)[0]
    assert list(batch.bad) == [str(tmp_path / "broken.wav")]
    assert batch.noise_audio.eq(0.25).all()


def test_nothing_but_bad_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.wav").write_text("not audio")
    dataset = open_crops(tmp_path)
    for workers in (0, 1):
        with pytest.raises(AudioError, match=r"^11 files drawn .* could not be read; the last: .*\.wav: not audio"):
            take(dataset, 1, 2, workers=workers)


def bad_batch(*names: str, size: int = 10) -> Batch:
    empty = torch.zeros(size, dtype=torch.int64)
    return Batch(None, None, empty, empty, bad={name: f"{name}: why" for name in names})


def test_one_percent_of_known_files():
    bad = BadFiles(total=200)
    assert bad.add(bad_batch("a", "b")) == {"a": "a: why", "b": "b: why"}
    bad.check(seen=10)
    assert bad.add(bad_batch("a", "b")) == {}
    bad.check()
    bad.add(bad_batch("c"))
    with pytest.raises(AudioError, match=r"3 of 200 files could not be read, more than 1%:\n  a: why\n  b: why\n  c"):
        bad.check()


def test_one_percent_of_samples_seen():
    bad = BadFiles(total=None)
    bad.add(bad_batch(*"abc", size=99))
    bad.check()  # too early to tell
    bad.check(seen=300)
    with pytest.raises(AudioError, match="3 of 299 files"):
        bad.check(seen=299)
    bad.add(bad_batch(size=1))
    with pytest.raises(AudioError, match="3 of 100 files"):
        bad.check()


def test_at_most_ten_bad_files_are_named():
    bad = BadFiles(total=20)
    bad.add(bad_batch(*(f"f{i}" for i in range(14))))
    with pytest.raises(AudioError, match=r"14 of 20(?s:.*)f9: why\n  and 4 more\nRepair") as caught:
        bad.check()
    assert "f10" not in str(caught.value)


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_stats_are_those_of_the_first_crops(corpus, tmp_path, cached):
    fields = {"cache": str(tmp_path)} if cached else {}
    dataset = open_crops(corpus, short_clips="pad", norm_crops=40, workers=0, **fields)
    frames = []
    for position in range(40):
        batch = dataset[position]
        mels = batch.log_mel.float() if cached else RAW(batch.audio)
        frames.append(mels[0, 0, :, : batch.valid_frames[0]].numpy().astype(np.float64).ravel())
    values = np.concatenate(frames)
    assert measure_stats(dataset) == pytest.approx((values.mean(), values.std()), rel=1e-6)


def test_stats_depend_on_the_seed_only(corpus, noises):
    stats = [
        measure_stats(open_crops(corpus, norm_crops=50, seed=seed, **fields))
        for seed, fields in ((0, {"workers": 2}), (0, {"noise": str(noises), "workers": 0}), (1, {"workers": 0}))
    ]
    assert stats[0] == stats[1] != stats[2]


def test_stats_of_silence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(20_000), RATE)
    with pytest.raises(AudioError, match="digital silence"):
        measure_stats(open_crops(tmp_path, workers=0))


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": " "}, "data.source is empty"),
        ({"source": "pipe:curl x"}, "pipe: is not read"),
        ({"short_clips": "loop"}, r'data.short_clips is "repeat" or "pad", not \'loop\''),
        ({"norm_stats": (0.0, 0.0)}, "data.norm_stats"),
        ({"norm_stats": (math.nan, 1.0)}, "data.norm_stats"),
        ({"norm_crops": 0}, "data.norm_crops"),
        ({"source": "a.tar", "cache": "c"}, "data.cache: shards"),
        ({"noise": "a.tar"}, "data.noise must be a folder"),
        ({"noise": ""}, "data.noise must be a folder"),
        ({"noise_ratio": 1.0}, "data.noise_ratio"),
        ({"feature_hop_ms": 0.0}, "data.feature_hop_ms"),
        ({"workers": -1}, "data.workers"),
    ],
)
def test_options_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"source": "folder", **fields})


def test_a_window_too_short_to_train_on():
    with pytest.raises(ConfigError, match="input_size has 1 frames"):
        config = dataclasses.replace(TINY, input_size=(80, 1), patch_size=(80, 1))
        BatchSpec(DataConfig("folder"), config, MaskingConfig())


def test_a_cache_of_other_items(corpus, tmp_path):
    dataset = open_crops(corpus, cache=str(tmp_path), workers=0)
    with pytest.raises(ConfigError, match="a cache of 13 files, but there are 1 items"):
        CropDataset([Item(corpus / "00.wav")], dataset.spec, dataset._clips.cache)


def test_real_clips():
    batch = take(open_crops(DATA), 1, 12, workers=0)[0]
    assert batch.audio.abs().amax(dim=1).gt(0).all()
    assert not batch.bad
