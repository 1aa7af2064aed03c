#!/usr/bin/env bash
# An MP3 that is read in blocks is damaged where blocks end.
#
# One expects `SoundFile.read(n)` in a loop to give the samples of one `soundfile.read` of the file, as for WAV and FLAC.
# python-soundfile seeks to where it is after each read, though, and libsndfile's decoder of MP3 then has lost its bit
# reservoir: in files of a low bit rate a thousand samples and more after each block are silence or noise.
# A subclass whose `seekable()` says no makes no such seek, and reads the same samples in blocks.
# Seen on 2026-12-01 with soundfile 0.14.0, libsndfile 1.2.2, on Linux for x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import soundfile

rate, block = 44_100, 1 << 16
clicks = np.random.default_rng(0).standard_normal(20 * rate) * (np.random.default_rng(1).random(20 * rate) < 0.02)
soundfile.write("a.mp3", 0.3 * clicks, rate, bitrate_mode="CONSTANT", compression_level=0.99)
whole, _ = soundfile.read("a.mp3", dtype="float32")


class WithoutSeeks(soundfile.SoundFile):
    def seekable(self):
        return False


def in_blocks(kind):
    with kind("a.mp3") as file:
        pieces = []
        while len(piece := file.read(block, dtype="float32")):
            pieces.append(piece)
    return np.concatenate(pieces)


print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
for kind in (soundfile.SoundFile, WithoutSeeks):
    got = in_blocks(kind)
    n = min(len(got), len(whole))
    wrong = np.abs(got[:n] - whole[:n])
    print(f"{kind.__name__}: {np.count_nonzero(wrong > 1e-3)} of {n} samples differ, by up to {wrong.max():.3f}")
    damaged = np.flatnonzero(wrong > 1e-3)
    if kind is soundfile.SoundFile:
        assert len(damaged) and wrong.max() > 0.01, "no damage any more"
        print("distance of the damage from the ends of blocks:", sorted({int(d % block) // 1000 for d in damaged}), "thousand samples")
    else:
        assert len(damaged) == 0, "damaged without seeks, too"
PYTHON
