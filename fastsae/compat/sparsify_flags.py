"""sparsify's command-line flags that fastsae has under another name."""

from __future__ import annotations

_OFF = {"false", "no", "0", "off"}


def translate(arguments: list[str]) -> list[str]:
    """``--log_to_wandb [False] --wandb_log_frequency 5 -> --log-to wandb --log-every 5``; the rest stays as it is."""
    out: list[str] = []
    i = 0
    while i < len(arguments):
        argument, i = arguments[i], i + 1
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name == "--wandb-log-frequency":
            out += ["--log-every" + equals + value]
        elif name == "--log-to-wandb":
            if not equals and i < len(arguments) and arguments[i].lower() in {*_OFF, "true", "yes", "1", "on"}:
                value, i = arguments[i], i + 1
            out += [] if value.lower() in _OFF else ["--log-to", "wandb"]
        elif name != "--nolog-to-wandb":
            out.append(argument)
    return out
