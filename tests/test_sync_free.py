"""Training never waits for the device: no number of a step is read before the log's interval ends.

What makes the host wait on a GPU are reads of a value, and results whose size depends on values: both are operators,
seen here on any device. The forward of the model is transformers' own and may wait once, for its causal mask.
"""

from __future__ import annotations

import sys

import pytest
import torch
from models import make_model, token_rows
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae import SaeConfig, TrainConfig, Trainer

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
ON_THE_HOST = {  # module and function that read tensors which are on the host anyway
    ("fastsae.batches", "prepare"),  # token ids
    ("fastsae.row_optimizer", "update"),  # the step's number
    ("fastsae.row_optimizer", "row_step"),
    ("fastsae.optim", "learning_rates"),
    ("fastsae.deferred", "count"),  # of dead latents, which travelled while the device worked
    ("fastsae.deferred", "ids"),
}
SAE = SaeConfig(num_latents=24, k=2)


class Waits(TorchDispatchMode):
    """The operators that ran in the block for whose values the host has to wait, and where."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITS or by_mask:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].split(".")[0] in ("torch", "contextlib") or "<" in frame.f_code.co_name:
                assert frame.f_back is not None
                frame = frame.f_back
            where = frame.f_globals["__name__"], frame.f_code.co_name
            if args[0].is_cuda or where not in ON_THE_HOST:
                self.seen.append((name, *where))
        return func(*args, **(kwargs or {}))


def test_the_witness_sees_what_waits(device):
    x, mask = torch.arange(4.0, device=device), torch.tensor([True, False, True, True], device=device)
    with Waits() as waits:
        float(x[0]), x[mask], mask.nonzero(), bool(x[1] > 0), torch.equal(x, x), x + 1  # pyright: ignore
    names = [name for name, *_ in waits.seen]
    assert names == ["_local_scalar_dense", "index", "nonzero", "_local_scalar_dense", "equal"]
    assert waits.seen[0][1:] == (__name__, "test_the_witness_sees_what_waits")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "signum"},
        {"optimizer": "adam8bit", "grad_acc_steps": 2},
        {"max_grad_norm": 1.0, "micro_acc_steps": 2},
        {"auxk_alpha": 1 / 32, "dead_feature_threshold": 8},
        {"sae": SaeConfig(num_latents=24, k=2, multi_topk=True)},
        {"sae": SaeConfig(num_latents=24, k=2, transcode=True, skip_connection=True)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_step_reads_nothing(options, device, tmp_path):
    cfg = TrainConfig(**{"sae": SAE, **options}, hookpoints=("h.0.mlp",), batch_size=2, save_dir=str(tmp_path))
    trainer = Trainer(cfg, token_rows(18, 3), make_model("gpt2").to(device))
    steps = [batches for batches, _ in trainer._steps()]
    for batches in steps[:3]:  # new coders' biases, optimizer states, the first dead latents
        trainer.train_step(batches)
    trainer.coders["h.0.mlp"].implementation = "triton"
    counts = trainer.count_tokens(steps[3])[0]
    with Waits() as waits:
        trainer.train_step(steps[3], counts)
    assert [seen for seen in waits.seen if not seen[1].startswith("transformers.")] == []
    assert len(waits.seen) <= cfg.grad_acc_steps
    if "auxk_alpha" in options:
        assert trainer.metrics["h.0.mlp"].num_dead()
