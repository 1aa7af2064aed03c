"""What fine-tuning trains on: crops by position, targets to the column, clips as inference sees them."""

import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import DATA, TINY, random_model

from m2d_embed.audio.clips import load_audio
from m2d_embed.config import HeadConfig, ModelConfig
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.finetune.crops import (
    EvaluationClips,
    TrainingClips,
    balanced_weights,
    event_targets,
    longest_frames,
    num_columns,
)
from m2d_embed.labelled.clips import LabelledClips
from m2d_embed.labelled.events import Event, LabelledEvents
from m2d_embed.m2d import M2D

RATE = 16_000
LABELS = ("bell", "hum", "rain")
SECONDS = (0.4, 1.0, 1.7, 0.62, 2.0, 0.05, 1.003)  # of the clips; crops are of 0.64 s
CROP = 64


def write_noise(folder: Path, seconds: float, number: int, rate: int = RATE) -> Path:
    """Noise that gets louder, so that every place of a clip is unlike the others."""
    samples = np.random.default_rng(number).normal(size=round(seconds * rate)) * np.linspace(
        0.01, 0.2, round(seconds * rate)
    )
    path = folder / f"{number}.wav"
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("clips")
    return tuple(write_noise(folder, seconds, i, 22_050 if i == 2 else RATE) for i, seconds in enumerate(SECONDS))


@pytest.fixture(scope="module")
def clips(files) -> LabelledClips:
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    return LabelledClips(files, labels, LABELS, np.zeros(len(files), dtype=np.int64))


def events_of(files, *events: tuple[Event, ...]) -> LabelledEvents:
    rows = (*events, *[()] * (len(files) - len(events)))
    labels = np.array([[any(e.label == i for e in row) for i in range(len(LABELS))] for row in rows])
    return LabelledEvents(LabelledClips(files, labels, LABELS, np.zeros(len(files), dtype=np.int64)), rows)


def training(data, crop_frames: int = CROP, **settings) -> TrainingClips:
    indices = np.arange(len(data))
    settings = {"seed": 3, "balanced": False, "progress": False} | settings
    return TrainingClips(TINY, data, indices, crop_frames, **settings)


def whole(file: Path) -> torch.Tensor:
    """(mels, frames) of a clip as the model sees it."""
    return M2D(TINY).log_mel(torch.from_numpy(load_audio(file, RATE))[None])[0, 0]


# --- random crops -----------------------------------------------------------------------------------------------------


def test_crops_are_stretches_of_the_clip_that_inference_sees_padded_with_zeros(clips):
    batch = training(clips).batch(0, 70)
    assert batch.log_mel.shape == (70, 1, 80, CROP)
    assert batch.log_mel.dtype == torch.float32
    places = set()
    for log_mel, valid, name in zip(batch.log_mel[:, 0], batch.valid_frames.tolist(), batch.names, strict=True):
        expected = whole(Path(name))
        assert valid == min(CROP, expected.shape[1])
        assert (log_mel[:, valid:] == 0).all()
        stretches = expected.unfold(1, valid, 1).permute(1, 0, 2)  # one at each place
        distances = (stretches - log_mel[:, :valid]).abs().amax(dim=(1, 2))
        assert distances.min() < 2e-3  # float16
        places.add((name, int(distances.argmin())))
    assert len(places) > 30  # ten times each of four clips longer than a crop


def test_places_of_crops_are_uniform_from_the_first_to_the_last(files):
    one = LabelledClips(files[1:3], np.array([0, 1]), LABELS, np.zeros(2, dtype=np.int64))
    batch = TrainingClips(TINY, one, [0], CROP, seed=0, balanced=False, progress=False).batch(0, 800)
    stretches = whole(files[1]).unfold(1, CROP, 1).permute(1, 0, 2)
    places = [int((stretches - crop).abs().mean(dim=(1, 2)).argmin()) for crop in batch.log_mel[:, 0]]
    assert (min(places), max(places)) == (0, len(stretches) - 1)
    assert len(stretches) == 38
    assert np.mean(places) == pytest.approx(18.5, abs=1.5)


