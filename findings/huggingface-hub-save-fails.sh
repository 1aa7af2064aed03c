#!/usr/bin/env bash
# A save by `ModelHubMixin` that fails leaves the old weights without their config, and they load with default arguments.
#
# One expects a save that fails (full disk, time limit) to leave the checkpoint that was there, or to leave one that does not load.
# `save_pretrained` removes config.json before it writes weights, though. If writing them fails, the old weights remain, and
# `from_pretrained` builds the model with the defaults of its `__init__`: an error where shapes depend on them, another model
# with one line in the log where they do not (a sample rate, a hop). Save into a new folder and rename it.
# Seen on 2026-12-01 with huggingface_hub 2.4.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface-hub==2.4.0 jinja2==3.1.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import errno
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelHubMixin


class Model(ModelHubMixin):
    def __init__(self, sample_rate: int = 16_000, weights: str = "", disk_full: bool = False):
        self.sample_rate, self.weights, self.disk_full = sample_rate, weights, disk_full

    def _save_pretrained(self, save_directory):
        if self.disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (save_directory / "weights.txt").write_text(self.weights)

    @classmethod
    def _from_pretrained(cls, *, model_id, sample_rate=16_000, **_):
        return cls(sample_rate, (Path(model_id) / "weights.txt").read_text())


def state():
    model = Model.from_pretrained("checkpoint")
    return sorted(os.listdir("checkpoint")), model.sample_rate, model.weights


print("huggingface_hub", huggingface_hub.__version__)
Model(sample_rate=48_000, weights="first").save_pretrained("checkpoint")
before = state()
print("saved, files, sample rate and weights as loaded:", *before)
assert before[1:] == (48_000, "first")
try:
    Model(sample_rate=48_000, weights="second", disk_full=True).save_pretrained("checkpoint")
except OSError as error:
    print("a second save fails:", error)
else:
    raise SystemExit("the save did not fail")
after = state()
print("files, sample rate and weights as loaded then:", *after)
assert "config.json" not in after[0] and after[1:] == (16_000, "first"), "the config stays now"
PYTHON
