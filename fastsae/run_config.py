"""What a run trains on: the model, how it is loaded, and the data. Frozen, a sentence under each field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError
from .fields import check_types, require
from .placement import parse_device_map

TOKEN_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "special")
"""What tokens can be called instead of by their ids; ``special`` is all that the tokenizer has."""


@dataclass(frozen=True)
class RunConfig:
    """What a run trains on: model and data."""

    split: str = "train"
    """Split of the dataset."""

    text_column: str = "text"
    """Column that holds the text."""

    ctx_len: int = 2048
    """Tokens per sequence; lowered to what the model can take."""

    max_examples: int | None = None
    """Take at most this many sequences."""

    max_tokens: int | None = None
    """Take at most this many tokens."""

    streaming: bool = False
    """Read the dataset while training, without downloading or tokenising it first; needs one of the two limits."""

    shuffle_seed: int = 42
    """Seed of the order of the sequences."""

    shuffle_buffer: int = 1024
    """Sequences of a streamed dataset that are held in memory to shuffle it; 1 keeps its order."""

    bin_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of the token ids in a .bin file; auto reads FILE.bin.json if there is one, else uint16."""

    data_args: tuple[str, ...] = ()
    """More arguments of datasets.load_dataset, such as name=wikitext-2-raw-v1."""

    data_preprocessing_num_proc: int | None = None
    """Processes that tokenise; by default half the CPU cores."""

    device: str | None = None
    """Device of model and coders; by default cuda where there is one, else cpu (mps: plain PyTorch, no kernels)."""

    device_map: str | None = None
    """Spread a model that is larger than one device: auto, balanced, balanced_low_0, sequential, or a JSON object of
    modules and devices (numbers of GPUs, cpu, disk); needs accelerate."""

    tp_plan: Literal["auto"] | None = None
    """Have all processes hold one model together, each a part of every layer, by transformers' tensor-parallel plan;
    needs accelerate."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model; auto is bfloat16 on a GPU that has it, float32 on a CPU."""

    load_in_8bit: bool = False
    """Load the model's weights in 8 bits, to save memory; needs bitsandbytes and a GPU."""

    attn_implementation: str | None = None
    """Attention code of the model, such as eager or sdpa; by default what transformers chooses."""

    revision: str | None = None
    """Revision of the model on the hub; --data-args revision=... is the dataset's."""

    hf_token: str | None = field(default=None, repr=False)
    """Hub access token; never written anywhere."""

    def __post_init__(self) -> None:
        if isinstance(self.data_args, list):
            object.__setattr__(self, "data_args", tuple(self.data_args))
        check_types(self)
        for name in ("ctx_len", "shuffle_buffer"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_examples", "max_tokens", "data_preprocessing_num_proc"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        if self.streaming and self.max_examples is None and self.max_tokens is None:
            raise ConfigError(
                "streaming: expected --max-tokens or --max-examples with it, got neither; "
                "a stream has no length, and the learning rate's schedule needs one"
            )
        self.dataset_options()
        self._check_tensor_parallel()
        parse_device_map(self.device_map)
        if self.device_map is not None and self.device not in (None, "cuda"):
            raise ConfigError(
                f"device_map: expected no --device with it, which chooses the devices, got {self.device!r}; "
                "leave one of the two out"
            )

    def _check_tensor_parallel(self) -> None:
        if self.tp_plan is None:
            return
        for name in ("device_map", "load_in_8bit"):
            if getattr(self, name):
                raise ConfigError(f"tp_plan: expected no --{name.replace('_', '-')} with it, got both; leave one out")

    def dataset_options(self) -> dict[str, Any]:
        """``data_args`` as keyword arguments; numbers, true, false and none are read as such."""
        options = {}
        for text in self.data_args:
            key, equals, value = text.partition("=")
            require(bool(key.strip() and equals), "data_args", "key=value", text)
            if key.strip() in _OWN_OPTIONS:
                raise ConfigError(f"data_args: expected no {key.strip()!r}; use {_OWN_OPTIONS[key.strip()]}")
            options[key.strip()] = _value(value.strip())
        return options

    def to_dict(self) -> dict[str, Any]:
        """Every field but the access token."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hf_token"}


_OWN_OPTIONS = {
    "path": "the argument DATASET", "split": "--split", "streaming": "--streaming", "token": "--hf-token",
    "use_auth_token": "--hf-token",
}  # fmt: skip


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
