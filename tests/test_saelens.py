"""The plug-in for SAELens 6: same numbers as its own classes, all hook points, its trainer, its loaders."""

import json

import pytest
import torch
from coders import D, K, L, inputs, make_coder, truth

from fastsae import FastSae, TranscoderConfig
from fastsae.compat import convert
from fastsae.errors import CheckpointError, ConfigError

sae_lens = pytest.importorskip(
    "sae_lens", reason="sae-lens: pip install torch==2.14.1 torchvision==0.29.1, then 'fastsae[peers]'"
)
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput  # noqa: E402

from fastsae.compat import saelens  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other library
HOOKS = ["input", "acts_pre", "acts_post", "recons", "output", "error"]


@pytest.fixture(autouse=True)
def _registered():
    saelens.register()
    saelens.register()  # twice is once


def close(got, wanted, tolerance=2e-6):
    torch.testing.assert_close(
        got.double(), wanted.double(), atol=tolerance * wanted.abs().max().item(), rtol=tolerance
    )


def training_pair(**options):
    """SAELens' own training SAE and ours, with the same random weights."""
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(D, L, k=K, **options))
    ours = saelens.FastTopKTrainingSAE(saelens.FastTopKTrainingSAEConfig(D, L, k=K, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step_input(x, dead=None):
    return TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)


def provider(width, rows=32):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(4, width, generator=generator)
    while True:
        yield torch.randn(rows, 4, generator=generator) @ basis + 0.1 * torch.randn(rows, width, generator=generator)


def trainer_for(sae, data, steps=60):
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=32 * steps,
        device="cpu", autocast=False,
        lr=3e-3, lr_end=1e-3, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=32, dead_feature_window=5,
        feature_sampling_window=50, logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=5,
    )  # fmt: skip
    return sae_lens.SAETrainer(cfg=cfg, sae=sae, data_provider=data)


# ---- inference ----


def test_a_registered_coder_loads_computes_and_saves(tmp_path):
    convert.save({"": make_coder()}, tmp_path / "h.3.mlp", "sparsify")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "h.3.mlp", converter=saelens.disk_converter)
    assert type(sae) is saelens.FastTopKSAE
    assert sae.W_enc.mT.is_contiguous()  # latent by latent, as the kernels want it
    acts, out = truth(make_coder(), inputs())
    close(sae.encode(inputs()), acts)
    close(sae.decode(sae.encode(inputs())), out)
    close(sae(inputs()), out)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_mlp_out"
    sae.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/cfg.json").read_text())["architecture"] == "fastsae_topk"
    close(sae_lens.SAE.load_from_disk(tmp_path / "saved")(inputs()), out)
    convert.convert(tmp_path / "saved", tmp_path / "plain", "saelens")  # for people without fastsae
    plain = sae_lens.SAE.load_from_disk(tmp_path / "plain")
    assert type(plain) is sae_lens.TopKSAE
    close(plain(inputs()), out)


@pytest.mark.parametrize("hooked", [*HOOKS, "nothing"])
@pytest.mark.parametrize("error_term", [False, True])
def test_every_hook_point_fires_and_sees_what_saelens_shows(tmp_path, hooked, error_term):
    convert.save({"": make_coder()}, tmp_path / "coder", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "coder")
    ours = sae_lens.SAE.load_from_disk(tmp_path / "coder", converter=saelens.disk_converter)
    seen = {}
    for sae in (theirs, ours):
        sae.use_error_term = error_term
        if hooked != "nothing":
            point = getattr(sae, f"hook_sae_{hooked}")
            point.add_hook(lambda tensor, hook, sae=sae: seen.setdefault(id(sae), []).append(tensor.clone()))
        seen[f"out {id(sae)}"] = [sae(inputs())]
    close(seen[f"out {id(ours)}"][0], seen[f"out {id(theirs)}"][0])
    expected = seen.get(id(theirs), [])
    assert (len(expected) > 0) == (hooked != "nothing" and (hooked != "error" or error_term))
    for mine, other in zip(seen.get(id(ours), []), expected, strict=True):
        close(mine, other)


def test_an_edit_at_a_hook_point_changes_the_output(tmp_path):
    convert.save({"": make_coder()}, tmp_path / "coder", "saelens")
    for converter in ({}, {"converter": saelens.disk_converter}):
        sae = sae_lens.SAE.load_from_disk(tmp_path / "coder", **converter)
        sae.hook_sae_acts_post.add_hook(lambda tensor, hook: torch.zeros_like(tensor))
        close(sae(inputs()), sae.b_dec.expand(5, 7, D))


