"""A classifier of a folder with one sub-folder a label: ``python examples/classify_with_sklearn.py FOLDER``.

Needs scikit-learn: ``pip install 'm2d-embed[eval]'``.
"""

import sys
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import m2d_embed

SOUNDS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}


def accuracy(folder: Path, folds: int = 3) -> float:
    """The mean accuracy of a linear classifier of scene embeddings, by cross-validation."""
    files = sorted(
        file for file in folder.glob("*/*") if file.suffix in {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}
    )
    labels = [file.parent.name for file in files]
    vectors = m2d_embed.load_model().encode(files)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(cross_val_score(classifier, vectors, labels, cv=folds).mean())


if __name__ == "__main__":
    print(f"accuracy {accuracy(Path(sys.argv[1])):.3f}")
