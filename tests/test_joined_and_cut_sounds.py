"""Sound files that were joined byte by byte, or cut, in every format that states how long it is."""

import contextlib
import io
import logging
import os
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from test_sound_files import Draw, by_ffmpeg, encoded, own_rate, wav_with_size, without_total

from m2d_embed.audio import sounds
from m2d_embed.audio.clips import load_audio, open_clip
from m2d_embed.audio.ends import files_in
from m2d_embed.audio.formats import ffmpeg_format
from m2d_embed.audio.stitched import Content
from m2d_embed.errors import AudioError
from m2d_embed.pretrain.crops import read_crop

ID3V1 = b"TAG" + bytes(125)
APE_TAG = b"APETAGEX" + struct.pack("<IIII8x", 2_000, 40 + 32, 1, 0xA000_0000) + bytes(40)
APE_TAG += b"APETAGEX" + struct.pack("<IIII8x", 2_000, 40 + 32, 1, 0x8000_0000)


def noise(rate: int, seconds: float = 3) -> np.ndarray:
    return (0.3 * np.random.default_rng(round(100 * seconds)).standard_normal(round(rate * seconds))).astype(np.float32)


def video(container: str, codec: str, picture: str, seconds: float, picture_seconds: float, **options: str) -> bytes:
    """A video of so many seconds of sound and of pictures."""
    rate, stream = 48_000, io.BytesIO()
    with av.open(stream, "w", format=container, options=options) as output:
        pictures, track = output.add_stream(picture, rate=10), output.add_stream(codec, rate=rate)
        pictures.width, pictures.height, pictures.pix_fmt, track.layout = 64, 48, "yuv420p", "mono"
        sound = av.AudioFrame.from_ndarray(noise(rate, seconds)[None], "fltp", "mono")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(track.format, "mono", rate, frame_size=track.codec_context.frame_size or 1024)
        parts = [*resampler.resample(sound), *resampler.resample(None), None]
        packets = [packet for part in parts for packet in track.encode(part)]
        random = np.random.default_rng(0)
        for number in range(round(10 * picture_seconds)):
            image = av.VideoFrame.from_ndarray(random.integers(0, 255, (48, 64, 3), np.uint8), "rgb24")
            frame = image.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            packets += pictures.encode(frame)
        packets += pictures.encode(None)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            output.mux(packet)
    return stream.getvalue()


def can_encode(codec: str) -> bool:
    try:
        av.Codec(codec, "w")
    except ValueError:
        return False
    return True


def by_libsndfile(kind: str, subtype: str, rate: int = 16_000) -> Callable[[float], bytes]:
    return lambda seconds: encoded(noise(rate, seconds), rate, kind, subtype=subtype)


def through_pyav(container: str, codec: str, rate: int = 44_100) -> Callable[[float], bytes]:
    def make(seconds: float) -> bytes:
        if not can_encode(codec):
            pytest.skip(f"FFmpeg has no encoder {codec} here")
        return by_ffmpeg(noise(rate, seconds), rate, container, codec)

    return make


def windows_media(seconds: float) -> bytes:
    """``by_ffmpeg`` asks for no bit rate, without which its encoder does not begin."""
    if not can_encode("wmav2"):
        pytest.skip("FFmpeg has no encoder wmav2 here")
    stream = io.BytesIO()
    with av.open(stream, "w", format="asf") as output:
        track = output.add_stream("wmav2", rate=44_100, layout="mono", bit_rate=64_000)
        samples = av.AudioFrame.from_ndarray(noise(44_100, seconds)[None], "fltp", "mono")
        samples.sample_rate, samples.pts, samples.time_base = 44_100, 0, Fraction(1, 44_100)
        for part in [samples, None]:
            output.mux(track.encode(part))
    return stream.getvalue()


