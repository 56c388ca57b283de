"""Planned peaks beside measured ones, within a tenth: what torch's allocator saw in real runs.

The planned peak is the most bytes of tensors alive at once, the model's included, from loading it to the run's end.
"""

from dataclasses import replace

import pytest
import torch
from allocations import peak_bytes
from models import token_rows
from transformers import AutoModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, plan

S = 128
SAE = SaeConfig(num_latents=4096, k=32)
CASES = {
    "adam": {},
    "signum": {"optimizer": "signum"},
    "adam8bit": {"optimizer": "adam8bit"},
    "muon": {"optimizer": "muon"},
    "accumulated": {"grad_acc_steps": 2},
    "micro-batches": {"micro_acc_steps": 2, "max_grad_norm": 1.0},
    "transcoder": {"sae": replace(SAE, transcode=True, skip_connection=True), "hookpoints": ("*.0.mlp",)},
    "several hookpoints": {"hookpoints": ("h.0", "h.1.mlp", "h.1.mlp.act")},
    "multi-topk": {"sae": replace(SAE, multi_topk=True)},
    "matryoshka": {"sae": replace(SAE, matryoshka_widths=(512, 1024))},
    "batchtopk": {"sae": replace(SAE, activation="batchtopk")},
    "groupmax": {"sae": replace(SAE, activation="groupmax")},
    "excluded and shuffled": {"exclude_tokens": (7,), "token_buffer": 1000},  # filled by two batches of the five
    "few latents, many tokens": {"sae": SaeConfig(num_latents=256, k=16), "batch_size": 36},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of some width, and tokens for five steps or fewer."""
    root = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    GPT2Model(
        GPT2Config(vocab_size=4096, n_positions=S, n_embd=256, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(root / "gpt2")
    LlamaModel(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=S,
        )
    ).save_pretrained(root / "llama")  # fmt: skip
    token_rows(40, S).save_to_disk(root / "tokens")
    return root


def planned_and_measured(folder, model: str, **options) -> tuple[int, int]:
    sae = options.pop("sae", SAE)
    cfg = TrainConfig(
        **{"sae": sae, "hookpoints": ("*.1.mlp",), "batch_size": 8, "save_dir": str(folder / "runs"), **options}
    )
    made = plan(cfg, str(folder / model), str(folder / "tokens"), RunConfig(device="cpu"))
    rows = token_rows(40, S)

    def train() -> Trainer:
        trainer = Trainer(cfg, rows, AutoModel.from_pretrained(folder / model).requires_grad_(False))
        trainer.fit(progress=False)
        return trainer

    return made.memory.peak, peak_bytes(train)


@pytest.mark.parametrize("case", CASES)
def test_planned_peak_is_within_a_tenth(case, folder):
    planned, measured = planned_and_measured(folder, "gpt2", **CASES[case])
    assert planned == pytest.approx(measured, rel=0.1), f"{planned / measured:.3f} of what was measured"


def test_another_architecture(folder):
    planned, measured = planned_and_measured(folder, "llama", hookpoints=("layers.*",), layer_stride=8)
    assert planned == pytest.approx(measured, rel=0.1), f"{planned / measured:.3f} of what was measured"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "adam8bit", "signum"])
def test_planned_peak_on_a_gpu(optimizer, folder):
    cfg = TrainConfig(
        SaeConfig(num_latents=65536, k=32), hookpoints=("h.*.mlp",), batch_size=8, optimizer=optimizer,
        save_dir=str(folder / "runs"),
    )  # fmt: skip
    made = plan(cfg, str(folder / "gpt2"), str(folder / "tokens"), RunConfig(device="cuda"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModel.from_pretrained(folder / "gpt2", dtype=getattr(torch, made.dtype)).cuda().requires_grad_(False)
    Trainer(cfg, token_rows(40, S), model).fit(progress=False)
    measured = torch.cuda.max_memory_allocated() - before
    assert made.memory.peak == pytest.approx(measured, rel=0.1), f"{made.memory.peak / measured:.3f} of it"
