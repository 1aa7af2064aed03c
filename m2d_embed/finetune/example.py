"""Fine-tuning as a loop of your own: ``python -m m2d_embed.finetune.example DATA.csv OUT``. Copy it and change it.

DATA.csv has the columns ``file``, ``label`` and ``fold`` (or ``split``: train, test). ``m2d-embed tag`` reads OUT.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from m2d_embed import M2D
from m2d_embed.audio.clips import load_audio
from m2d_embed.finetune.optim import layer_groups
from m2d_embed.labelled.clips import read_labelled

EPOCHS, BATCH, SECONDS, RATE = 20, 16, 3.0, 1e-3


def crop(audio: torch.Tensor, samples: int) -> torch.Tensor:
    """A random stretch of (n,) audio; of a shorter clip all of it, and silence after."""
    start = int(torch.randint(max(1, len(audio) - samples + 1), ()))
    return F.pad(audio[start : start + samples], (0, max(0, samples - len(audio))))


def main(data: Path, output: Path) -> float:
    """Train on all folds but the lowest, save the model, test it on that fold; return the accuracy."""
    torch.manual_seed(0)
    clips = read_labelled(data)
    train, test = (torch.from_numpy(rows) for rows in clips.split(clips.test_folds()[0]))
    model = M2D.from_pretrained(device="cpu").with_head(clips.label_names)
    audio = [torch.from_numpy(load_audio(file, model.sample_rate)) for file in clips.files]
    labels, samples = torch.from_numpy(clips.labels), round(SECONDS * model.sample_rate)
    optimizer = torch.optim.AdamW(layer_groups(model, RATE, layer_decay=0.9, weight_decay=0.05))
    rates, steps = [group["lr"] for group in optimizer.param_groups], -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, EPOCHS * steps, pct_start=0.1)
    model.train()
    for epoch in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].tensor_split(steps):
            logits = model.logits(torch.stack([crop(audio[i], samples) for i in rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.3f}", file=sys.stderr)
    model.eval().save_pretrained(output)
    with torch.no_grad():
        return sum(int(model.logits(audio[i][None]).argmax() == labels[i]) for i in test) / len(test)


if __name__ == "__main__":
    print(f"accuracy {main(Path(sys.argv[1]), Path(sys.argv[2])):.1%}")