def test_no_dense_matrix_is_made_without_hooks(tmp_path):
    convert.save({"": make_coder()}, tmp_path / "coder", "saelens")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "coder", converter=saelens.disk_converter)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "fastsae_kernels" not in str(func):
                sizes.append(tuple(out.shape))
            return out

    x = inputs().flatten(0, 1)
    with torch.no_grad(), Watch():
        sae(x)
    assert sizes
    assert (35, L) not in sizes


# ---- training ----


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dead", [0, 3, L - 10])
@pytest.mark.parametrize("hooked", [False, True])
def test_losses_and_gradients_are_saelens(rescale, dead, hooked):
    theirs, ours = training_pair(rescale_acts_by_decoder_norm=rescale, aux_loss_coefficient=0.5)
    mask = torch.zeros(L, dtype=torch.bool)
    mask[torch.randperm(L, generator=torch.Generator().manual_seed(1))[:dead]] = True
    if hooked:
        ours.hook_sae_acts_pre.add_hook(lambda tensor, hook: None)
    x = inputs().flatten(0, 1)
    outputs = [sae.training_forward_pass(step_input(x, mask)) for sae in (theirs, ours)]
    for output in outputs:
        output.loss.backward()
    assert set(outputs[0].losses) == set(outputs[1].losses)
    for name, value in outputs[0].losses.items():
        close(outputs[1].losses[name], value)
    close(outputs[1].sae_out, outputs[0].sae_out)
    acts = outputs[1].feature_acts
    close(acts.to_dense() if acts.is_sparse else acts, outputs[0].feature_acts)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, atol=1e-5 * other.grad.abs().max().item(), rtol=1e-4, msg=name
        )


def test_saetrainer_trains_saves_and_reloads(tmp_path):
    results = []
    for sae in training_pair():
        trainer = trainer_for(sae, provider(D))
        first = trainer.step(next(provider(D))).loss.item()
        trainer.fit()
        results.append(
            (first, trainer.step(next(provider(D))).loss.item(), trainer.n_forward_passes_since_fired.clone())
        )
    (first, last, fired), (my_first, my_last, my_fired) = results
    assert my_first == pytest.approx(first, rel=1e-5)
    assert my_last == pytest.approx(last, rel=0.02)
    assert my_last < 0.5 * my_first
    assert (my_fired == fired).float().mean() > 0.9  # dead latents are counted on our sparse activations
    sae.save_inference_model(tmp_path / "inference")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert type(loaded) is saelens.FastTopKSAE
    x = next(provider(D))
    close(loaded(x), sae(x), 1e-5)
    sae.save_model(tmp_path / "training")
    close(convert.load(tmp_path / "training")(x), sae(x), 1e-5)


# ---- transcoders ----


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_trains_with_saetrainer_and_reloads(tmp_path, skip):
    d_out = 10
    torch.manual_seed(0)
    mapping = torch.randn(D, d_out)
    cfg = saelens.FastTopKTranscoderTrainingSAEConfig(D, L, d_out=d_out, k=K, skip_connection=skip)
    sae = saelens.FastTopKTranscoderTrainingSAE(cfg)
    pairs = ((x, (x @ mapping).relu()) for x in provider(D))
    trainer = trainer_for(sae, saelens.pair_batches(pairs), steps=150)
    x = next(provider(D))
    y = (x @ mapping).relu()
    before = (sae(x) - y).square().sum()
    assert torch.equal(sae(x), torch.zeros(32, d_out))  # the decoder starts at zero
    trainer.fit()
    assert (sae(x) - y).square().sum() < 0.5 * before
    assert (sae.W_skip is None) == (not skip)
    sae.save_inference_model(tmp_path / "out")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert type(loaded) is saelens.FastTopKTranscoder
    close(loaded(x), sae(x))
    coder = convert.load(tmp_path / "out")
    assert (coder.activation, coder.k, coder.transcode, coder.d_out) == ("topk", K, True, d_out)
    close(coder(x), sae(x))


