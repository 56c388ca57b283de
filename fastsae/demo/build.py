"""Train the embedded language model: ``python -m fastsae.demo.build [--steps N] [--out FOLDER]``.

GPT-2 architecture, 6 layers of width 128, context 256, byte-level BPE with 4096 tokens, AdamW with a
one-cycle learning rate, on the sources of the Python standard library; one file in twenty is held out.
Prints the held-out loss and writes it to ``training.json`` beside the weights (fp16, about 3.5 MB).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from . import MODEL_DIR, is_held_out, stdlib_sources

EOS = "<|endoftext|>"
CONTEXT = 256
VOCABULARY = 4096


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, model_max_length=CONTEXT)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream with EOS before each, cut into rows: int64 [rows, CONTEXT]."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(text).ids]
    rows = len(ids) // CONTEXT
    return torch.tensor(ids[: rows * CONTEXT]).view(rows, CONTEXT)


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, rows: torch.Tensor, batch_size: int) -> float:
    """Mean next-token cross-entropy in nats, every row weighted equally."""
    model.eval()
    total = sum(model(b, labels=b).loss.item() * len(b) for b in rows.split(batch_size))
    model.train()
    return total / len(rows)


def train(model: GPT2LMHeadModel, rows: torch.Tensor, steps: int, batch_size: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start = time.perf_counter()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(rows))
        batch, order = rows[order[:batch_size]], order[batch_size:]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            rate = step * batch.numel() / (time.perf_counter() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of 256 tokens")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    args = parser.parse_args()

    torch.manual_seed(0)
    files = stdlib_sources()
    seen, held_out = (
        [path.read_text(encoding="utf-8") for path in files if is_held_out(path) == flag] for flag in (False, True)
    )
    tokenizer = train_tokenizer(seen)
    rows, held_out_rows = pack(tokenizer, seen), pack(tokenizer, held_out)
    print(f"{len(files)} files, {rows.numel():,} training and {held_out_rows.numel():,} held-out tokens", flush=True)

    eos = tokenizer.convert_tokens_to_ids(EOS)
    assert isinstance(eos, int)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=128, n_layer=6, n_head=4,
            bos_token_id=eos, eos_token_id=eos,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )
    )  # fmt: skip
    train(model, rows, args.steps, args.batch_size, args.lr)
    model.half().float()  # the weights that ship are fp16: measure those
    facts = {
        "held_out_loss_nats": round(mean_loss(model, held_out_rows, args.batch_size), 4),
        "training_tokens": args.steps * args.batch_size * CONTEXT,
        "distinct_training_tokens": rows.numel(),
        "held_out_tokens": held_out_rows.numel(),
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "arguments": {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr},
    }
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
