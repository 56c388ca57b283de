"""What SAEBench, delphi and nnsight do with a coder, with their real code where it is installed."""

import pytest
import torch
from coders import D, K, L, inputs, make_coder, truth

from fastsae import FastSae, SaeConfig
from fastsae.compat import convert
from fastsae.compat.delphi import as_latent_encoder, hookpoint_to_sparse_encode
from fastsae.compat.formats import sparsify as sparsify_format
from fastsae.compat.saebench import as_saebench
from fastsae.errors import CheckpointError, ConfigError

MANY = pytest.mark.filterwarnings("ignore")  # of the other libraries
NO_DEPS = "pip install --no-deps {0}, beside 'fastsae[peers]'"


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)


def make_sae(**facts) -> FastSae:
    return sparsify_format.to_fastsae(make_coder(**facts))


# ---- SAEBench ----


@pytest.mark.parametrize("x", [inputs(), inputs().flatten(0, 1)], ids=["3-D", "2-D"])
def test_saebench_object(x):
    sae = as_saebench(make_sae(), "gpt2-small", "blocks.3.hook_mlp_out")
    acts, out = truth(make_coder(), x)
    close(sae.encode(x), acts)
    close(sae.decode(sae.encode(x)), out)
    close(sae(x), out)
    dense = torch.rand(*x.shape[:-1], L)  # SAEBench also decodes edited activations, which are not k-sparse
    close(sae.decode(dense), dense.double() @ sae.W_dec.double() + sae.b_dec.double())
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_enc.shape, sae.b_dec.shape) == ((D, L), (L, D), (L,), (D,))
    assert (sae.cfg.hook_layer, sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.model_name) == (3, D, L, "gpt2-small")
    assert sae.to(dtype=torch.bfloat16) is sae
    assert (sae.dtype, sae.cfg.dtype, str(sae.device)) == (torch.bfloat16, "bfloat16", "cpu")
    assert sae(x.bfloat16()).dtype == torch.bfloat16
    sae.cfg.training_tokens = 7  # it is written to
    assert sae.cfg.to_dict()["training_tokens"] == 7


def test_saebench_takes_the_hook_from_the_coders_own_notes_and_refuses_what_it_cannot_judge():
    assert as_saebench(make_sae(), "gpt2").cfg.hook_name == "blocks.3.hook_mlp_out"
    for facts in ({"transcode": True}, {"skip": True}):
        with pytest.raises(ConfigError, match="expects an autoencoder"):
            as_saebench(make_sae(**facts), "gpt2")
    sae = make_sae()
    with torch.no_grad():
        assert sae.W_dec is not None
        sae.W_dec.mul_(2)
    with pytest.raises(ConfigError, match="rows of norm 1, got 2 to 2"):
        as_saebench(sae, "gpt2")
    with pytest.raises(ConfigError, match="expected one of a layer"):
        as_saebench(make_sae(), "gpt2", "hook_embed")


@MANY
def test_saebench_evaluates_it():
    core = pytest.importorskip("sae_bench.evals.core.main", reason=NO_DEPS.format("sae-bench==0.6.0 tabulate"))
    from sae_bench.custom_saes.base_sae import BaseSAE
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = {"n_layers": 2, "d_model": D, "n_ctx": 16, "d_head": 8, "d_vocab": 50, "act_fn": "relu", "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig(**cfg))
    tokens = torch.randint(0, 50, (4, 16))
    hook = "blocks.0.hook_resid_post"
    sae = as_saebench(FastSae(D, SaeConfig(num_latents=L, k=K)), "tiny", hook)
    assert BaseSAE.check_decoder_norms(sae)

    class Store:
        def get_batch_tokens(self, batch_size):
            return tokens[:batch_size]

    metrics, features = core.get_sparsity_and_variance_metrics(
        sae, model, Store(), 1, True, True, True, True, eval_batch_size_prompts=4, model_kwargs={}
    )
    x = model.run_with_cache(tokens)[1][hook]
    acts = sae.encode(x)
    assert metrics["l0"] == pytest.approx((acts != 0).sum(-1).float().mean().item())
    assert metrics["mse"] == pytest.approx((x - sae(x)).square().sum(-1).mean().item() / 64, rel=1e-4)
    assert features["feature_density"] == pytest.approx((acts > 0).float().mean((0, 1)).tolist())
    weights = core.get_featurewise_weight_based_metrics(sae)
    assert weights["encoder_norm"] == pytest.approx(sae.sae.encoder.weight.norm(dim=1).tolist())


# ---- delphi ----


def test_delphi_callables(tmp_path):
    coders = {f"h.{i}.mlp": make_coder(hookpoint=f"h.{i}.mlp") for i in range(2)}
    convert.save(coders, tmp_path / "run", "dictionary_learning")  # of any format
    encoders = hookpoint_to_sparse_encode(tmp_path / "run", hookpoints=["h.1.mlp"])
    assert list(encoders) == ["h.1.mlp"]
    latents = encoders["h.1.mlp"](inputs())
    assert (latents.shape, latents.requires_grad) == ((5, 7, L), False)
    close(latents, truth(coders["h.1.mlp"], inputs())[0])
    assert as_latent_encoder(make_sae())(inputs().bfloat16()).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"no coder 'h.9.mlp' .* holds: h.0.mlp, h.1.mlp"):
        hookpoint_to_sparse_encode(tmp_path / "run", hookpoints=["h.9.mlp"])


@MANY
def test_delphis_own_function_gives_the_same_latents_with_our_class(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    pytest.importorskip("sparsify", reason="eai-sparsify is not installed; pip install 'fastsae[interop]'")
    module = pytest.importorskip("delphi.sparse_coders.load_sparsify", reason=NO_DEPS.format("eai-delphi==0.1.3"))
    sae = make_sae()
    close(module.sae_dense_latents(inputs(), sae), as_latent_encoder(sae)(inputs()))


# ---- nnsight ----


@MANY
def test_nnsight_traces_it():
    nnsight = pytest.importorskip("nnsight", reason="nnsight: pip install 'fastsae[peers]'")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.sae = torch.nn.Linear(D, D), make_sae()

        def forward(self, x):
            return self.sae(self.layer(x)).sae_out

    model = Model()
    x = inputs()
    traced = nnsight.NNsight(model)
    with traced.trace(x):  # scan=True, a run on fake tensors, fails in nnsight 0.3.7 on torch 2.14 for any module
        hidden = traced.layer.output.save()
        acts = nnsight.apply(model.sae.encode, traced.layer.output)[0].save()
        out = traced.output.save()
    close(hidden.value, model.layer(x))
    close(acts.value, model.sae.encode(model.layer(x)).top_acts)
    close(out.value, model(x))
