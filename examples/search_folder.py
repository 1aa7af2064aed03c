"""The sounds of a folder that are nearest to one: ``python examples/search_folder.py QUERY FOLDER``."""

import sys
from pathlib import Path

import m2d_embed


def nearest(query: Path, folder: Path, count: int = 5) -> list[tuple[float, Path]]:
    """The files below a folder that are most similar to a query, best first, with their cosine similarities."""
    model = m2d_embed.load_model()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != query]
    vectors = model.encode([query, *files], normalize_embeddings=True, on_error="skip")
    similarities = vectors[1:] @ vectors[0]  # NaN for a file that is no sound
    ranked = sorted((float(-s), file) for s, file in zip(similarities, files, strict=True) if s == s)
    return [(-negative, file) for negative, file in ranked[:count]]


if __name__ == "__main__":
    for similarity, file in nearest(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{similarity:.3f}  {file}")
