#!/usr/bin/env bash
# An MP3 of variable bit rate without a Xing header is cut short without a word.
#
# One expects `soundfile.read` to read to the end of the file, or to fail. An MP3 that was written to a pipe has no Xing header;
# libsndfile then takes a length that is guessed from the first frames, and reading stops there. Where the file starts with
# frames larger than its mean, most of it is lost; where it starts with smaller ones, `frames` is too large, and all is read.
# PyAV reads all of either file. Don't trust `frames` of such files: put the header in first (`ffmpeg -i in.mp3 -c copy out.mp3`),
# or read them through PyAV.
# Seen on 2026-12-01 with soundfile 0.14.0, libsndfile 1.2.2, PyAV 18.1.0, on Linux for x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 numpy==2.4.6 av==18.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import av
import numpy as np
import soundfile

rate, seconds = 44_100, 30


def write(path, samples, header):
    with av.open(path, "w", format="mp3", options={"write_xing": header, "id3v2_version": "0"}) as file:
        stream = file.add_stream("libmp3lame", rate=rate, layout="mono", options={"abr": "1"})
        stream.codec_context.format, stream.bit_rate = "s16p", 96_000
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16p", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for given in (frame, None):
            for packet in stream.encode(given):
                file.mux(packet)


def read_by_pyav(path):
    with av.open(path) as file:
        return sum(frame.samples for frame in file.decode(audio=0))


noise = (np.random.default_rng(0).standard_normal(seconds * rate) * 8000).astype(np.int16)
noise_first, silence_first = noise.copy(), noise
noise_first[2 * rate :] = 0
silence_first[: 2 * rate] = 0
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__, "PyAV", av.__version__, f"{len(noise)} samples written")
got = {}
for name, samples in (("noise first", noise_first), ("silence first", silence_first)):
    for header in "10":
        write("a.mp3", samples, header)
        got[name, header] = len(soundfile.read("a.mp3")[0])
        by_pyav = read_by_pyav("a.mp3")
        assert by_pyav >= len(samples), "PyAV loses samples"
        text = f"frames {soundfile.info('a.mp3').frames}, soundfile read {got[name, header]}, PyAV {by_pyav}"
        print(f"{name}, {'with' if header == '1' else 'without'} header: {text}")
assert all(got[name, header] >= len(noise) for name, header in got if (name, header) != ("noise first", "0"))
assert got["noise first", "0"] < len(noise) / 2, "the file without header is read to its end now"
PYTHON
