"""Reading and checking audio: every kind of bad input has a message that says what and where."""

import multiprocessing
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import DATA

from m2d_embed.audio.clips import check_batch, find_audio, load_audio, open_clip
from m2d_embed.errors import AudioError

RATE = 16_000


@pytest.fixture
def tone() -> np.ndarray:
    return (0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def read(clip, sample_rate=None, model_rate=RATE) -> np.ndarray:
    return np.concatenate(list(open_clip(clip, sample_rate, model_rate, "clips[3]").blocks(model_rate)))


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        (".wav", "PCM_16", 1e-4),
        (".wav", "PCM_24", 1e-6),
        (".wav", "PCM_32", 1e-6),
        (".wav", "PCM_U8", 1e-2),
        (".wav", "FLOAT", 0),
        (".wav", "DOUBLE", 0),
        (".flac", "PCM_24", 1e-6),
        (".flac", "PCM_16", 1e-4),
        (".aiff", "PCM_16", 1e-4),
        (".ogg", "VORBIS", 0.05),
        (".mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_reads_every_kind_of_file(tmp_path, tone, suffix, subtype, tolerance):
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, tone, RATE, subtype=subtype)
    samples = load_audio(path, RATE)
    assert samples.dtype == np.float32
    assert samples.shape == tone.shape
    assert np.abs(samples - tone)[1000:-1000].max() <= tolerance


def test_stereo_is_averaged(tmp_path, tone):
    soundfile.write(tmp_path / "s.wav", np.stack([tone, 0.5 * tone], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "s.wav", RATE), 0.75 * tone, atol=1e-6)
    np.testing.assert_allclose(read(np.stack([tone, 0.5 * tone])), 0.75 * tone, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_files_are_resampled_as_in_one_piece(tmp_path, rate):
    samples = (0.1 * np.random.default_rng(0).standard_normal(30 * rate)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    expected = soxr.resample(samples, rate, RATE, quality="HQ")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE), expected)
    np.testing.assert_array_equal(read(samples, sample_rate=rate), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0, 16_384, -32_768], np.int16), [0, 0.5, -1]),
        (np.array([0, 1 << 30, -(1 << 31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 64, -128], np.int8), [0, 0.5, -1]),
        (np.array([0, 0.5, -1], np.float64), [0, 0.5, -1]),
        (torch.tensor([0, 0.5, -1], dtype=torch.bfloat16), [0, 0.5, -1]),
        (torch.tensor([0, 16_384, -32_768], dtype=torch.int16), [0, 0.5, -1]),
    ],
)
def test_arrays_are_scaled_by_dtype(array, expected):
    assert read(array).tolist() == expected


def test_a_resampled_clip_is_never_empty():
    assert read(np.array([0.25], np.float32), sample_rate=44_100).tolist() == [0.25]


def test_real_clips():
    samples = load_audio(DATA / "sounds" / "camera-shutter.oga", RATE)
    assert abs(len(samples) / RATE - soundfile.info(DATA / "sounds" / "camera-shutter.oga").duration) < 1e-3
    assert 0.01 < np.abs(samples).max() <= 1.5


# --- what is refused -----------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(AudioError, match=r"nowhere\.wav: no such file"):
        load_audio(tmp_path / "nowhere.wav", RATE)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path, RATE)


def test_pipe_instead_of_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match=r"pipe\.wav: not a regular file"):
        load_audio(tmp_path / "pipe.wav", RATE)


def test_name_that_is_not_unicode(tmp_path, tone):
    path = os.fsencode(tmp_path / "caf") + b"\xe9.wav"
    soundfile.write(path, tone, RATE)
    (found,) = find_audio([tmp_path])
    with pytest.raises(AudioError, match=r"caf\\udce9\.wav': this name is not valid UTF-8"):
        load_audio(found, RATE)


