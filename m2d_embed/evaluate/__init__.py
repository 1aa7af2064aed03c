"""Evaluation of embeddings on labelled clips: a nearest-neighbour and a linear probe."""
