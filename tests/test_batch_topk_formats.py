"""BatchTopK and Matryoshka coders between fastsae and the libraries that train them: the same at inference."""

import json

import pytest
import torch
from coders import D, K, L, inputs
from test_peer_formats import PEERS, close, randomise

from fastsae import FastSae, SaeConfig
from fastsae.compat import convert
from fastsae.compat.dense import dense_latents
from fastsae.compat.info import info_table
from fastsae.errors import CheckpointError
from fastsae.saved import load_coders

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries
X = inputs().flatten(0, 1)


def assert_same(ours: FastSae, acts: torch.Tensor, out: torch.Tensor) -> None:
    assert 0 < (acts > 0).double().mean() < 0.9
    close(dense_latents(ours, X), acts.double(), 2e-6)
    close(ours(X).sae_out, out.double(), 2e-6)


def trained() -> FastSae:
    torch.manual_seed(0)
    sae = FastSae(D, SaeConfig(activation="batchtopk", num_latents=L, k=K, matryoshka_widths=(16,)))
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.encoder.bias.normal_(std=0.3)
        sae.threshold.fill_(0.4)
    sae.notes = {"hookpoint": "h.3.mlp", "model": "gpt2"}
    return sae.requires_grad_(False)


@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
@torch.no_grad()
def test_saelens_folders_compute_the_same_in_fastsae(tmp_path, name):
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens: {PEERS}")
    options = {"matryoshka_widths": [16, L]} if name.startswith("Matryoshka") else {}
    cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(D, L, k=K, **options)
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(cfg)
    randomise(theirs)
    theirs.topk_threshold.fill_(0.2)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("training", "inference"):
        (ours,) = load_coders(str(tmp_path / folder)).values()
        assert ours.cfg.activation == "batchtopk"
        assert_same(ours, inference.encode(X), inference(X))


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@torch.no_grad()
def test_dictionary_learning_folders_compute_the_same_in_fastsae(tmp_path, name):
    pytest.importorskip("dictionary_learning", reason=f"dictionary-learning: {PEERS}")
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k

    home = batch_top_k if name == "BatchTopKSAE" else matryoshka_batch_top_k
    theirs = getattr(home, name)(D, L, K, *([[16, L - 16]] if home is matryoshka_batch_top_k else []))
    randomise(theirs)
    theirs.threshold.fill_(0.3)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "submodule_name": "h.3.mlp"}}))
    (ours,) = load_coders(str(tmp_path)).values()
    assert (ours.cfg.activation, ours.cfg.k) == ("batchtopk", K)
    assert_same(ours, theirs.encode(X), theirs(X))


@torch.no_grad()
def test_both_libraries_compute_what_fastsae_trained(tmp_path):
    pytest.importorskip("dictionary_learning", reason=f"dictionary-learning: {PEERS}")
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens: {PEERS}")
    from dictionary_learning.utils import load_dictionary

    sae = trained()
    sae.save_to_disk(tmp_path / "run/h.3.mlp")
    for to in ("saelens", "dictionary_learning"):
        convert.convert(tmp_path / "run/h.3.mlp", tmp_path / to, to)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "saelens")
    assert_same(sae, theirs.encode(X), theirs(X))
    dictionary, _ = load_dictionary(str(tmp_path / "dictionary_learning"), device="cpu")
    assert type(dictionary).__name__ == "BatchTopKSAE"
    assert_same(sae, dictionary.encode(X), dictionary(X))


def test_sparsify_has_no_batchtopk_and_says_so(tmp_path):
    trained().save_to_disk(tmp_path / "h.3.mlp")
    with pytest.raises(CheckpointError, match=rf"sparsify has no jumprelu: it is written as TopK with k = {K}"):
        convert.convert(tmp_path / "h.3.mlp", tmp_path / "out", "sparsify")


@torch.no_grad()
def test_through_saelens_and_back_it_is_the_same_coder(tmp_path):
    sae = trained()
    sae.save_to_disk(tmp_path / "h.3.mlp")
    convert.convert(tmp_path / "h.3.mlp", tmp_path / "out", "saelens")
    (back,) = load_coders(str(tmp_path / "out")).values()
    assert_same(back, dense_latents(sae, X), sae(X).sae_out)


def test_info_calls_it_by_its_name(tmp_path):
    trained().save_to_disk(tmp_path / "h.3.mlp")
    (described,) = info_table(tmp_path).columns[2].cells
    assert described == f"batchtopk k={K}"