LIBSNDFILES = {
    "aiff": by_libsndfile("AIFF", "PCM_16"),
    "aiff of 8 bits": by_libsndfile("AIFF", "PCM_S8", 11_025),
    "aifc": by_libsndfile("AIFF", "ULAW"),
    "au": by_libsndfile("AU", "PCM_16"),
    "caf": by_libsndfile("CAF", "PCM_16"),
    "w64": by_libsndfile("W64", "PCM_16"),
    "voc": by_libsndfile("VOC", "PCM_16"),
    "voc of 8 bits": by_libsndfile("VOC", "PCM_U8"),
    "sph": by_libsndfile("NIST", "PCM_16"),
}
FFMPEGS = {
    "m4a": through_pyav("mp4", "aac"),
    "mov": through_pyav("mov", "pcm_s16le"),
    "caf of ALAC": through_pyav("caf", "alac"),
    "webm": through_pyav("webm", "libopus", 48_000),
    "mka": through_pyav("matroska", "flac"),
    "avi": through_pyav("avi", "pcm_s16le"),
    "flv": through_pyav("flv", "libmp3lame"),
    "flv of AAC": through_pyav("flv", "aac"),
    "tta": through_pyav("tta", "tta"),
    "wv": through_pyav("wv", "wavpack"),
    "wma": windows_media,
}
MAKERS = {**LIBSNDFILES, **FFMPEGS}
OGGS = {
    "ogg": by_libsndfile("OGG", "VORBIS"),
    "opus": by_libsndfile("OGG", "OPUS", 48_000),
    "ogg of FLAC": through_pyav("ogg", "flac"),
}


@pytest.fixture(autouse=True)
def fresh():
    av.logging.set_level(av.logging.PANIC)
    sounds._warn_once.cache_clear()


@pytest.mark.parametrize("kind", [*MAKERS, *OGGS])
def test_joined_files_are_read_whole(tmp_path, caplog, kind):
    make = {**MAKERS, **OGGS}[kind]
    one, other = make(2), make(1)
    expected = np.concatenate([own_rate(one), own_rate(other), own_rate(one)])
    for between in (b"", bytes(100)) if kind in MAKERS else (b"",):
        joined = tmp_path / f"joined{len(between)}"
        joined.write_bytes(one + between + other + between + one)
        np.testing.assert_array_equal(own_rate(joined), expected)
    with sounds.open_sound(joined) as sound:
        assert abs(sound.seconds - len(expected) / sound.rate) < 0.5
        rate = sound.rate
    crop = read_crop(joined, rate, 1_000, Draw(1.0), "joined")
    np.testing.assert_array_equal(crop.samples, expected[-1_000:])
    assert not caplog.records


@pytest.mark.parametrize("kind", LIBSNDFILES)
def test_joined_files_are_read_whole_without_pyav(monkeypatch, kind):
    monkeypatch.setattr(sounds, "has_av", lambda: False)
    one, other = LIBSNDFILES[kind](2), LIBSNDFILES[kind](1)
    np.testing.assert_array_equal(own_rate(one + other), np.concatenate([own_rate(one), own_rate(other)]))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize("kind", [*MAKERS, *OGGS])
@pytest.mark.parametrize("has_av", [True, False])
def test_cut_files_are_refused(monkeypatch, kind, share, has_av):
    content = {**MAKERS, **OGGS}[kind](3)
    monkeypatch.setattr(sounds, "has_av", lambda: has_av)
    with pytest.raises(AudioError, match="clip: truncated"):
        own_rate(content[: round(len(content) * share)])
    with pytest.raises(AudioError, match="clip: truncated"):  # the last of several
        own_rate(content + content[: round(len(content) * share)])


@pytest.mark.parametrize("kind", MAKERS)
def test_of_a_second_file_only_the_header(caplog, kind):
    content = MAKERS[kind](1)
    try:
        own_rate(content + content[:100])
    except AudioError as error:
        assert "truncated" in str(error)
    else:
        assert "bytes after the sound that its header states are left out" in caplog.text


@pytest.mark.parametrize("behind", [bytes(3), bytes(3_000), ID3V1, APE_TAG, APE_TAG + ID3V1])
@pytest.mark.parametrize("kind", MAKERS)
def test_padding_and_tags_behind_a_file_are_no_sound(caplog, kind, behind):
    content = MAKERS[kind](1)
    np.testing.assert_array_equal(own_rate(content + behind), own_rate(content))
    assert not caplog.records


