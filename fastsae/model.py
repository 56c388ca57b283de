"""Loading models and tokenizers from the hub, a folder, or the package's own demo, through transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from . import demo
from .config import RunConfig
from .errors import ArtifactError, ConfigError

logger = logging.getLogger("fastsae")


def resolve_device(device: str | None) -> torch.device:
    """The device asked for, checked; by default cuda where there is one, else mps, else cpu."""
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}") from None
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: expected a GPU for {device!r}, got a machine or a torch build without one; use --device cpu, "
            "or install a CUDA build of torch"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device!r}")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: expected Apple's Metal for 'mps', got a machine without it; use --device cpu")
    return wanted


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision asked for; auto is bfloat16 on a GPU that has it, float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_model(name: str, run: RunConfig) -> PreTrainedModel:
    """The base model (no LM head) of a hub id or local folder; ``demo`` is the one that ships with fastsae."""
    device = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, device)
    logger.info("loading %s in %s on %s", name, str(dtype).removeprefix("torch."), device)
    model = _from_pretrained(AutoModel, name, run, "model", dtype=dtype)
    if model.config.is_encoder_decoder:
        raise ArtifactError(
            f"model: expected a causal or encoder model, got {type(model).__name__}, an encoder-decoder; "
            "load its encoder yourself and pass it to fastsae.Trainer"
        )
    return model.to(device).eval().requires_grad_(False)


def load_language_model(name: str, run: RunConfig) -> PreTrainedModel:
    """The same model with its LM head, for losses in the model; raises :class:`ArtifactError` where it has none."""
    config = load_config(name, run)
    if not is_causal(config):
        raise ArtifactError(f"model: expected a causal language model, got {name!r}, of type {config.model_type}")
    device = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, device)
    logger.info("loading %s with its LM head in %s on %s", name, str(dtype).removeprefix("torch."), device)
    loaded: Any = _from_pretrained(AutoModelForCausalLM, name, run, "model", dtype=dtype, output_loading_info=True)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ArtifactError(
            f"model: expected {name!r} with its LM head, got one without {missing[0]}, which would be random; "
            "save the whole model (AutoModelForCausalLM), or leave the losses out with --ce off"
        )
    return model.to(device).eval().requires_grad_(False)


def load_config(name: str, run: RunConfig) -> PreTrainedConfig:
    """The configuration that belongs to a model."""
    return _from_pretrained(AutoConfig, name, run, "model")


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether models of this kind predict the next token; BERT's kind does so only as a decoder."""
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return False
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder


def load_tokenizer(name: str, run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model."""
    return _from_pretrained(AutoTokenizer, name, run, "tokenizer")


def _from_pretrained(auto_class, name: str, run: RunConfig, what: str, **options):
    source = str(demo.MODEL_DIR) if name == demo.NAME else name
    if _looks_local(source) and not Path(source).is_dir():
        raise ArtifactError(f"{what}: expected a folder or hub id, got {name!r}, which is no folder here")
    try:
        return auto_class.from_pretrained(source, revision=run.revision, token=run.hf_token, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"{what}: expected a Hugging Face hub id or a folder saved by save_pretrained, got {name!r}: {first_line} "
            "Check the name, the network and --hf-token; 'demo' needs none of them"
        ) from None


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1
