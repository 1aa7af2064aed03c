"""The HEAR benchmark's own hear-eval-kit, unmodified, over this package and any other HEAR module.

``python -m benchmarks.hear run|convert|timestamps --help``; it needs an environment of its own: ``requirements.txt``.
"""
