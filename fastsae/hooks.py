"""Reading and replacing a model's activations as they appear: capture, grafting.

Shapes: B sequences, S tokens each, D width of a module's input or output, V vocabulary. Names are relative to
the base model (``h.0.mlp.act``, ``layers.3``), in natural order.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Callback = Callable[[str, Tensor | None, Tensor], None]
"""Called as ``callback(name, input [B, S, D_in] or None, output [B, S, D])``, once per module call.

Both are on the device of the token ids, whichever device the module is on.
"""

Replacement = Callable[[Tensor | None, Tensor], Tensor]
"""``replacement(input [B, S, D_in] or None, output [B, S, D]) -> [B, S, D]``, what the module gives instead."""


class _Stop(Exception):
    """Ends the model's forward once every hookpoint has been served; never leaves this module."""


def run_hooked(
    model: PreTrainedModel,
    input_ids: Tensor,  # [B, S], int64
    calls: dict[str, int],
    callback: Callback,
    attention_mask: Tensor | None = None,  # [B, S]
) -> None:
    """Run the base model on ``input_ids`` and hand every hookpoint's activations to ``callback`` as they appear.

    ``calls`` says how often each hookpoint is called in a forward; when all have been, the forward stops
    (0: unknown, do not stop). The base model has no LM head, keeps no KV cache, runs in eval mode without
    gradients, and is left as it was found, also after an exception.
    """
    remaining = Counter(calls)

    def make_hook(name: str):
        def hook(_module, args, kwargs, output):
            tensor = _first_tensor(output)
            if tensor is not None:
                callback(name, _input(args, kwargs, input_ids.device), tensor.to(input_ids.device))
            remaining[name] -= 1
            if remaining[name] == 0 and not any(count > 0 for count in remaining.values()):
                raise _Stop

        return hook

    base = model.base_model
    hooks = {name: make_hook(name) for name in calls}
    with suppress(_Stop), _hooked(hooks, base), _eval_mode(base), torch.no_grad():
        base(input_ids=input_ids, **_forward_options(base, attention_mask))


def run_replaced(
    model: PreTrainedModel,
    input_ids: Tensor,  # [B, S], int64
    replacements: Mapping[str, Replacement],
    attention_mask: Tensor | None = None,  # [B, S]
    *,
    gradients: bool = False,
) -> Tensor:  # [B, S, V]
    """The logits of a model with an LM head, where each named module's output is what its replacement returns.

    Only the tensor that :func:`run_hooked` shows is replaced: what else a module returns (attention weights, a
    cache) passes through, so that ``lambda x, y: y`` changes nothing. Eval mode, no KV cache, and no gradients but
    with ``gradients`` those of what the replacements bring, never of the model's own parameters; the model is left as
    it was found, also after an exception.
    """

    def make_hook(replace: Replacement):
        def hook(_module, args, kwargs, output):
            tensor = _first_tensor(output)
            if tensor is None:
                return None
            new = replace(_input(args, kwargs, input_ids.device), tensor.to(input_ids.device))
            return _with_first_tensor(output, new.to(tensor.device))

        return hook

    hooks = {name: make_hook(replace) for name, replace in replacements.items()}
    with _hooked(hooks, model.base_model), _eval_mode(model), _frozen(model), torch.set_grad_enabled(gradients):
        return model(input_ids=input_ids, **_forward_options(model, attention_mask)).logits


def _forward_options(model: nn.Module, attention_mask: Tensor | None) -> dict[str, Tensor | bool]:
    options: dict[str, Tensor | bool] = {} if attention_mask is None else {"attention_mask": attention_mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return options


def _input(args, kwargs, device: torch.device) -> Tensor | None:
    tensor = _first_tensor(args) if args else _first_tensor(kwargs)
    return None if tensor is None else tensor.to(device)


def _first_tensor(value) -> Tensor | None:
    """The first float tensor with a feature axis in a module's input or output, which may be a tuple of things."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim >= 2 else None
    if isinstance(value, dict):  # keyword arguments, or a ModelOutput
        value = (value.get("hidden_states"), *value.values())
    if isinstance(value, (tuple, list)):
        return next((tensor for item in value if (tensor := _first_tensor(item)) is not None), None)
    return None


def _with_first_tensor(value, new: Tensor):
    """``value`` with ``new`` in place of what :func:`_first_tensor` finds in it; ``value`` itself is not changed."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, dict):
        changed = copy.copy(value)
        key = next(key for key in ("hidden_states", *value) if _first_tensor(value.get(key)) is not None)
        changed[key] = _with_first_tensor(value[key], new)
        return changed
    at = next(i for i, item in enumerate(value) if _first_tensor(item) is not None)
    items = [_with_first_tensor(item, new) if i == at else item for i, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


@contextmanager
def _hooked(hooks: dict[str, Callable], base: nn.Module) -> Iterator[None]:
    handles = [base.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
