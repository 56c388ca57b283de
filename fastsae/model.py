"""Loading models and tokenizers from the hub, a folder, or the package's own demo, through transformers."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from . import demo
from .errors import ArtifactError, ConfigError
from .hub import check_repository, close_by, looks_local
from .placement import parse_device_map
from .run_config import RunConfig
from .tensor_parallel import has_no_plan, no_plan, plan_options

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
    device, options = _loading(run)
    config = load_config(name, run)
    logger.info("loading %s in %s on %s", name, _precision(options), device)
    model = _from_pretrained(_encoder_class(config) or AutoModel, name, run, "model", **options)
    _refuse_encoder_decoder(model, config)
    if run.tp_plan is not None and not model.tp_plan:
        raise no_plan(name)
    return _placed(model, device, run)


def empty_model(name: str, run: RunConfig, dtype: torch.dtype, *, with_head: bool = False) -> PreTrainedModel:
    """What :func:`load_model`, or ``with_head`` :func:`load_language_model`, gives, with new weights in place of saved.

    Only config.json is read. Under torch's FakeTensorMode the weights take no memory.
    """
    config = load_config(name, run)
    if with_head and not is_causal(config):
        raise ArtifactError(f"model: expected a causal language model, got {name!r}, of type {config.model_type}")
    options: dict[str, Any] = {"dtype": dtype}
    if run.attn_implementation is not None:
        options["attn_implementation"] = run.attn_implementation
    encoder = None if with_head else _encoder_class(config)
    try:
        if encoder is not None:
            model = encoder._from_config(config, **options)
        else:
            model = (AutoModelForCausalLM if with_head else AutoModel).from_config(config, **options)
    except (ValueError, ImportError, RuntimeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"model: expected a config.json that transformers makes a model of, got {name!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    _refuse_encoder_decoder(model, config)
    return model.eval().requires_grad_(False)


def _refuse_encoder_decoder(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ArtifactError(
            f"model: expected a causal or encoder model, got {type(model).__name__}, an encoder-decoder; "
            "save its encoder alone (T5EncoderModel.from_pretrained(...).save_pretrained(FOLDER)) and name that folder"
        )


def load_language_model(name: str, run: RunConfig) -> PreTrainedModel:
    """The same model with its LM head, for losses in the model; raises :class:`ArtifactError` where it has none."""
    if run.tp_plan is not None:
        raise ConfigError(
            "tp_plan: expected the model without its LM head, which --loss-fn ce and kl need in one piece; "
            "use --loss-fn fvu, or leave --tp-plan out"
        )
    config = load_config(name, run)
    if not is_causal(config):
        raise ArtifactError(f"model: expected a causal language model, got {name!r}, of type {config.model_type}")
    device, options = _loading(run)
    logger.info("loading %s with its LM head in %s on %s", name, _precision(options), device)
    loaded: Any = _from_pretrained(AutoModelForCausalLM, name, run, "model", output_loading_info=True, **options)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ArtifactError(
            f"model: expected {name!r} with its LM head, got one without {missing[0]}, which would be random; "
            "save the whole model (AutoModelForCausalLM), or leave its losses out (eval --ce off, train --loss-fn fvu)"
        )
    return _placed(model, device, run)


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
    """The tokenizer that belongs to a model; raises :class:`ArtifactError` where none was saved with it."""
    try:
        tokenizer = _from_pretrained(AutoTokenizer, name, run, "tokenizer")
    except ArtifactError:
        if _has_tokenizer_files(name):
            raise
        tokenizer = None
    # transformers makes up a tokenizer of special tokens alone where there are no files
    if tokenizer is None or len(tokenizer) <= len(tokenizer.added_tokens_decoder) + 1:
        raise ArtifactError(
            f"tokenizer: expected one beside the model, {name!r} holds none; save it there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)), or bring a dataset with input_ids"
        )
    return tokenizer


def _encoder_class(config: PreTrainedConfig) -> Any:
    """The class that a folder with an encoder alone was saved by (T5EncoderModel); AutoModel would add a decoder."""
    saved_by = next(iter(config.architectures or ()), "")
    return getattr(transformers, saved_by, None) if saved_by.endswith("EncoderModel") else None


def _loading(run: RunConfig) -> tuple[torch.device, dict[str, Any]]:
    """(device, options of from_pretrained); raises :class:`ConfigError` for what this machine cannot do."""
    device = resolve_device(run.device)
    options: dict[str, Any] = {"dtype": resolve_dtype(run.dtype, device)}
    if run.attn_implementation is not None:
        options["attn_implementation"] = run.attn_implementation
    if run.load_in_8bit:
        options |= _in_8bit(device)
    if (device_map := parse_device_map(run.device_map)) is not None:
        _require_package("accelerate", "device_map", "accelerate")
        options["device_map"] = device_map
    if run.tp_plan is not None:
        options |= plan_options(run.tp_plan, device)
    return device, options


def _in_8bit(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise ConfigError(
            f"load_in_8bit: expected a GPU to load the model on, got {device}; leave it out, or use --device cuda"
        )
    for package in ("bitsandbytes", "accelerate"):
        _require_package(package, "load_in_8bit", "'fastsae[8bit]'")
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


def _require_package(package: str, field: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{field}: expected the package {package!r}, it is not installed; pip install {install}")


def _precision(options: dict[str, Any]) -> str:
    return "8 bits" if "quantization_config" in options else str(options["dtype"]).removeprefix("torch.")


def _placed(model: PreTrainedModel, device: torch.device, run: RunConfig) -> PreTrainedModel:
    """Ready to read activations from; what is loaded in 8 bits or in parts is where it belongs, and stays there."""
    if not run.load_in_8bit and run.device_map is None and run.tp_plan is None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def _from_pretrained(auto_class, name: str, run: RunConfig, what: str, **options):
    source = str(demo.MODEL_DIR) if name == demo.NAME else str(Path(name).expanduser())
    if not Path(source).is_dir():
        if looks_local(name):
            raise ArtifactError(
                f"{what}: expected a folder or hub id, got {name!r}, which is no folder here{close_by(name)}"
            )
        check_repository("model", name, revision=run.revision, token=run.hf_token)
    try:
        return auto_class.from_pretrained(source, revision=run.revision, token=run.hf_token, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        if "attn_implementation" in options and "attention" in str(error).lower():
            raise ConfigError(
                f"attn_implementation: expected one that this model has, got {run.attn_implementation!r}: {first_line}"
            ) from None
        if has_no_plan(error):
            raise no_plan(name) from None
        if "device_map" in options and "device" in str(error):
            raise ConfigError(
                f"device_map: expected a device that is here for every module, got {run.device_map}: {first_line}"
            ) from None
        raise ArtifactError(
            f"{what}: expected a Hugging Face hub id or a folder saved by save_pretrained, got {name!r}: {first_line} "
            f"Check the name, the network and --hf-token{close_by(name)}; 'demo' needs none of them"
        ) from None


def _has_tokenizer_files(name: str) -> bool:
    folder = Path(name).expanduser()
    return not folder.is_dir() or any(
        path.name.startswith(("token", "vocab", "spiece", "sentencepiece", "merges", "tekken"))
        or path.suffix in (".tiktoken", ".model")
        for path in folder.iterdir()
    )
