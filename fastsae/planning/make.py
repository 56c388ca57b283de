"""Making a plan: configs and names in, numbers out. Nothing but config.json and the data's sizes is read."""

from __future__ import annotations

import logging
import os
import sys

import torch

from .. import demo
from ..coders import CoderSpec, coder_specs
from ..config import TrainConfig
from ..data import foresee_rows
from ..devices import resolve_device, resolve_dtype
from ..errors import ArtifactError, ConfigError
from ..model import load_config
from ..ops import resolve
from ..placement import check_one_process
from ..rows import held_out_sequences
from ..run_config import RunConfig
from ..sources import DEFAULT_DATASET
from .advice import advise
from .config import PlanConfig
from .disk import disk
from .kept import FLOAT, Kept
from .layout import layout
from .measure import measured_speed
from .memory import Situation, memory
from .modes import modes
from .result import CoderPlan, Plan, Tokens
from .speed import speed_from_bench
from .structure import look_at_model
from .work import Work

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger("fastsae")


def plan(
    cfg: TrainConfig,
    model: str = demo.NAME,
    dataset: str | None = None,
    run: RunConfig | None = None,
    planned: PlanConfig | None = None,
) -> Plan:
    """What a run of ``cfg`` on ``model`` and ``dataset`` will need and take.

    No weights are loaded: the model is made of its config.json, with fake tensors. Raises what the run itself would
    where it could not start.
    """
    run, planned = run or RunConfig(), planned or PlanConfig()
    if run.tp_plan is not None:
        raise ConfigError(
            "tp_plan: expected a run whose processes each hold the model, got one whose processes hold it together, "
            "which is not planned yet; leave --tp-plan out to plan for a single process with all coders and all of the "
            "model, which is more than each of them will hold"
        )
    if run.device_map is not None:
        check_one_process(planned.ranks)
        raise ConfigError(
            "device_map: expected a run whose model is on one device, got one that spreads it over several, which is "
            "not planned yet; leave --device-map out to plan for a single device with all of the model and the coders, "
            "which is more than each of them will hold"
        )
    dataset = dataset or (demo.DATASET if model == demo.NAME else DEFAULT_DATASET)
    device = planned_device(run.device)
    dtype = planned_dtype(run.dtype, device)
    implementation = resolve(cfg.implementation, device)
    tokens = count_tokens(cfg, model, dataset, run, planned.ranks)
    structure = look_at_model(model, run, cfg, dtype, tokens.per_sequence)
    specs = coder_specs(cfg, structure.hookpoints)
    lies = layout(cfg, specs, planned.ranks)
    situation = Situation(
        cfg, structure, specs, lies, Work(implementation, dtype, cfg), tokens.per_sequence, tokens.held_out,
        0 if device.type == "cuda" else process_memory(), device.type == "cuda",
    )  # fmt: skip
    coders = tuple(_coder(name, spec, situation) for name, spec in specs.items())
    whole = sum((coder.kept for coder in coders), Kept())
    saves = 1 + ((tokens.steps or cfg.save_every + 1) - 1) // cfg.save_every
    needed = memory(situation, planned.memory_bytes() or device_memory(device))
    speed = None
    if planned.measure:
        speed = measured_speed(model, run, situation, needed)
    elif planned.bench is not None:
        speed = speed_from_bench(planned.bench, situation)
    return Plan(
        model, dataset, str(device), str(dtype).removeprefix("torch."), implementation, lies.mode, planned.ranks,
        structure.kind, structure.parameters, coders, needed,
        disk(whole, max(coder.kept.weights for coder in coders), cfg, saves), tokens, speed, advise(situation, needed),
        modes(situation, needed.available),
    )  # fmt: skip


def planned_device(device: str | None) -> torch.device:
    """The device asked for, which may be a GPU that is not here; by default this machine's."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("planned for a GPU, of which there is none here; --memory says how much it has")
        return torch.device("cuda")
    return resolve_device(device)


def planned_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """As :func:`fastsae.devices.resolve_dtype`; a GPU that is not here has bfloat16."""
    if dtype == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return resolve_dtype(dtype, device)


def device_memory(device: torch.device) -> int | None:
    """Bytes that the device has in all; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def process_memory() -> int:
    """Bytes that this process has taken at most: Python and the libraries that a run needs, for it holds no tensors."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_tokens(cfg: TrainConfig, model: str, dataset: str, run: RunConfig, ranks: int) -> Tokens:
    """How much there is to train on, as far as it is known before anything is tokenised or downloaded."""
    rows, length, exact = foresee_rows(dataset, run, load_config(model, run))
    if rows is None:
        return Tokens(length, None, cfg.held_out, False, None, None)
    held_out = held_out_sequences(cfg.held_out, rows)
    rows -= held_out
    if rows == 0:
        raise ArtifactError("dataset: expected at least one sequence to train on, got none; raise --max-tokens")
    steps = -(-_batches(rows, cfg, ranks) // cfg.grad_acc_steps)
    return Tokens(length, rows, held_out, exact, rows * length, steps)


def _batches(rows: int, cfg: TrainConfig, ranks: int) -> int:
    return -(-rows // (cfg.batch_size * ranks))


def _coder(name: str, spec: CoderSpec, s: Situation) -> CoderPlan:
    kept, at = s.coder_bytes(name, spec.num_latents), s.structure.hookpoints[name.partition("/")[0]]
    return CoderPlan(name, at.module, spec.d_in, spec.d_out, spec.num_latents, spec.sae.k, kept.weights // FLOAT, kept)
