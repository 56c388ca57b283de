"""``fastsae plan`` beside what really happens: structure, bytes kept, files, tokens, and its errors."""

import json
import resource
import shutil
import time

import pytest
import torch
from models import make_model, save_model, token_rows
from test_cli import one_line, run

from fastsae import Plan, PlanConfig, RunConfig, SaeConfig, TrainConfig, Trainer, plan
from fastsae.coders import find_hookpoints

SAE = SaeConfig(num_latents=64, k=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by architecture that hold a config.json and nothing else, and tokens in ``tokens``."""
    root = tmp_path_factory.mktemp("structure")
    for architecture in ("gpt2", "llama", "bert"):
        whole = save_model(architecture, root / f"{architecture}-whole")
        (root / architecture).mkdir()
        shutil.copy(whole / "config.json", root / architecture)
    token_rows(40, 16).save_to_disk(root / "tokens")
    return root


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_structure_is_the_real_models(architecture, folders):
    cfg = TrainConfig(SAE, hookpoints=("*",))
    made = plan(cfg, str(folders / architecture), str(folders / "tokens"), RunConfig(device="cpu"))
    model = make_model(architecture).base_model
    real = find_hookpoints(model, cfg)
    assert {c.name: (c.module, c.d_in, c.d_out) for c in made.coders} == {
        name: (at.module, at.d_out, at.d_out) for name, at in real.items()
    }
    assert made.model_parameters == sum(p.numel() for p in model.parameters() if p.shape)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert made.memory.model == weights


def test_a_big_model_is_planned_in_seconds_with_little_memory(tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    run = RunConfig(device="cuda", ctx_len=2048, max_tokens=10**9)
    made = plan(TrainConfig(), str(tmp_path), "some/dataset", run, PlanConfig(memory="80GiB"))
    assert time.perf_counter() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert made.model_parameters == 7_504_924_672  # Llama 3 8B without its LM head
    assert made.memory.model == pytest.approx(2 * made.model_parameters, rel=1e-4)  # bfloat16
    assert len(made.coders) == 32
    matrices = 32 * 2 * 4096 * 131072
    assert made.memory.kept.optimizer == 8 * (matrices + 32 * (131072 + 4096))
    assert made.memory.kept.copies == 2 * matrices
    assert made.memory.fits is False


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit", "signum", "muon"])
@pytest.mark.parametrize("steps", [1, 2])
def test_what_stays_is_what_a_trainer_keeps(optimizer, steps, folders, tmp_path):
    sae = SaeConfig(num_latents=96, k=4, transcode=steps == 2, skip_connection=steps == 2)
    cfg = TrainConfig(sae, hookpoints=("h.*.mlp",), batch_size=4, grad_acc_steps=steps, optimizer=optimizer)
    cfg = TrainConfig(**{**vars(cfg), "save_dir": str(tmp_path), "run_name": "a"})
    kept = plan(cfg, str(folders / "gpt2"), str(folders / "tokens")).memory.kept
    trainer = Trainer(cfg, token_rows(40, 16), make_model("gpt2"))
    trainer.train_step([{"input_ids": token_rows(4, 16)[:]["input_ids"]}] * steps)
    parameters = [p for coder in trainer.coders.values() for p in coder.parameters()]
    assert kept.weights == sum(p.nbytes for p in parameters)
    assert kept.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = trainer.optimizer.state_dict()["state"].values()
    assert kept.optimizer == sum(t.nbytes for state in states for name, t in state.items() if name != "step")


def test_files_are_as_large_as_planned(folders, tmp_path, monkeypatch):
    cfg = TrainConfig(
        SaeConfig(num_latents=512, k=4), hookpoints=("h.*",), batch_size=4, save_every=2, keep_last=2, save_best=True,
        save_dir=str(tmp_path), run_name="a",
    )  # fmt: skip
    made = plan(cfg, str(folders / "gpt2"), str(folders / "tokens"))

    def used(folder):
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    states = []
    monkeypatch.setattr("fastsae.trainer.drop_states", lambda run: states.append(used(run / "state")))
    trainer = Trainer(cfg, token_rows(40, 16), make_model("gpt2"))
    assert trainer.total_steps == made.tokens.steps == 10
    trainer.fit(progress=False)
    finished = used(tmp_path / "a") - states[0]
    assert finished == pytest.approx(made.disk.finished, rel=0.01)
    assert states[0] == pytest.approx(2 * made.disk.state, rel=0.01)
    assert finished + states[0] == pytest.approx(made.disk.running, rel=0.01)


def test_tokens_are_counted_where_they_are_known(folders, tmp_path):
    import numpy as np

    cfg, name = TrainConfig(SAE, batch_size=3), str(folders / "gpt2")
    tokens = plan(cfg, name, str(folders / "tokens")).tokens
    assert (tokens.sequences, tokens.held_out, tokens.per_sequence, tokens.exact) == (38, 2, 16, True)
    assert (tokens.total, tokens.steps) == (38 * 16, 13)
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    tokens = plan(cfg, name, str(tmp_path / "ids.bin"), RunConfig(ctx_len=8, max_examples=100)).tokens
    assert (tokens.sequences, tokens.held_out, tokens.exact) == (95, 5, True)
    tokens = plan(cfg, name, "org/never-asked-for", RunConfig(ctx_len=8, max_tokens=4000), PlanConfig(ranks=2)).tokens
    assert (tokens.sequences, tokens.exact, tokens.steps) == (475, False, 80)
    tokens = plan(cfg, name, "org/never-asked-for").tokens
    assert (tokens.total, tokens.steps, tokens.per_sequence) == (None, None, 64)


def test_command_shows_tables_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(capsys, "plan", "demo", "--hookpoints", "h.*.mlp", "--memory", "100MB", "--device", "cpu")
    assert code == 0
    assert "h.3.mlp" in out
    assert "does not fit" in out
    assert "at most 483,584" in out
    code, out, _ = run(capsys, "plan", "demo", "--hookpoints", "h.*.mlp", "--json", "--device", "cpu")
    values = json.loads(out)
    assert code == 0
    assert values["coders"][3]["kept"]["weights"] == 4 * (2 * 128 * 4096 + 4096 + 128)
    assert values["memory"]["fits"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hookpoints", "h.9"], "no module of GPT2Model matches hookpoint 'h.9'"),
        (["--memory", "lots"], "memory: expected a size such as 24GiB or 80GB, got 'lots'"),
        (["--ranks", "3", "--distribute-latents", "2"], "expected a divisor of the number of processes, 3, got 2"),
        (["--k", "9000"], "expected k <= number of latents"),
        (["--ranks", "2", "--activation", "batchtopk"], "expected --distribute-modules for batchtopk"),
    ],
)
def test_errors_are_the_runs_own(options, said, capsys):
    code, _, err = run(capsys, "plan", "demo", *options, "--device", "cpu")
    assert code == 2
    assert said in one_line(err)


def test_a_folder_without_a_config_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "plan", str(tmp_path), "--device", "cpu")
    assert code == 2
    assert "expected a Hugging Face hub id or a folder" in one_line(err)


def test_plan_is_lazy_and_public():
    assert Plan.__module__ == "fastsae.planning.result"
    assert torch.cuda.is_available() or plan(TrainConfig(SAE), run=RunConfig(device="cuda", ctx_len=8)).device == "cuda"


def test_recorded_steps_keep_their_memory(folders):
    """Each coder's step, and a copy of its tokens."""
    run = RunConfig(device="cuda", ctx_len=8)
    plain, graph = (
        plan(
            TrainConfig(SAE, hookpoints=("h.0", "h.1"), batch_size=4, cuda_graph=graph), str(folders / "gpt2"),
            str(folders / "tokens"), run, PlanConfig(memory="1GiB"),
        ).memory
        for graph in (False, True)
    )  # fmt: skip
    tokens = 2 * 4 * 8 * 32 * 2  # coders, sequences, tokens, width, bytes
    recorded = graph.buffers - plain.buffers
    assert tokens < recorded < tokens + 2**18
    assert plain.when == graph.when == "the model's forward"
    assert graph.peak == plain.peak + recorded
