"""The exceptions this package raises. Each message says what was wrong, where, and what to do."""


class M2DEmbedError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""


class AudioError(M2DEmbedError, ValueError):
    """Audio that cannot be embedded: unreadable, empty, not finite, of the wrong rank or rate."""


class ConfigError(M2DEmbedError, ValueError):
    """A model configuration or an option that makes no sense."""


class CheckpointError(M2DEmbedError, ValueError):
    """A checkpoint that cannot be read, is unsafe to read, or does not fit its configuration."""


class ModelNotFoundError(M2DEmbedError, LookupError):
    """A model name or path that leads nowhere, or a repository that may not be read."""


class UnsupportedError(M2DEmbedError, TypeError):
    """Something asked of a model that it was not made for, e.g. tags from a model without a tagging head."""


class TrainingError(M2DEmbedError, RuntimeError):
    """A training run that cannot go on: a loss that is not finite, data that is mostly unreadable."""


class ExportError(M2DEmbedError, RuntimeError):
    """A model that could not be exported, or whose export does not give the model's numbers."""
