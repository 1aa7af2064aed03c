#!/usr/bin/env bash
# libsndfile takes what follows the samples of a W64, VOC or SPHERE file for samples, though all three state where these end.
#
# One expects a reader to stop where the chunk of samples says that it ends, as libsndfile does for WAV, RF64, AIFF and CAF. In
# Sony Wave64, Creative VOC and NIST SPHERE it counts all bytes up to the end of the file: ten zero bytes are five samples more, and
# of two files joined byte by byte the header of the second is heard as a click, with `frames` to match and no error. In AU,
# whose header states the size, too, what follows is left out.
# Compare the size that the header states with that of the file before you trust `frames` of these three.
# Seen on 2026-12-01 with soundfile 0.14.0, libsndfile 1.2.2, on Linux for x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import soundfile

samples = np.linspace(-0.5, 0.5, 1000, dtype=np.float32)
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__, f"{len(samples)} samples written")
frames = {}
for kind in ("WAV", "RF64", "AIFF", "CAF", "AU", "W64", "VOC", "NIST"):
    written = io.BytesIO()
    soundfile.write(written, samples, 16_000, format=kind, subtype="PCM_16")
    one = written.getvalue()
    assert soundfile.info(io.BytesIO(one)).frames == len(samples)
    frames[kind] = soundfile.info(io.BytesIO(one + bytes(10))).frames
    print(f"{kind}: ten zero bytes behind it, {frames[kind]} frames")
    if kind in ("W64", "VOC", "NIST"):
        found, _ = soundfile.read(io.BytesIO(one + one))
        print(f"{kind}: two files joined, {len(found)} samples read")
        assert len(found) > 2 * len(samples), "the second header is no longer read as samples"
assert all(frames[kind] == len(samples) for kind in ("WAV", "RF64", "AIFF", "CAF", "AU"))
assert all(frames[kind] == len(samples) + 5 for kind in ("W64", "VOC", "NIST")), "the sizes are obeyed now"
PYTHON