@pytest.mark.parametrize("kind", MAKERS)
def test_other_bytes_behind_a_file_are_spoken_of(caplog, kind):
    content = MAKERS[kind](1)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(own_rate(content + b"\x01\xfe" * 150 + kind.encode()), own_rate(content))
    assert "bytes after the sound that its header states are left out" in caplog.text


@pytest.mark.parametrize("chunk", [b"ANNO", b"NAME", b"ID3 "])
def test_text_behind_the_samples_of_an_aiff(caplog, chunk):
    content = LIBSNDFILES["aiff of 8 bits"](1)
    text = chunk + struct.pack(">I", 5) + b"words\0"
    tagged = b"FORM" + struct.pack(">I", len(content) + len(text) - 8) + content[8:] + text
    np.testing.assert_array_equal(own_rate(tagged), own_rate(content))
    np.testing.assert_array_equal(own_rate(tagged[:-3]), own_rate(content))  # the sound is whole
    np.testing.assert_array_equal(own_rate(tagged + tagged), np.tile(own_rate(content), 2))
    assert not caplog.records


@pytest.mark.parametrize("box", [b"free", b"udta", b"uuid"])
def test_boxes_behind_an_mp4(caplog, box):
    content = FFMPEGS["m4a"](1)
    more = content + struct.pack(">I4s", 28, box) + bytes(20)
    np.testing.assert_array_equal(own_rate(more), own_rate(content))
    assert not caplog.records


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
def test_an_au_written_to_a_pipe(size):
    content = LIBSNDFILES["au"](1)
    np.testing.assert_array_equal(own_rate(content[:8] + struct.pack(">I", size) + content[12:]), own_rate(content))


