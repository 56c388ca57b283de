"""The exceptions a user may meet, one tree; the command line prints them in one line and exits with 2.

    FastsaeError(ValueError)
    ├── ConfigError        an option's value cannot work
    ├── HookpointError     a hookpoint does not exist, or gives nothing to train on
    ├── ArtifactError      a model, dataset or output folder cannot be used
    ├── CheckpointError    a saved coder is missing, damaged or of another kind
    ├── NonFiniteError     training met NaN or inf
    ├── OutOfMemoryError   the work does not fit into memory, in however small parts
    └── LostRankError      another process of a run that several train together is gone

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


class OutOfMemoryError(FastsaeError):
    pass


class LostRankError(FastsaeError):
    pass


def first_line(error: BaseException) -> str:
    """What ``error`` says, as far as it fits into a message of our own; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch's way to say that memory ran out, on a GPU or a CPU."""
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return (type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError)) or any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
