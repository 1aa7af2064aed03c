"""Files as encoders, recorders, pipes and `cat` really leave them: read whole, or refused by name; never a part."""

import io
import logging
import os
import struct
from contextlib import closing
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch

from m2d_embed.audio import sounds
from m2d_embed.audio.clips import load_audio, open_clip
from m2d_embed.audio.ffmpeg import FFmpegSound
from m2d_embed.errors import AudioError
from m2d_embed.pretrain.crops import read_crop

MP3 = [
    (rate, channels, mode, level)
    for rate in (8_000, 16_000, 24_000, 44_100)
    for channels in (1, 2)
    for mode, level in (("VARIABLE", 0.5), ("VARIABLE", 0.99), ("AVERAGE", 0.9), ("CONSTANT", 0.99))
]


def sparse(rate: int, channels: int = 1, seconds: float = 12) -> np.ndarray:
    """A burst of noise every two seconds and silence between: what fills the bit reservoir of an encoder."""
    rng = np.random.default_rng(0)
    samples = np.zeros((round(rate * seconds), channels), np.float32)
    for start in range(0, len(samples) - rate // 2, 2 * rate):
        burst = rng.standard_normal((rate // 3, channels)) * np.hanning(rate // 3)[:, None]
        samples[start : start + rate // 3] = 0.4 * burst
    return samples


def encoded(samples: np.ndarray, rate: int, kind: str = "MP3", **settings) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, **settings)
    return stream.getvalue()


def by_ffmpeg(samples: np.ndarray, rate: int, container: str, codec: str, **options) -> bytes:
    """(n,) encoded by FFmpeg's libraries."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec, rate=rate, options=options)
        track.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(track.format, "mono", rate, frame_size=track.codec_context.frame_size or 1024)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(track.encode(part))
    return stream.getvalue()


def own_rate(source) -> np.ndarray:
    """The samples of a file at its own rate, averaged over its channels."""
    with sounds.open_sound(source, "clip") as sound:
        return np.concatenate([np.empty(0, np.float32), *sound.blocks()])


def libsndfiles(content: bytes) -> np.ndarray:
    """What one read of the whole file gives."""
    return sounds.downmix(soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0])


def through_ffmpeg(content: bytes, audio_format: str) -> np.ndarray:
    with closing(FFmpegSound(io.BytesIO(content), audio_format, "clip")) as sound:
        return np.concatenate(list(sound.blocks()))


def lag(sound: np.ndarray, original: np.ndarray, reach: int = 3_000) -> int:
    """Samples by which a sound comes later than the original."""
    start, stop = len(original) // 4, len(original) // 2
    shifts = range(-reach, reach + 1)
    return max(shifts, key=lambda shift: float(sound[start + shift : stop + shift] @ original[start:stop]))


def frames_of(mp3: bytes) -> list[bytes]:
    """The frames of an MP3 without tags before them."""
    from m2d_embed.audio.mp3 import parse_header

    frames, at = [], 0
    while (header := parse_header(mp3[at : at + 4])) is not None:
        frames.append(mp3[at : at + header.size])
        at += header.size
    return frames


class Draw:
    """In place of a random generator: says which of the possible places is taken."""

    def __init__(self, share: float):
        self.share = share

    def integers(self, stop: int) -> int:
        return round(self.share * (stop - 1))


# --- MP3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "channels", "mode", "level"), MP3)
def test_an_mp3_in_blocks_is_one_read_of_it(monkeypatch, rate, channels, mode, level):
    content = encoded(sparse(rate, channels), rate, bitrate_mode=mode, compression_level=level)
    expected = libsndfiles(content)
    monkeypatch.setattr(sounds, "_BLOCK_SAMPLES", 7_001)
    found = own_rate(content)
    np.testing.assert_array_equal(found[: len(expected)], expected[: len(found)])
    assert abs(len(found) - len(sparse(rate))) <= 3 * 1_152


@pytest.mark.parametrize(("rate", "channels", "mode", "level"), MP3)
def test_a_crop_of_an_mp3_is_the_stretch_of_the_whole(tmp_path, rate, channels, mode, level):
    file = tmp_path / "clip.mp3"
    file.write_bytes(encoded(sparse(rate, channels), rate, bitrate_mode=mode, compression_level=level))
    whole = load_audio(file, rate)
    for share in np.linspace(0, 1, 23):
        crop = read_crop(file, rate, 3_000, Draw(share), "clip")
        start = round(crop.start_seconds * rate)
        # Where a decoder begins changes the order of its sums, so the last bit.
        np.testing.assert_allclose(crop.samples, whole[start : start + 3_000], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rate", "channels", "mode", "level"), [m for m in MP3 if m[2] != "CONSTANT"])
def test_an_mp3_without_length_is_read_to_its_end(tmp_path, rate, channels, mode, level):
    """As encoders leave it that write to a pipe: the frame that tells the length is missing."""
    with_header = encoded(sparse(rate, channels), rate, bitrate_mode=mode, compression_level=level)
    _, *frames = frames_of(with_header)
    content = b"".join(frames)
    found = own_rate(content)
    assert len(found) == len(frames) * (1_152 if rate >= 32_000 else 576)
    # All frames are kept: nothing says what the encoder put before and after.
    np.testing.assert_allclose(found[1_105:][: len(sparse(rate))], own_rate(with_header), atol=1e-6)
    np.testing.assert_allclose(found, through_ffmpeg(content, "mp3")[: len(found)], atol=2e-3)
    (tmp_path / "a.mp3").write_bytes(content)
    crop = read_crop(tmp_path / "a.mp3", rate, 2_000, Draw(1.0), "a")
    np.testing.assert_allclose(crop.samples, found[-2_000:], atol=1e-6)
    assert crop.clip_seconds == len(found) / rate == open_clip(content, None, rate, "a").seconds


def test_the_guessed_length_of_a_constant_bit_rate_is_no_promise(tmp_path):
    samples = sparse(44_100)
    content = encoded(samples, 44_100, bitrate_mode="CONSTANT", compression_level=0.99)
    assert b"Info" not in content[:200]
    assert soundfile.info(io.BytesIO(content)).frames > len(own_rate(content)) >= len(samples)


def test_mp3_in_wav():
    mp3 = b"".join(frames_of(encoded(sparse(44_100), 44_100, bitrate_mode="CONSTANT", compression_level=0.9)))
    extra = struct.pack("<HIHHH", 1, 2, 417, 1, 1_393)
    fmt = struct.pack("<HHIIHHH", 0x55, 1, 44_100, 8_000, 1, 0, len(extra)) + extra
    wav = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(mp3)) + mp3
    np.testing.assert_array_equal(own_rate(b"RIFF" + struct.pack("<I", len(wav)) + wav), own_rate(mp3))


@pytest.mark.parametrize("pipe", [False, True])
def test_tags_around_an_mp3_are_passed_over(pipe):
    content = encoded(sparse(44_100), 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    bare = b"".join(frames_of(content)[1:]) if pipe else content
    picture = b"\xff\xfb\x90\x44" * 3_000  # looks like frames
    size = len(picture)
    id3 = b"ID3\x03\0\0" + bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127]) + picture
    ape = b"APETAGEX" + struct.pack("<IIII8x", 2_000, 40 + 32, 1, 0xA000_0000)
    ape += bytes(40) + b"APETAGEX" + struct.pack("<IIII8x", 2_000, 40 + 32, 1, 0x8000_0000)
    tagged = id3 + bare + ape + b"TAG" + bytes(125)
    np.testing.assert_array_equal(own_rate(tagged), own_rate(bare))


def test_a_recording_of_a_stream_begins_within_a_frame():
    frames = frames_of(encoded(sparse(44_100), 44_100, bitrate_mode="VARIABLE", compression_level=0.5))[1:]
    whole, cut = b"".join(frames), b"".join(frames)[len(frames[0]) // 2 :]
    found = own_rate(cut)
    assert len(found) == (len(frames) - 1) * 1_152
    np.testing.assert_allclose(found[20_000:], own_rate(whole)[21_152:], atol=1e-6)


def test_a_cut_mp3_is_an_error_only_if_it_states_its_length():
    content = encoded(sparse(44_100), 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    with pytest.raises(AudioError, match=r"clip: truncated, .* samples fewer than its header promises"):
        own_rate(content[: len(content) // 2])
    frames = b"".join(frames_of(content)[1:])
    assert len(own_rate(frames[: len(frames) // 2])) > 44_100


@pytest.mark.parametrize("layer", ["mp2"])
def test_layer_two(layer):
    samples = sparse(44_100)[:, 0]
    found = own_rate(by_ffmpeg(samples, 44_100, "mp2", layer))
    assert lag(found, samples) == 481  # of its filters; nothing states it
    assert len(samples) <= len(found) < len(samples) + 2 * 1_152


# --- joined files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "OGG", "OPUS"])
@pytest.mark.parametrize("seconds", [(5, 5), (5, 3), (3, 5), (4, 4, 4), (2, 2, 2, 2, 2)])
def test_joined_files_are_read_to_the_end(tmp_path, kind, seconds):
    settings = {"kind": "OGG", "subtype": "OPUS"} if kind == "OPUS" else {"kind": kind}
    parts = [encoded(sparse(48_000, seconds=s), 48_000, **settings) for s in seconds]
    expected = np.concatenate([libsndfiles(part) for part in parts])
    (tmp_path / "joined").write_bytes(b"".join(parts))
    clip = open_clip(tmp_path / "joined", None, 48_000, "")
    found = np.concatenate(list(clip.blocks(48_000)))
    np.testing.assert_array_equal(found, expected)
    assert clip.seconds == len(found) / 48_000
    crop = read_crop(tmp_path / "joined", 48_000, 5_000, Draw(1.0), "joined")
    np.testing.assert_array_equal(crop.samples, expected[-5_000:])


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "OGG"])
def test_joined_files_of_two_rates(kind):
    content = encoded(sparse(32_000), 32_000, kind) + encoded(sparse(16_000), 16_000, kind)
    found = own_rate(content)
    assert abs(len(found) - 2 * len(sparse(32_000))) < 10
    assert lag(found[12 * 32_000 :], sparse(32_000)[:, 0], 0) == 0


def test_an_mp3_with_a_header_and_one_without():
    one = encoded(sparse(44_100), 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    other = frames_of(one)[1:]
    found = own_rate(one + b"".join(other))
    assert len(found) == len(sparse(44_100)) + 1_152 * len(other)


# --- WAV and its relatives -------------------------------------------------------------------------------------------


def wav_with_size(size: int | None, samples: np.ndarray, behind: bytes = b"") -> bytes:
    content = bytearray(encoded(samples, 16_000, "WAV", subtype="PCM_16"))
    if size is not None:
        content[content.index(b"data") + 4 :][:4] = struct.pack("<I", size)
        at = content.index(b"data") + 4
        content[at : at + 4] = struct.pack("<I", size)
    return bytes(content) + behind


@pytest.mark.parametrize(
    "size", [0x7FFF_F000, 0x7FFF_EFDC, 0x7FFF_FFFF, 0x7FFF_FFDB, 0x7FFF_0000, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_FFDB]
)
def test_placeholders_in_wav(caplog, size):
    samples = sparse(16_000)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(own_rate(wav_with_size(size, samples)), own_rate(wav_with_size(None, samples)))
    assert not caplog.records


def test_a_wav_whose_recorder_died(tmp_path, caplog):
    (tmp_path / "died.wav").write_bytes(wav_with_size(0, sparse(16_000)))
    expected = own_rate(wav_with_size(None, sparse(16_000)))
    np.testing.assert_array_equal(load_audio(tmp_path / "died.wav", 16_000), expected)
    crop = read_crop(tmp_path / "died.wav", 16_000, 1_000, Draw(0.5), str(tmp_path / "died.wav"))
    assert crop.clip_seconds == len(expected) / 16_000
    load_audio(tmp_path / "died.wav", 16_000)
    assert [r.message for r in caplog.records if "died.wav" in r.message and "never closed" in r.message] == [
        f"{tmp_path / 'died.wav'}: its header was never closed (0 bytes of samples); "
        f"the {2 * len(expected)} behind are read."
    ]


def test_a_wav_without_samples_stays_one():
    for behind in (b"", b"LIST\x04\0\0\0INFO"):
        with pytest.raises(AudioError, match="clip: the clip is empty"):
            list(open_clip(wav_with_size(None, np.zeros(0), behind), None, 16_000, "clip").blocks(16_000))


def test_samples_that_the_header_does_not_count_are_spoken_of(caplog):
    samples = sparse(16_000)
    found = own_rate(wav_with_size(4_000, samples))
    assert len(found) == 2_000
    assert f"{2 * len(samples) - 4_000} bytes after the samples that its header states are left out" in caplog.text


def test_chunks_behind_the_samples_are_no_samples(caplog):
    samples = sparse(16_000)
    found = own_rate(wav_with_size(None, samples, b"LIST" + struct.pack("<I", 50_000) + bytes(50_000)))
    assert len(found) == len(samples) and not caplog.records


@pytest.mark.parametrize("size", [400_000, 1 << 30, 0x7FFF_F000 - 5_000, 0xFFFF_0000])
def test_a_cut_wav_is_refused(size):
    with pytest.raises(AudioError, match=rf"clip: truncated, it holds 384000 of the {size} bytes"):
        own_rate(wav_with_size(size, sparse(16_000)))


@pytest.mark.parametrize("stated", ["wrapped", 0xFFFF_FFFF, 0x7FFF_F000, 0])
def test_a_wav_of_more_than_4_gib(tmp_path, stated):
    """The field for its size has 32 bits; the file is sparse."""
    file, samples = tmp_path / "long.wav", (1 << 31) + 1_000_000
    size = (2 * samples) % (1 << 32) if stated == "wrapped" else stated
    file.write_bytes(wav_with_size(size, np.zeros(0)))
    start = file.stat().st_size
    os.truncate(file, start + 2 * samples)
    with file.open("r+b") as stream:
        stream.seek(-200, os.SEEK_END)
        stream.write(struct.pack("<100h", *range(0, 25_600, 256)))
    clip = open_clip(file, None, 16_000, "")
    assert clip.seconds == samples / 16_000
    crop = read_crop(file, 16_000, 100, Draw(1.0), "long")
    np.testing.assert_array_equal(crop.samples * 128, np.arange(100))


def relatives() -> dict[str, bytes]:
    samples = sparse(16_000)[:, 0]
    kinds = {"RF64": "RF64", "W64": "W64", "AIFF": "AIFF", "CAF": "CAF", "AU": "AU", "WAV": "WAV"}
    return {name: encoded(samples, 16_000, kind, subtype="PCM_16") for name, kind in kinds.items()}


@pytest.mark.parametrize("kind", ["RF64", "W64", "AIFF", "CAF", "AU", "WAV"])
def test_cut_relatives_of_wav_are_refused(kind):
    content = relatives()[kind]
    assert len(own_rate(content)) == 12 * 16_000
    with pytest.raises(AudioError, match=r"clip: truncated, it holds \d+ of the \d+ bytes its header promises"):
        own_rate(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("kind", "mark", "placeholder"),
    [
        ("RF64", b"ds64\x1c\0\0\0", bytes(24)),
        ("W64", b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a"), b"\xff" * 7 + b"\x7f"),
        ("AIFF", b"SSND", bytes(4)),
        ("AIFF", b"SSND", b"\x7f\0\0\x08"),
        ("CAF", b"data", b"\xff" * 8),
        ("AU", b".snd\0\0\0\x18", b"\xff" * 4),
    ],
)
def test_placeholders_in_the_relatives_of_wav(kind, mark, placeholder):
    content = relatives()[kind]
    at = content.index(mark) + len(mark)
    patched = content[:at] + placeholder + content[at + len(placeholder) :]
    np.testing.assert_array_equal(own_rate(patched), own_rate(content))


# --- FLAC ------------------------------------------------------------------------------------------------------------


def without_total(content: bytes) -> bytes:
    """A FLAC stream as encoders write it to a pipe."""
    return content[:21] + bytes([content[21] & 0xF0]) + bytes(4) + content[26:]


@pytest.mark.parametrize(("rate", "channels", "subtype"), [(16_000, 1, "PCM_16"), (44_100, 2, "PCM_24")])
def test_a_flac_that_does_not_know_its_length(tmp_path, rate, channels, subtype):
    samples = sparse(rate, channels, 11.3)
    content = encoded(samples, rate, "FLAC", subtype=subtype)
    expected = own_rate(content)
    found = own_rate(without_total(content))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(own_rate(without_total(content) * 2), np.tile(expected, 2))
    (tmp_path / "a.flac").write_bytes(without_total(content))
    crop = read_crop(tmp_path / "a.flac", rate, 2_000, Draw(1.0), "a")
    np.testing.assert_array_equal(crop.samples, expected[-2_000:])
    assert open_clip(tmp_path / "a.flac", None, rate, "").seconds == len(samples) / rate


def test_a_cut_flac_that_does_not_know_its_length_is_refused():
    content = without_total(encoded(sparse(16_000), 16_000, "FLAC"))
    with pytest.raises(AudioError, match="clip: truncated, it ends in the middle of a FLAC frame"):
        own_rate(content[: len(content) // 2])


# --- through FFmpeg -------------------------------------------------------------------------------------------------

FFMPEGS = [
    ("mp4", "aac", 44_100, "MPEG-4"),
    ("mp4", "alac", 44_100, "MPEG-4"),
    ("webm", "libopus", 48_000, "Matroska or WebM"),
    ("matroska", "flac", 44_100, "Matroska or WebM"),
    ("ogg", "flac", 44_100, "Ogg FLAC"),
    ("caf", "alac", 44_100, "Core Audio"),
    ("wv", "wavpack", 44_100, "WavPack"),
]


@pytest.mark.parametrize(("container", "codec", "rate", "title"), FFMPEGS)
def test_what_ffmpeg_reads(tmp_path, monkeypatch, container, codec, rate, title):
    samples = sparse(rate, seconds=7.3)[:, 0]
    if container == "caf":  # of a last packet that is not full, FFmpeg drops what lacks a second time
        samples = samples[: 78 * 4_096]
    file = tmp_path / "clip.m4a"
    file.write_bytes(by_ffmpeg(samples, rate, container, codec))
    found = own_rate(file)
    assert lag(found, samples) == 0
    assert len(found) == len(samples)
    crop = read_crop(file, rate, 5_000, Draw(0.7), "clip")
    start = round(crop.start_seconds * rate)
    np.testing.assert_array_equal(crop.samples, found[start : start + 5_000])
    assert abs(open_clip(file, None, rate, "").seconds - len(samples) / rate) < 0.05
    monkeypatch.setattr(sounds, "has_av", lambda: False)
    with pytest.raises(AudioError, match=rf"clip\.m4a: libsndfile does not read this {title}.*m2d-embed\[av\]"):
        load_audio(file, 16_000)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp3", "libmp3lame", 44_100),
        ("mp3", "libmp3lame", 16_000),
        ("ogg", "libopus", 48_000),
        ("flac", "flac", 44_100),
    ],
)
def test_both_decoders_agree_in_time(container, codec, rate):
    samples = sparse(rate)[:, 0]
    content = by_ffmpeg(samples, rate, container, codec)
    ours, theirs = own_rate(content), through_ffmpeg(content, container)
    assert len(ours) == len(theirs) == len(samples)
    assert lag(ours, samples) == lag(theirs, samples) == 0
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_cut_m4a_is_refused():
    content = by_ffmpeg(sparse(44_100)[:, 0], 44_100, "mp4", "aac", movflags="faststart")
    with pytest.raises(AudioError, match="clip: "):
        own_rate(content[: len(content) // 2])


def test_damaged_ffmpeg_files_are_named():
    for content in (b"\0\0\0\x20ftypM4A " + bytes(500), b"wvpk" + bytes(500)):
        with pytest.raises(AudioError, match="clip: FFmpeg"):
            own_rate(content)


def test_ffmpeg_does_not_guess(tmp_path):
    """A playlist would make it open what that names."""
    (tmp_path / "secret.aac").write_bytes(by_ffmpeg(sparse(16_000)[:, 0], 16_000, "adts", "aac"))
    (tmp_path / "list.m4a").write_text("#EXTM3U\n#EXTINF:5,\nsecret.aac\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioError, match="not audio that can be read"):
        load_audio(tmp_path / "list.m4a", 16_000)
    assert len(load_audio(tmp_path / "secret.aac", 16_000)) > 11 * 16_000


# --- sounds in memory ------------------------------------------------------------------------------------------------


class Decoder:
    """What torchcodec's AudioDecoder looks like."""

    def __init__(self, samples: np.ndarray, rate: int):
        self.samples, self.rate = samples, rate

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(self.samples.T.copy()), sample_rate=self.rate)


def test_sounds_in_memory(tmp_path):
    samples = sparse(44_100, 2, 3)
    content = encoded(samples, 44_100, "WAV", subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(content)
    expected = load_audio(tmp_path / "a.wav", 16_000)
    with (tmp_path / "a.wav").open("rb") as file:
        given = [
            content,
            bytearray(content),
            memoryview(content),
            io.BytesIO(content),
            file,
            {"bytes": content, "path": "elsewhere.wav"},
            {"bytes": None, "path": str(tmp_path / "a.wav")},
            {"array": samples.T, "sampling_rate": 44_100, "path": None},
            {"array": samples.mean(axis=1).tolist(), "sampling_rate": 44_100.0},
            Decoder(samples, 44_100),
        ]
        for clip in given:
            for _ in range(2):
                opened = open_clip(clip, None, 16_000, "clips[3]")
                assert (opened.source_rate, opened.seconds) == (44_100, 3)
                np.testing.assert_allclose(np.concatenate(list(opened.blocks(16_000))), expected, atol=1e-6)
        assert file.tell() == 0
    stream = io.BytesIO(b"something before" + content)
    stream.seek(16)
    assert open_clip(stream, None, 16_000, "").seconds == 3 and stream.tell() == 16


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (b"", r"clips\[3\]: the file is empty"),
        (b"no sound", r"clips\[3\]: not audio that can be read"),
        (io.StringIO("text"), r'clips\[3\]: open the file as binary, "rb"'),
        ({}, r"clips\[3\]: a dict has an 'array' .* this one has nothing"),
        ({"audio": 1}, r"clips\[3\]: a dict .* this one has 'audio'"),
        ({"array": np.zeros(9)}, r"clips\[3\]: a dict with an 'array' needs its 'sampling_rate'"),
        ({"array": np.zeros(9), "sampling_rate": 0}, r"clips\[3\]: sampling_rate=0 is not a rate"),
        ({"bytes": b"no sound", "path": "x.wav"}, r"clips\[3\] \(x\.wav\): not audio"),
        ({"bytes": None, "path": "nowhere.wav"}, r"nowhere\.wav: no such file"),
        ([0.0], r"clips\[3\]: a clip is a path, an array or a tensor, not list"),
    ],
)
def test_things_in_memory_that_are_no_sounds(clip, message):
    with pytest.raises(AudioError, match=message):
        open_clip(clip, None, 16_000, "clips[3]")


def test_a_stated_rate_must_agree_with_what_came_with_samples():
    with pytest.raises(AudioError, match="sampled at 44100 Hz, but sample_rate=16000"):
        open_clip({"array": np.zeros(9), "sampling_rate": 44_100}, 16_000, 16_000, "clips[3]")


def test_a_file_that_becomes_another_one(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(sparse(16_000), 16_000, "WAV"))
    clip = open_clip(tmp_path / "a.wav", None, 16_000, "")
    (tmp_path / "a.wav").write_bytes(encoded(sparse(44_100), 44_100, "WAV"))
    with pytest.raises(AudioError, match="has become another file"):
        list(clip.blocks(16_000))
