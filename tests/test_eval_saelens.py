"""The same numbers as SAELens' own evaluation, on the same weights and tokens, in the same model."""

import pytest
import torch
from models import save_model, token_rows

pytest.importorskip("sae_lens", reason="SAELens is not installed; pip install sae-lens")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the other library


@pytest.mark.parametrize(
    ("architecture", "hookpoint", "theirs"),
    [("gpt2", "h.1", "transformer.h.1"), ("llama", "layers.0.mlp", "model.layers.0.mlp")],
)
def test_agrees_with_saelens(tmp_path, architecture, hookpoint, theirs):
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
    from sae_lens.load_model import load_model
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler
    from test_eval import make_coder

    from fastsae import EvalConfig, RunConfig, evaluate, load_language_model

    folder, rows, coder = save_model(architecture, tmp_path / "model"), token_rows(6, 12), make_coder(32)
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=4, metadata=SAEMetadata(hook_name=theirs)))
    with torch.no_grad():
        sae.W_enc.copy_(coder.encoder.weight.T)
        sae.b_enc.copy_(coder.encoder.bias)
        sae.W_dec.copy_(coder.W_dec)
        sae.b_dec.copy_(coder.b_dec)

    class Store:
        def __init__(self):
            self._batches = iter(rows["input_ids"][:].split(2))

        def get_batch_tokens(self, _size):
            return next(self._batches)

    hooked = load_model("AutoModelForCausalLM", str(folder), device="cpu")
    options = {"n_batches": 3, "eval_batch_size_prompts": 2, "model_kwargs": {}}
    loss = get_downstream_reconstruction_metrics(
        sae, hooked, Store(), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **options
    )
    own, latents = get_sparsity_and_variance_metrics(
        sae, hooked, Store(), ActivationScaler(), compute_l2_norms=False, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, **options,
    )  # fmt: skip

    model = load_language_model(str(folder), RunConfig(device="cpu"))
    (row,) = evaluate({hookpoint: coder}, model, rows, EvalConfig(batch_size=4), progress=False).coders
    ours = row.cross_entropy
    assert ours.clean.value == pytest.approx(loss["ce_loss_without_sae"], rel=1e-5)
    assert ours.grafted.value == pytest.approx(loss["ce_loss_with_sae"], rel=1e-5)
    assert ours.zero.value == pytest.approx(loss["ce_loss_with_ablation"], rel=1e-5)
    assert ours.kl.value == pytest.approx(loss["kl_div_with_sae"], rel=1e-3)
    assert ours.kl_zero.value == pytest.approx(loss["kl_div_with_ablation"], rel=1e-3)
    if abs(loss["ce_loss_with_ablation"] - loss["ce_loss_without_sae"]) > 1e-3:
        assert ours.recovered.value == pytest.approx(loss["ce_loss_score"], rel=1e-2)
    assert 1 - row.reconstruction.fvu.value == pytest.approx(own["explained_variance"], rel=1e-5)  # it sums in float32
    assert row.reconstruction.l0.value == pytest.approx(own["l0"], abs=1e-5)
    assert row.reconstruction.density.dead == sum(density == 0 for density in latents["feature_density"])
    assert row.reconstruction.density.dense == sum(density > 0.1 for density in latents["feature_density"])
