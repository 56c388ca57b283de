"""fastsae: train TopK sparse autoencoders and transcoders on Hugging Face models, fast.

    from fastsae import FastSae, SaeConfig, TrainConfig, Trainer

Importing is free: names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .activation_cache.read import CachedActivations
    from .activation_cache.training import training_data
    from .coder_config import SaeConfig, TranscoderConfig
    from .config import TrainConfig
    from .data import load_tokens
    from .distributed.joining import joined
    from .encode import strongest_latents
    from .errors import FastsaeError
    from .eval.config import EvalConfig
    from .eval.evaluate import evaluate
    from .eval.result import Evaluation
    from .hookpoints import resolve_hookpoints
    from .model import load_language_model, load_model, load_tokenizer
    from .planning.config import PlanConfig
    from .planning.make import plan
    from .planning.result import Plan
    from .progress import RunSummary
    from .run_config import RunConfig
    from .sae import FastSae, ForwardOutput
    from .tokens import tokenize
    from .trainer import Trainer

_HOME = {
    "CachedActivations": "activation_cache.read",
    "EvalConfig": "eval.config",
    "Evaluation": "eval.result",
    "FastSae": "sae",
    "FastsaeError": "errors",
    "ForwardOutput": "sae",
    "Plan": "planning.result",
    "PlanConfig": "planning.config",
    "RunConfig": "run_config",
    "RunSummary": "progress",
    "SaeConfig": "coder_config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "TranscoderConfig": "coder_config",
    "evaluate": "eval.evaluate",
    "joined": "distributed.joining",
    "load_language_model": "model",
    "load_model": "model",
    "load_tokenizer": "model",
    "load_tokens": "data",
    "plan": "planning.make",
    "resolve_hookpoints": "hookpoints",
    "strongest_latents": "encode",
    "tokenize": "tokens",
    "training_data": "activation_cache.training",
}

__all__ = [
    "CachedActivations",
    "EvalConfig",
    "Evaluation",
    "FastSae",
    "FastsaeError",
    "ForwardOutput",
    "Plan",
    "PlanConfig",
    "RunConfig",
    "RunSummary",
    "SaeConfig",
    "TrainConfig",
    "Trainer",
    "TranscoderConfig",
    "__version__",
    "evaluate",
    "joined",
    "load_language_model",
    "load_model",
    "load_tokenizer",
    "load_tokens",
    "plan",
    "resolve_hookpoints",
    "strongest_latents",
    "tokenize",
    "training_data",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
