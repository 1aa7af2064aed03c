"""Where in a recording something sounds like an example: ``python examples/find_events.py EXAMPLE RECORDING``."""

import sys

import numpy as np

import m2d_embed


def events(example: str, recording: str, threshold: float = 0.5) -> list[tuple[float, float]]:
    """Seconds (from, to) where the timestamps of a recording are like the mean of an example's."""
    model = m2d_embed.load_model()
    step = model.features.hop_frames(model.config) * model.config.frame_ms / 1000
    query = model.encode_timestamps(example).embeddings.mean(0).numpy()
    vectors, centres = (tensor.numpy() for tensor in model.encode_timestamps(recording))
    mean = vectors.mean(0)  # what all of the recording has in common tells nothing
    query, vectors = query - mean, vectors - mean
    cosines = vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query) + 1e-9)
    hits = np.concatenate([[False], cosines > threshold, [False]]).astype(int)
    starts, stops = np.flatnonzero(np.diff(hits) == 1), np.flatnonzero(np.diff(hits) == -1) - 1
    return [
        (float(centres[a] / 1000 - step / 2), float(centres[b] / 1000 + step / 2))
        for a, b in zip(starts, stops, strict=True)
    ]


if __name__ == "__main__":
    for start, stop in events(*sys.argv[1:3]):
        print(f"{max(0.0, start):8.2f} s to {stop:8.2f} s")