def test_text_named_wav(tmp_path):
    (tmp_path / "notes.wav").write_text("this is not audio " * 20)
    with pytest.raises(AudioError, match=r"notes\.wav: not audio that can be read"):
        load_audio(tmp_path / "notes.wav", RATE)


def test_file_of_no_bytes(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav: the file is empty"):
        load_audio(tmp_path / "empty.wav", RATE)


def test_file_of_no_samples(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match=r"none\.wav: the clip is empty"):
        load_audio(tmp_path / "none.wav", RATE)


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3"])
def test_truncated_file(tmp_path, suffix):
    noise = 0.1 * np.random.default_rng(0).standard_normal(5 * RATE)
    soundfile.write(tmp_path / f"whole{suffix}", noise, RATE)
    content = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=rf"cut\{suffix}: .*truncated"):
        load_audio(tmp_path / f"cut{suffix}", RATE)


def test_a_wav_streamed_to_a_pipe_is_not_truncated(tmp_path, tone):
    """Programs that cannot seek back leave the largest size in the header."""
    soundfile.write(tmp_path / "a.wav", tone, RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "a.wav", RATE)) == len(tone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path, tone, bad):
    tone[500] = bad
    with pytest.raises(AudioError, match=r"clips\[3\]: sample 500 is NaN or infinite"):
        read(tone)
    soundfile.write(tmp_path / "bad.wav", tone, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav: sample 500 is NaN"):
        load_audio(tmp_path / "bad.wav", RATE)
    with pytest.raises(AudioError, match=r"audio\[1\] has samples that are NaN"):
        check_batch(torch.from_numpy(np.stack([np.zeros_like(tone), tone])))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1, 2, 100), ()])
def test_arrays_of_a_wrong_shape(shape):
    with pytest.raises(AudioError, match=r"clips\[3\]: .*(shape|empty)"):
        read(np.zeros(shape, np.float32))


def test_samples_first_are_taken_for_a_mistake():
    with pytest.raises(AudioError, match="transpose"):
        read(np.zeros((16_000, 2), np.float32))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, bool, np.complex64, object])
def test_arrays_of_a_wrong_type(dtype):
    with pytest.raises(AudioError, match=r"clips\[3\]: samples of type"):
        read(np.zeros(100, dtype))


@pytest.mark.parametrize("level", [1e11, -1e30])
def test_samples_that_cannot_be_audio(tone, level):
    tone[7] = level
    with pytest.raises(AudioError, match=r"clips\[3\]: sample 7 is .*e\+\d+; audio lies in \[-1, 1\]"):
        read(tone)
    with pytest.raises(AudioError, match=r"audio\[0\] has samples .* far outside"):
        check_batch(torch.from_numpy(tone)[None])


def test_arrays_of_any_memory_layout(tone):
    expected = read(tone)
    frozen = tone.copy()
    frozen.flags.writeable = False
    for same in (frozen, tone[::-1].copy()[::-1], tone.astype(">f4"), np.repeat(tone, 2)[::2]):
        assert np.array_equal(read(same), expected)
    integers = np.arange(-100, 100, dtype=np.int16)
    for same in (integers.astype(">i2"), integers[::-1].copy()[::-1]):
        assert np.array_equal(read(same), integers / np.float32(32768))


def test_things_that_are_not_clips():
    with pytest.raises(AudioError, match=r"clips\[3\]: a clip is a path, an array or a tensor, not list"):
        read([0.0, 0.1])


def test_a_stated_rate_must_agree_with_the_file(tmp_path, tone):
    soundfile.write(tmp_path / "a.wav", tone, RATE)
    with pytest.raises(AudioError, match="sampled at 16000 Hz, but sample_rate=44100"):
        open_clip(tmp_path / "a.wav", 44_100, RATE, "")


@pytest.mark.parametrize("shape", [(16_000,), (1, 2, 16_000), ()])
def test_hear_batches_have_rank_two(shape):
    with pytest.raises(AudioError, match=r"\(sounds, samples\)"):
        check_batch(torch.zeros(shape))


