"""Loading models and tokenizers from the hub, a folder, or the package's own demo, through transformers."""

from __future__ import annotations

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from . import demo
from .devices import loading_options
from .errors import ArtifactError, ConfigError, first_line
from .hub import check_repository, close_by, looks_local
from .run_config import RunConfig
from .tensor_parallel import has_no_plan, no_plan

logger = logging.getLogger("fastsae")


def load_model(name: str, run: RunConfig) -> PreTrainedModel:
    """The base model (no LM head) of a hub id or local folder; ``demo`` is the one that ships with fastsae."""
    device, options = loading_options(run)
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
            f"model: expected a config.json that transformers makes a model of, got {name!r}: {first_line(error)}"
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
    device, options = loading_options(run)
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
        reason = first_line(error)
        if "attn_implementation" in options and "attention" in str(error).lower():
            raise ConfigError(
                f"attn_implementation: expected one that this model has, got {run.attn_implementation!r}: {reason}"
            ) from None
        if has_no_plan(error):
            raise no_plan(name) from None
        if "device_map" in options and "device" in str(error):
            raise ConfigError(
                f"device_map: expected a device that is here for every module, got {run.device_map}: {reason}"
            ) from None
        raise ArtifactError(
            f"{what}: expected a Hugging Face hub id or a folder saved by save_pretrained, got {name!r}: {reason} "
            f"Check the name, the network and --hf-token{close_by(name)}; 'demo' needs none of them"
        ) from None


def _has_tokenizer_files(name: str) -> bool:
    folder = Path(name).expanduser()
    return not folder.is_dir() or any(
        path.name.startswith(("token", "vocab", "spiece", "sentencepiece", "merges", "tekken"))
        or path.suffix in (".tiktoken", ".model")
        for path in folder.iterdir()
    )