def test_a_position_has_the_same_crop_whoever_asks_for_it_and_in_whichever_batch(clips):
    long = training(clips).batch(0, 24)
    again = training(clips)
    shares = [again.batch(position, 3) for position in (21, 0, 12, 3, 9, 6, 18, 15)]  # epochs of seven clips
    order = np.argsort([21, 0, 12, 3, 9, 6, 18, 15])
    assert torch.equal(torch.cat([shares[i].log_mel for i in order]), long.log_mel)
    assert torch.equal(torch.cat([shares[i].targets for i in order]), long.targets)
    assert [name for i in order for name in shares[i].names] == long.names
    assert not torch.equal(training(clips, seed=4).batch(0, 24).log_mel, long.log_mel)


def test_every_epoch_is_a_new_permutation(clips):
    names = training(clips).batch(0, 70).names
    epochs = [tuple(names[i : i + 7]) for i in range(0, 70, 7)]
    assert all(sorted(epoch) == sorted(map(str, clips.files)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_targets_are_those_of_the_clip(clips, files):
    batch = training(clips).batch(0, 14)
    label_of = {str(file): label for file, label in zip(files, clips.labels, strict=True)}
    assert batch.targets.dtype == torch.float32
    assert batch.targets.argmax(dim=1).tolist() == [label_of[name] for name in batch.names]
    assert (batch.targets.sum(dim=1) == 1).all()


def test_clips_with_several_labels_have_several_targets(files):
    labels = np.array([[True, True, False], [False, False, False], [False, False, True]])
    some = LabelledClips(files[:3], labels, LABELS, np.zeros(3, dtype=np.int64))
    batch = training(some).batch(0, 3)
    for name, target in zip(batch.names, batch.targets, strict=True):
        assert target.tolist() == labels[[str(f) for f in files].index(name)].tolist()


def test_the_mask_has_the_columns_that_inference_gives(clips, tiny):
    batch = training(clips, crop_frames=100).batch(0, 7)
    assert batch.mask.shape == (7, tiny.encode_frames(batch.log_mel).shape[1])
    for log_mel, mask, valid in zip(batch.log_mel, batch.mask, batch.valid_frames, strict=True):
        columns = tiny.encode_frames(log_mel[None, ..., :valid]).shape[1]
        assert mask.tolist() == [i < columns for i in range(len(mask))]
    assert not batch.mask.all()


@pytest.mark.parametrize("balanced", [False, True])
def test_log_mels_that_find_no_room_are_computed_from_the_files(clips, balanced):
    in_memory, on_the_fly = training(clips, balanced=balanced), training(clips, balanced=balanced, max_cached_bytes=0)
    assert in_memory.cached
    assert not on_the_fly.cached
    first, second = in_memory.batch(0, 30), on_the_fly.batch(0, 30)
    assert first.names == second.names
    torch.testing.assert_close(first.log_mel, second.log_mel, rtol=0, atol=2e-3)


def test_a_long_file_on_the_fly_is_read_in_pieces(tmp_path):
    """40 s are more than one block of samples and of frames."""
    files = (write_noise(tmp_path, 40.0, 0), write_noise(tmp_path, 1.0, 1))
    clips = LabelledClips(files, np.array([0, 1]), LABELS, np.zeros(2, dtype=np.int64))
    batches = [training(clips, 500, max_cached_bytes=size).batch(0, 12) for size in (0, 10**9)]
    torch.testing.assert_close(batches[0].log_mel, batches[1].log_mel, rtol=0, atol=2e-3)


def test_a_file_that_became_shorter_is_named_and_replaced(tmp_path):
    files = (write_noise(tmp_path, 1.0, 0), write_noise(tmp_path, 1.0, 1))
    clips = LabelledClips(files, np.array([0, 1]), LABELS, np.zeros(2, dtype=np.int64))
    on_the_fly = training(clips, 100, max_cached_bytes=0)
    before = on_the_fly.batch(0, 2)
    assert sorted(before.names) == sorted(map(str, files))
    assert before.bad == {}
    write_noise(tmp_path, 0.2, 1)
    batch = on_the_fly.batch(0, 2)
    assert batch.names == [str(files[0])] * 2
    assert "1.wav: has become shorter" in batch.bad[str(files[1])]
    write_noise(tmp_path, 0.2, 0)
    with pytest.raises(AudioError, match=r"11 files drawn .* could not be read; the last: .*\.wav: has become shorter"):
        on_the_fly.batch(0, 2)


@pytest.mark.parametrize("max_cached_bytes", [0, 10**9])
def test_one_unreadable_file_in_a_hundred_is_named_and_replaced(tmp_path, max_cached_bytes):
    files = tuple(write_noise(tmp_path, 0.2, i) for i in range(100))
    files[7].write_text("not a sound")
    clips = LabelledClips(files, np.arange(100) % 2, LABELS, np.zeros(100, dtype=np.int64))
    data = training(clips, 10, max_cached_bytes=max_cached_bytes)
    batch = data.batch(0, 100)
    assert set(batch.names) == {str(file) for file in files} - {str(files[7])}
    assert list(batch.bad) == [str(files[7])]
    assert data.readable.tolist() == [row for row in range(100) if row != 7]
    assert data.batch(0, 100).names == batch.names
    assert longest_frames(TINY, clips, np.arange(100)) > 0
    with pytest.raises(AudioError, match="1 of 100 files"):
        EvaluationClips(TINY, clips, np.arange(100), progress=False)


def test_unreadable_files_are_named_all_at_once(files, tmp_path):
    text, cut, missing = tmp_path / "text.wav", tmp_path / "cut.wav", tmp_path / "missing.wav"
    text.write_text("not a sound")
    cut.write_bytes(files[1].read_bytes()[:-9000])
    bad = LabelledClips(
        (*files[:2], text, cut, missing), np.array([0, 1, 0, 1, 0]), LABELS, np.zeros(5, dtype=np.int64)
    )
    for build in (
        lambda: training(bad),
        lambda: training(bad, max_cached_bytes=0),
        lambda: EvaluationClips(TINY, bad, np.arange(5), progress=False),
    ):
        with pytest.raises(AudioError, match="3 of 5 files") as error:
            build()
        assert all(name in str(error.value) for name in ("text.wav", "cut.wav", "missing.wav"))
    with pytest.raises(AudioError, match="3 of 5 files"):
        longest_frames(TINY, LabelledClips(bad.files, bad.labels, LABELS, bad.folds), [0, 1, 2, 4, 3])


def test_only_the_clips_that_are_asked_for_are_read(files, tmp_path):
    some = LabelledClips(
        (*files[:2], tmp_path / "missing.wav"), np.array([0, 1, 1]), LABELS, np.zeros(3, dtype=np.int64)
    )
    chosen = TrainingClips(TINY, some, [1], CROP, seed=0, balanced=False, progress=False)
    assert len(chosen) == 1
    assert set(chosen.batch(0, 4).names) == {str(files[1])}
    assert chosen.batch(0, 4).targets.tolist() == [[0, 1, 0]] * 4


def test_impossible_settings(clips):
    with pytest.raises(ConfigError, match="no items"):
        TrainingClips(TINY, clips, [], CROP, seed=0, balanced=True, progress=False)
    with pytest.raises(ConfigError, match="crop_frames"):
        training(clips, crop_frames=0)
    with pytest.raises(ConfigError, match="batch_size"):
        EvaluationClips(TINY, clips, [0], batch_size=0)


def test_progress_is_shown_on_a_terminal_if_asked_for(clips, capsys, monkeypatch):
    training(clips, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    training(clips)
    assert capsys.readouterr().err == ""
    training(clips, progress=True)
    assert "log-mel" in capsys.readouterr().err


def test_the_longest_clip_by_its_header(clips, files):
    for rows in (range(len(files)), [0, 2], [5]):
        assert longest_frames(TINY, clips, rows) == max(whole(files[row]).shape[1] for row in rows)


# --- balanced draws ---------------------------------------------------------------------------------------------------


def test_balanced_draws_take_labels_equally_often(tmp_path):
    labels = np.array([0] * 24 + [1] * 6 + [2] * 2)
    files = tuple(write_noise(tmp_path, 0.05, i) for i in range(len(labels)))
    clips = LabelledClips(files, labels, LABELS, np.zeros(len(files), dtype=np.int64))
    counts = training(clips, balanced=True).batch(0, 32 * 30).targets.sum(dim=0)
    assert counts.tolist() == pytest.approx([320, 320, 320], rel=0.05)
    drawn = Counter(training(clips, balanced=True).batch(0, 32 * 30).names)
    assert len(drawn) == 32  # nothing is left out


def test_weights_are_by_the_rarest_label_and_clips_without_any_are_a_kind_of_their_own():
    targets = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool)
    expected = [1, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 2]
    assert balanced_weights(targets).tolist() == pytest.approx(expected)


# --- events -----------------------------------------------------------------------------------------------------------


def columns_of(*events: Event, start: int = 0, frames: int = CROP) -> list[list[int]]:
    """The active columns of each label; centres of a stretch from 0 are at 75, 235, 395 and 555 ms."""
    targets = event_targets(events, TINY, len(LABELS), start, frames)
    assert targets.shape == (num_columns(frames, TINY), len(LABELS))
    assert set(targets.unique().tolist()) <= {0.0, 1.0}
    return [targets[:, label].nonzero().flatten().tolist() for label in range(len(LABELS))]


def test_a_column_is_active_if_its_centre_lies_within_an_event():
    assert columns_of(Event(0, 0.075, 0.395), Event(2, 0.076, 0.394)) == [[0, 1, 2], [], [1]]
    assert columns_of(Event(1, 0.0, 9.0)) == [[], [0, 1, 2, 3], []]
    assert columns_of(Event(1, 0.0, 0.1), Event(1, 0.5, 0.6)) == [[], [0, 3], []]
    assert columns_of() == [[], [], []]


def test_a_short_event_without_a_centre_takes_the_nearest_column():
    assert columns_of(Event(0, 0.14, 0.15)) == [[0], [], []]  # the border is at 155 ms
    assert columns_of(Event(0, 0.16, 0.17)) == [[1], [], []]
    assert columns_of(Event(0, 0.0, 0.01)) == [[0], [], []]
    assert columns_of(Event(0, 0.62, 0.63)) == [[3], [], []]
    assert columns_of(Event(0, 0.66, 0.67)) == [[], [], []]
    # 7 frames of the last column are too few to give one
    assert columns_of(Event(0, 0.68, 0.69), frames=CROP + 7) == [[3], [], []]


def test_targets_of_a_crop_that_begins_within_an_event():
    event = Event(0, 0.1, 1.0)
    # From frame 50 on, centres are at 575, 735, 895, 1055 ms.
    assert columns_of(event, start=50) == [[0, 1, 2], [], []]
    # From frame 93 on, the first centre is at 1005 ms: a sliver of a long event is no short event.
    assert columns_of(event, start=93) == [[], [], []]
    # From frame 5 on, centres are at 125, 285, 445, 605 ms: of 170 to 180 ms the nearest is 125.
    assert columns_of(Event(1, 0.17, 0.18), start=5) == [[], [0], []]
    # A short event that lies mostly before the crop belongs to the crop that holds its middle.
    assert columns_of(Event(1, 0.02, 0.07), start=5) == [[], [], []]


def test_every_short_event_is_in_one_of_two_crops_that_adjoin():
    for onset in np.arange(0.3, 0.9, 0.013):
        event = Event(0, float(onset), float(onset) + 0.02)
        found = [columns_of(event, start=start)[0] for start in (20, 20 + CROP)]
        expected_first = onset + 0.01 < (20 + CROP) * 0.01
        assert [len(columns) for columns in found] == ([1, 0] if expected_first else [0, 1])


def test_times_in_decimals_are_taken_as_they_are_written():
    for column in range(200):
        time = round(0.075 + 0.16 * column, 3)
        for event in (Event(0, time, time + 0.1), Event(0, time - 0.1, time), Event(0, time, time)):
            assert columns_of(event, frames=200 * 16)[0] == [column]


def test_crops_of_events_have_the_targets_of_their_place_and_none_in_the_padding(files):
    """Column by column, against the loudest part of a clip that is silent but for one event."""
    onset, offset = 0.8, 1.3
    samples = np.full(2 * RATE, 1e-5)
    samples[int(onset * RATE) : int(offset * RATE)] = 0.5 * np.random.default_rng(0).normal(size=int(0.5 * RATE))
    path = files[0].parent / "event.wav"
    soundfile.write(path, samples.clip(-1, 1), RATE, subtype="FLOAT")
    data = events_of((path, *files[:2]), (Event(1, onset, offset),), (Event(0, 0.0, 99.0),))
    batch = training(data).batch(0, 60)
    assert batch.targets.shape == (60, CROP // 16, len(LABELS))
    assert batch.mask.shape == (60, CROP // 16)
    partly = 0
    for log_mel, target, name, mask in zip(batch.log_mel[:, 0], batch.targets, batch.names, batch.mask, strict=True):
        if name == str(path):
            columns = log_mel.unfold(1, 16, 16).mean(dim=0)  # (T, 16)
            loud = columns[:, 5:11].amin(dim=1) > 0  # around its centre, further than a frame reaches
            quiet = columns[:, 5:11].amax(dim=1) < -1
            assert loud.sum() + quiet.sum() >= len(columns) - 2
            assert target[loud, 1].all()
            assert not target[quiet, 1].any()
            assert not target[:, [0, 2]].any()
            partly += 0 < target.sum() < len(target)
        elif name == str(files[0]):  # 0.4 s, which fill 41 frames: two columns and a half
            assert target[:, 0].tolist() == mask.tolist() == [True, True, True, False]
        else:
            assert not target.any()
    assert partly > 3


def test_an_event_after_the_end_of_its_clip_is_named(files):
    data = events_of(files, (Event(0, 0.1, 0.2), Event(1, 0.45, 0.5)))
    for build in (training, lambda data: EvaluationClips(TINY, data, [0, 1], progress=False)):
        with pytest.raises(ConfigError, match=r"1 events begin after the end.*0\.wav, 0\.45 s of 0\.4 s"):
            build(data)


def test_files_with_events_that_end_after_them_are_known(files):
    data = events_of(
        files, (Event(0, 0.1, SECONDS[0] + 0.009),), (Event(1, 0.0, SECONDS[1] + 0.011),)
    )  # a frame takes 10 ms
    assert training(data).overlong == EvaluationClips(TINY, data, [0, 1], progress=False).overlong == [str(files[1])]


def test_balanced_draws_of_events_are_by_the_events_of_the_clip(files):
    data = events_of(files, *[(Event(0, 0.0, 0.03),)] * 6, (Event(1, 0.0, 0.03),))
    names = Counter(training(data, balanced=True).batch(0, 140).names)
    assert names[str(files[6])] == pytest.approx(70, abs=10)


# --- whole clips ------------------------------------------------------------------------------------------------------


def classifier(config: ModelConfig, features: str = "stacked") -> M2D:
    fields = {**config.__dict__, "head": HeadConfig(LABELS, features)}
    model = random_model(ModelConfig(**fields))
    model.head.norm.running_mean.normal_()
    return model


WINDOW_OF_68 = ModelConfig(**(TINY.__dict__ | {"input_size": (80, 68)}))


@pytest.mark.parametrize("config", [TINY, WINDOW_OF_68])
@pytest.mark.parametrize("max_cached_bytes", [0, 10**9])
def test_logits_are_those_of_each_clip_on_its_own(tmp_path, config, max_cached_bytes):
    """Lengths around patches and windows, those of which the last columns are dropped included."""
    frames = [
        1,
        7,
        8,
        9,
        15,
        16,
        17,
        23,
        24,
        25,
        40,
        41,
        63,
        64,
        65,
        66,
        67,
        68,
        69,
        71,
        72,
        73,
        127,
        128,
        129,
        136,
        200,
    ]
    paths = [write_noise(tmp_path, count * 0.01 - 0.005, i) for i, count in enumerate(frames)]
    files = (*paths, *sorted(DATA.glob("*/*.o*")))
    clips = LabelledClips(files, np.arange(len(files)) % 3, LABELS, np.zeros(len(files), dtype=np.int64))
    rows = np.arange(len(files))[::-1].copy()
    evaluation = EvaluationClips(config, clips, rows, 8, max_cached_bytes, progress=False)
    model = classifier(config)
    logits, frame_logits = {}, {}
    sizes = []
    with torch.no_grad():
        for batch_rows, log_mel in evaluation:
            sizes.append(len(batch_rows))
            assert batch_rows.dtype == np.int64
            together = model.frame_logits(log_mel)
            for row, clip, columns in zip(batch_rows, model.logits(log_mel), together, strict=True):
                logits[int(row)], frame_logits[int(row)] = clip, columns
        assert sorted(logits) == list(range(len(files)))
        assert max(sizes) > 1
        for row, file in enumerate(files):
            audio = torch.from_numpy(load_audio(file, RATE))[None]
            torch.testing.assert_close(logits[row], model.logits(audio)[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(frame_logits[row], model.frame_logits(audio)[0], rtol=0, atol=1e-4)
            assert len(evaluation.frame_times_ms(row)) == len(frame_logits[row])
    assert sorted(row for batch_rows, _ in evaluation for row in batch_rows) == list(range(len(files)))  # once more


def test_batches_hold_no_more_windows_than_asked_for(clips):
    for batch_size in (1, 2, 5):
        for rows, log_mel in EvaluationClips(TINY, clips, np.arange(len(clips)), batch_size, progress=False):
            windows = -(-num_columns(log_mel.shape[-1], TINY) // TINY.grid_size[1])
            assert len(rows) == len(log_mel)
            assert len(rows) == 1 or len(rows) * windows <= batch_size


def test_targets_and_times_of_the_frames_of_whole_clips(files, clips):
    data = events_of(files, (Event(0, 0.2, 99.0),), (Event(2, 0.97, 0.98),))
    evaluation = EvaluationClips(TINY, data, [1, 0], progress=False)
    assert evaluation.frame_times_ms(0).tolist() == [75, 235, 395]  # the end of the last lies behind that of the clip
    assert evaluation.frame_targets(0).tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert evaluation.frame_targets(1).nonzero().tolist() == [[5, 2]]
    at_the_end = events_of(files, (Event(0, 0.397, 99.0),))  # after the last centre, and ending with the clip
    assert EvaluationClips(TINY, at_the_end, [0], progress=False).frame_targets(0).nonzero().tolist() == [[2, 0]]
    assert len(evaluation) == 2
    with pytest.raises(ConfigError, match="events"):
        EvaluationClips(TINY, clips, [0], progress=False).frame_targets(0)


def test_a_table_of_events_is_read_into_batches(tmp_path):
    from m2d_embed.labelled.events import read_events

    for i in range(4):
        write_noise(tmp_path, 1.0, i)
    with (tmp_path / "events.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", "label", "onset", "offset", "fold"])
        rows.writerows([[f"{i}.wav", "ab"[i % 2], 0.3, 0.9, i // 2] for i in range(4)])
    data = read_events(tmp_path / "events.csv")
    train, test = data.clips.split(0)
    batch = TrainingClips(TINY, data, train, 101, seed=0, balanced=True, progress=False).batch(0, 2)
    assert batch.targets.shape == (2, 6, 2)
    assert batch.targets.sum(dim=1).sum(dim=0).tolist() == [4, 4]
    assert sorted(row for rows, _ in EvaluationClips(TINY, data, test, progress=False) for row in rows) == [*test]