def test_hear_batches_are_checked():
    with pytest.raises(AudioError, match="empty"):
        check_batch(torch.zeros(2, 0))
    with pytest.raises(AudioError, match="ndarray"):
        check_batch(np.zeros((1, 100), np.float32))
    with pytest.raises(AudioError, match="int64"):
        check_batch(torch.zeros(1, 100, dtype=torch.int64))
    assert check_batch(torch.tensor([[16_384]], dtype=torch.int16)).item() == 0.5
    assert check_batch(torch.zeros(1, 5, dtype=torch.float64)).dtype == torch.float32


# --- finding files -------------------------------------------------------------------------------------------------


def test_folders_globs_and_files(tmp_path, monkeypatch):
    for name in ("b.wav", "a.FLAC", "sub/c.ogg", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_audio([tmp_path])] == ["a.FLAC", "b.wav", "c.ogg"]
    assert [p.name for p in find_audio([tmp_path / "*.wav", tmp_path])] == ["b.wav", "a.FLAC", "c.ogg"]
    assert [p.name for p in find_audio([tmp_path / "sub" / "notes.txt"])] == ["notes.txt"]  # named, so meant
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in find_audio([Path("**/*.ogg")])] == ["sub/c.ogg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.wav").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert [p.relative_to(tmp_path).as_posix() for p in find_audio([tmp_path / "a"])] == ["a/b/x.wav"]
    assert [p.relative_to(tmp_path).as_posix() for p in find_audio([tmp_path / "link"])] == ["link/x.wav"]


def test_no_file_twice(tmp_path, monkeypatch):
    (tmp_path / "a.wav").touch()
    monkeypatch.chdir(tmp_path)
    named = [Path("a.wav"), tmp_path / "a.wav", Path("../") / tmp_path.name / "a.wav", Path("*.wav")]
    assert find_audio(named) == [Path("a.wav")]
    with pytest.raises(AudioError, match="not a glob pattern"):
        find_audio([Path("x/**.wav")])


@pytest.mark.parametrize("rate", [0, -16_000, 1, 16_000.0, "16000", True])
def test_impossible_rates(tone, rate):
    with pytest.raises(AudioError, match="is not a rate in Hz"):
        read(tone, sample_rate=rate)


def test_rates_may_be_numpys(tone):
    assert len(read(tone, sample_rate=np.int64(32_000))) == len(tone) // 2


def test_nothing_found(tmp_path):
    with pytest.raises(AudioError, match="no audio files in this folder"):
        find_audio([tmp_path])
    for path in (tmp_path / "missing", tmp_path / "*.wav"):
        with pytest.raises(AudioError, match="no such file or folder"):
            find_audio([path])


def _refusal_as_nobody(folder, pipe) -> None:
    if os.geteuid() == 0:
        os.setuid(65_534)
    try:
        find_audio([folder])
        pipe.send("nothing refused")
    except AudioError as error:
        pipe.send(str(error))


def _refused(path) -> str:
    """What a user who may not enter ``path`` or a folder above it is told."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_refusal_as_nobody, args=(path, theirs))
    process.start()
    theirs.close()  # so that a process that ends without a word is seen
    message = ours.recv()
    process.join()
    return message


def test_folder_that_may_not_be_read(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    if os.geteuid() == 0:  # who becomes nobody, and may have no business in the folders above
        for folder in (tmp_path, *tmp_path.parents[:-1]):
            folder.chmod(folder.stat().st_mode | 0o555)
    assert f"{locked}: cannot read this folder (Permission denied)" in _refused(locked)


def test_file_in_a_folder_that_may_not_be_read(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    assert f"{locked / 'a.wav'}: cannot be looked at (Permission denied)" in _refused(locked / "a.wav")


def test_name_that_is_too_long(tmp_path):
    with pytest.raises(AudioError, match=r"cannot be looked at \(File name too long\)"):
        find_audio([tmp_path / ("a" * 300)])