def test_what_states_no_length_is_read_to_its_end():
    """Matroska of unknown size, as it is streamed, and Windows Media whose data is of no size."""
    content = FFMPEGS["webm"](2)
    at = content.index(b"\x18S\x80g") + 4
    octets = 9 - content[at].bit_length()
    streamed = content[:at] + bytes([0xFF >> octets - 1]) + b"\xff" * (octets - 1) + content[at + octets :]
    np.testing.assert_array_equal(own_rate(streamed), own_rate(content))
    content = windows_media(2)
    at = content.index(bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")) + 16
    np.testing.assert_array_equal(own_rate(content[:at] + struct.pack("<Q", 50) + content[at + 8 :]), own_rate(content))


VIDEOS = [
    ("mp4", "aac", "mpeg4"),
    ("mov", "aac", "mpeg4"),
    ("matroska", "aac", "mpeg4"),
    ("webm", "libopus", "vp8"),
    ("avi", "pcm_s16le", "mpeg4"),
    ("flv", "aac", "flv"),
]


@pytest.mark.parametrize(("container", "codec", "picture"), VIDEOS)
@pytest.mark.parametrize("picture_seconds", [2, 5])
def test_videos(container, codec, picture, picture_seconds):
    """Of a sound that ends before its pictures nothing is missing."""
    if not (can_encode(codec) and can_encode(picture)):
        pytest.skip(f"FFmpeg has no encoder {codec} or {picture} here")
    content = video(container, codec, picture, 2, picture_seconds)
    found = own_rate(content)
    assert abs(len(found) / 48_000 - 2) < 0.1
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(AudioError, match="clip: truncated"):
            own_rate(content[: round(len(content) * share)])
    np.testing.assert_array_equal(own_rate(content + content), np.tile(found, 2))


def test_a_video_in_fragments():
    if not can_encode("mpeg4"):
        pytest.skip("FFmpeg has no encoder mpeg4 here")
    content = video("mp4", "aac", "mpeg4", 2, 2, movflags="frag_keyframe+empty_moov")
    assert content.count(b"moof") > 1
    assert abs(len(own_rate(content)) / 48_000 - 2) < 0.1
    with pytest.raises(AudioError, match="clip: truncated"):
        own_rate(content[: round(len(content) * 0.6)])


def test_a_wavpack_cut_where_a_block_ends():
    """No block is cut; the first one states how many samples all have."""
    content = FFMPEGS["wv"](3)
    with pytest.raises(AudioError, match=r"clip: truncated, .* s are missing"):
        own_rate(content[: content.rindex(b"wvpk")])


def test_a_flash_video_cut_where_a_tag_ends():
    content, place = FFMPEGS["flv"](3), 13
    while place < 0.6 * len(content):
        place += 15 + int.from_bytes(content[place + 1 : place + 4], "big")
    with pytest.raises(AudioError, match=r"clip: truncated, .* s are missing"):
        own_rate(content[:place])


def test_monkeys_audio_states_its_end():
    """Nothing writes it here: a header before bytes that are no sound."""
    content = b"MAC " + struct.pack("<HH7I", 3_990, 0, 52, 24, 8, 44, 1_000, 0, 2) + bytes(range(1, 17))
    content += b"\x01" * (52 + 24 + 8 + 44 + 1_000 + 2 - len(content))
    end = len(content)
    assert files_in(Content(content + APE_TAG), 0, "ape", "clip").files == [(0, end)]
    joined = Content(content + APE_TAG + content)
    assert files_in(joined, 0, "ape", "clip").files == [(0, end), (end + len(APE_TAG), joined.size)]
    with pytest.raises(AudioError, match=f"clip: truncated, it holds 600 of the {end} bytes"):
        own_rate(content[:600])


def test_dsd_states_its_end():
    content = b"DSD " + struct.pack("<QQQ", 28, 600, 0) + b"\x69" * 572
    assert files_in(Content(content * 2), 0, "dsf", "clip").files == [(0, 600), (600, 1_200)]
    with pytest.raises(AudioError, match="clip: truncated, it holds 500 of the 600 bytes"):
        own_rate(content[:500])


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_headers_end_in_a_word_or_none(kind):
    """Whatever sizes a header states: the walk comes to an end, and raises nothing else."""
    content, random = MAKERS[kind](1), np.random.default_rng(0)
    known = ffmpeg_format(content[:64])
    assert known is not None
    for _ in range(200):
        damaged = bytearray(content + content)
        for place in random.integers(0, 200, 5):
            damaged[place] = random.choice([0, 1, 255, 128])
        for start in (0, len(content)):
            with contextlib.suppress(AudioError):
                files_in(Content(bytes(damaged)), start, known[0], "clip")
    for zeros in (b"MAC \xa0\x0f", b"Creative Voice File\x1a", b"DSD ", b".snd", b"TTA1", b"wvpk"):
        kind = ffmpeg_format(zeros.ljust(64, b"\0"))[0]
        files_in(Content(zeros.ljust(64, b"\0") * 2), 0, kind, "clip")


def test_a_speech_file_that_is_compressed_states_no_size():
    head = b"NIST_1A\n   1024\nsample_count -i 9\nchannel_count -i 1\nsample_n_bytes -i 2\n"
    head += b"sample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
    assert files_in(Content(head.ljust(1_024) + bytes(7)), 0, "nistsphere", "clip") is None


def test_an_ogg_without_a_marked_end_is_spoken_of(caplog):
    """Cut at a page, as a recording of a stream may be: nothing tells what is missing."""
    content = OGGS["ogg"](3)
    cut = content[: content.rindex(b"OggS")]
    with caplog.at_level(logging.WARNING):
        assert 0 < len(own_rate(cut)) < 3 * 16_000
    assert "clip: nothing marks its end; it may have been cut" in caplog.text


# --- FLAC that states too few samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [1, 4_096, 30_000, 47_999])
@pytest.mark.parametrize("behind", [b"", ID3V1, bytes(3_000)])
def test_a_flac_of_more_samples_than_it_states(stated, behind):
    content = encoded(noise(16_000), 16_000, "FLAC")
    fewer = without_total(content)
    fewer = fewer[:22] + struct.pack(">I", stated) + fewer[26:]
    np.testing.assert_array_equal(own_rate(fewer + behind), own_rate(content))


@pytest.mark.parametrize("behind", [ID3V1, bytes(3_000), b"\x01\xfe" * 300])
def test_bytes_behind_a_flac(behind):
    content = encoded(noise(16_000), 16_000, "FLAC")
    np.testing.assert_array_equal(own_rate(content + behind), own_rate(content))


# --- WAV -------------------------------------------------------------------------------------------------------------


def test_joined_wavs_are_refused():
    content = wav_with_size(None, noise(16_000))
    for second in (content, wav_with_size(None, noise(16_000), b"LIST\x04\0\0\0INFO"), relative("RF64")):
        with pytest.raises(AudioError, match=r"clip: another file or more samples follow .* take them apart"):
            own_rate(content + second)
    with pytest.raises(AudioError, match="clip: another file or more samples follow"):
        own_rate(relative("RF64") + content)


def test_a_second_chunk_of_samples_is_refused():
    content = wav_with_size(None, noise(16_000), b"data" + struct.pack("<I", 2_000) + bytes(range(200)) * 10)
    with pytest.raises(AudioError, match="clip: another file or more samples follow"):
        own_rate(content)


def relative(kind: str) -> bytes:
    return encoded(noise(16_000), 16_000, kind, subtype="PCM_16")


@pytest.mark.parametrize("kind", ["RF64", "W64"])
def test_sizes_of_more_than_4_gib_are_no_placeholders(tmp_path, kind):
    """The files are sparse."""
    file, content, size = tmp_path / "long", bytearray(encoded(np.zeros(0), 16_000, kind, subtype="PCM_16")), 5 << 30
    if kind == "RF64":
        at = content.index(b"ds64") + 8
        content[at : at + 16] = struct.pack("<QQ", size + len(content) - 8, size)
    else:
        at = content.index(b"data\xf3\xac") + 16
        content[at : at + 8] = struct.pack("<Q", size + 24)
        content[16:24] = struct.pack("<Q", size + len(content))
    file.write_bytes(content)
    os.truncate(file, len(content) + size)
    assert open_clip(file, None, 16_000, "").seconds == size / 2 / 16_000
    os.truncate(file, 3 << 30)
    with pytest.raises(AudioError, match="long: truncated, it holds"):
        open_clip(file, None, 16_000, "")


# --- other things that were not what they seemed ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AVR", "MAT5", "SVX"])
def test_formats_of_which_nobody_checks_the_length_are_refused(kind):
    content = encoded(noise(16_000), 16_000, kind, subtype="PCM_16")
    with pytest.raises(AudioError, match=r"clip: whether a file of this format .* convert it to WAV or FLAC"):
        own_rate(content)


def test_the_name_of_a_file_is_not_its_format(tmp_path):
    (tmp_path / "a.raw").write_bytes(wav_with_size(None, noise(16_000)))
    assert len(load_audio(tmp_path / "a.raw", 16_000)) == 48_000
    (tmp_path / "b.raw").write_bytes(b"\x01\x02" * 5_000)
    with pytest.raises(AudioError, match=r"b\.raw: not audio that can be read"):
        load_audio(tmp_path / "b.raw", 16_000)


@pytest.mark.parametrize("samples", [[1, 2, 3], [[1, 2, 3]], (0, 1, 0), [True, False]])
def test_whole_numbers_in_a_list_have_no_scale(samples):
    with pytest.raises(AudioError, match=r"clips\[3\]: (whole numbers in a list do not say what 1 is|samples of type)"):
        open_clip({"array": samples, "sampling_rate": 16_000}, None, 16_000, "clips[3]")


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -float("inf"), 0.5, 16_000.5, "abc", "16000", [], b"x"])
def test_rates_of_samples_that_are_none(rate):
    with pytest.raises(AudioError, match=r"clips\[3\]: sampling_rate=.* is not a rate in Hz"):
        open_clip({"array": np.zeros(9), "sampling_rate": rate}, None, 16_000, "clips[3]")