@pytest.mark.parametrize("dead", [0, 20])
def test_a_transcoders_gradients_against_dense_float64(dead):
    cfg = saelens.FastTopKTranscoderTrainingSAEConfig(D, L, d_out=10, k=K, skip_connection=True)
    sae = saelens.FastTopKTranscoderTrainingSAE(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, y = torch.randn(40, D), torch.randn(40, 10)
    mask = torch.arange(L) < dead
    output = sae.training_forward_pass(step_input(torch.cat([x, y], 1), mask))
    output.loss.backward()
    assert torch.equal(output.sae_in, y)

    p = {name: parameter.detach().double().requires_grad_() for name, parameter in sae.named_parameters()}
    pre = x.double() @ p["W_enc"] + p["b_enc"]
    chosen = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    out = (pre.relu() * chosen) @ p["W_dec"] + p["b_dec"] + x.double() @ p["W_skip"].T
    loss = (out - y).square().sum(1).mean()
    if dead:
        k_aux = min(10 // 2, dead)
        hidden = pre.masked_fill(~mask, -torch.inf)
        picked = torch.zeros_like(pre).scatter(1, hidden.topk(k_aux).indices, 1.0)
        residual = (y - out).detach()
        loss = loss + min(dead / 5, 1.0) * ((pre * picked) @ p["W_dec"] - residual).square().sum(1).mean()
    loss.backward()
    close(output.loss, loss)
    for name, parameter in sae.named_parameters():
        wanted = p[name].grad
        assert wanted is not None
        torch.testing.assert_close(
            parameter.grad.double(), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4, msg=name
        )


def test_a_fastsae_transcoder_loads_in_saelens(tmp_path):
    sae = FastSae(D, TranscoderConfig(num_latents=L, k=K, skip_connection=True))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    sae.save_to_disk(tmp_path / "layers.2.mlp")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "layers.2.mlp", converter=saelens.disk_converter)
    close(theirs(inputs()), sae(inputs()).sae_out)
    points = {}
    for name in ("input", "acts_pre", "acts_post", "recons", "output"):
        getattr(theirs, f"hook_sae_{name}").add_hook(lambda tensor, hook, name=name: points.setdefault(name, tensor))
    close(theirs(inputs()), sae(inputs()).sae_out)
    assert set(points) == {"input", "acts_pre", "acts_post", "recons", "output"}
    close(theirs.forward_with_activations(inputs())[0], sae(inputs()).sae_out)


def test_transcoder_mistakes_are_explained():
    config = saelens.FastTopKTranscoderTrainingSAEConfig
    for options in ({"rescale_acts_by_decoder_norm": True}, {"normalize_activations": "layer_norm"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
            config(D, L, d_out=10, k=K, **options)
    sae = saelens.FastTopKTranscoderTrainingSAE(config(D, L, d_out=10, k=K))
    with pytest.raises(ConfigError, match=r"16 \+ 10 wide, got \[3, 16\]"):
        sae.training_forward_pass(step_input(torch.zeros(3, D)))


# ---- loaders ----


@pytest.mark.parametrize("num_latents", [0, L])
def test_sparsify_checkpoints_load_rightly_from_disk_and_hub(tmp_path, monkeypatch, num_latents):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed; pip install 'fastsae[interop]'")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    theirs = sparsify.Sae(D, sparsify.SaeConfig(expansion_factor=3, num_latents=num_latents, k=K))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    commit = "0" * 40
    repo = tmp_path / "hub/models--org--saes"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    folder = repo / "snapshots" / commit / "h.0.mlp.act"
    theirs.save_to_disk(folder)
    with pytest.raises(ValueError, match="Unrecognized Sparsify folder"):  # SAELens' own loader, hence ours
        sae_lens.loading.pretrained_sae_loaders.sparsify_disk_loader(folder)
    close(sae_lens.SAE.load_from_disk(folder, converter=saelens.disk_converter)(inputs()), truth_of(theirs))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = sae_lens.SAE.from_pretrained("org/saes", "h.0.mlp.act", converter=saelens.hub_converter)
    close(loaded(inputs()), truth_of(theirs))
    assert loaded.cfg.metadata.hook_name == "blocks.0.mlp.hook_post"
    assert (
        sae_lens.SAE.load_from_disk(folder, dtype="bfloat16", converter=saelens.disk_converter).dtype == torch.bfloat16
    )


def truth_of(sae):
    x = inputs().flatten(0, 1)
    acts, indices, _ = sae.encode(x)
    return sae.decode(acts, indices).reshape(5, 7, D)


def test_what_saelens_cannot_compute_is_refused(tmp_path):
    for facts, reason in [({"activation": "groupmax"}, "no groupmax"), ({"skip": True}, "W_skip is dropped")]:
        convert.save({"": make_coder(**facts)}, tmp_path / reason[:3], "sparsify")
        with pytest.raises(CheckpointError, match=f"cannot compute this coder: .*{reason}"):
            sae_lens.SAE.load_from_disk(tmp_path / reason[:3], converter=saelens.disk_converter)


def test_without_registering_the_coders_are_saelens_own(tmp_path, monkeypatch):
    from sae_lens import registry

    for name in ("fastsae_topk", "fastsae_topk_transcoder"):
        monkeypatch.delitem(registry.SAE_CLASS_REGISTRY, name)
    convert.save({"": make_coder()}, tmp_path / "sae", "sparsify")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "sae", converter=saelens.disk_converter)
    assert type(sae) is sae_lens.TopKSAE
    convert.save({"": make_coder(transcode=True)}, tmp_path / "transcoder", "sparsify")
    with pytest.raises(CheckpointError, match=r"call fastsae.compat.saelens.register\(\) first"):
        saelens.disk_converter(tmp_path / "transcoder")
