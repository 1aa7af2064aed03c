#!/usr/bin/env bash
# FFmpeg loses the end of ALAC in CAF where the last packet is half full or more.
#
# ALAC is lossless, so one expects the samples that were written. A packet holds 4096 samples, the last one the rest, and CAF
# states how many samples of the last packet are not to be played. Of a last packet of r samples 4096 - r are lost where r is
# 2048 or more, up to 46 ms at 44.1 kHz, as if these were taken off although the packet was short already.
# The files are whole: libsndfile, which writes the same layout, reads its own to the end.
# Keep ALAC in M4A, which loses nothing, or read CAF with another library.
# Seen on 2026-12-01 with PyAV 18.1.0 (libavformat 62.12.102), soundfile 0.14.0, libsndfile 1.2.2, on Linux for x86-64.
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

rate, packet = 44_100, 4096


def write(path, samples, container):
    with av.open(path, "w", format=container) as file:
        stream = file.add_stream("alac", rate=rate, layout="mono")
        stream.codec_context.format = "s16p"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16p", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for given in (frame, None):
            for coded in stream.encode(given):
                file.mux(coded)


def read(path):
    with av.open(path) as file:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)])


print("PyAV", av.__version__, "libavformat", av.library_versions["libavformat"], "soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
rng = np.random.default_rng(0)
for rest in (1, 2047, 2048, 3140, 4095):
    samples = (rng.standard_normal(10 * packet + rest) * 5000).astype(np.int16)
    write("a.caf", samples, "caf")
    write("a.m4a", samples, "ipod")
    soundfile.write("b.caf", samples, rate, format="CAF", subtype="ALAC_16")
    got = {"FFmpeg's CAF": read("a.caf"), "libsndfile's CAF": read("b.caf"), "M4A": read("a.m4a")}
    lost = {name: len(samples) - len(y) for name, y in got.items()}
    print(f"last packet of {rest} samples, lost by FFmpeg:", lost)
    assert all(np.array_equal(y, samples[: len(y)]) for y in got.values())
    assert np.array_equal(soundfile.read("b.caf", dtype="int16")[0], samples), "libsndfile loses samples of its own file"
    assert lost["M4A"] == 0, "M4A loses samples, too"
    expected = packet - rest if rest >= packet // 2 else 0
    assert lost["FFmpeg's CAF"] == lost["libsndfile's CAF"] == expected, "the loss is another now"
PYTHON
