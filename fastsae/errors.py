"""The exceptions a user may meet, one tree; the command line prints them in one line and exits with 2.

    FastsaeError(ValueError)
    ├── ConfigError        an option's value cannot work
    ├── HookpointError     a hookpoint does not exist, or gives nothing to train on
    ├── ArtifactError      a model, dataset or output folder cannot be used
    ├── CheckpointError    a saved coder is missing, damaged or of another kind
    └── NonFiniteError     training met NaN or inf

Each message says what was expected, what came, and the way out.
"""


class FastsaeError(ValueError):
    """Base of everything fastsae raises on purpose."""


class ConfigError(FastsaeError):
    pass


class HookpointError(FastsaeError):
    pass


class ArtifactError(FastsaeError):
    pass


class CheckpointError(FastsaeError):
    pass


class NonFiniteError(FastsaeError):
    pass
