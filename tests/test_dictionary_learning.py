"""Our dictionary inside dictionary_learning: the same numbers as its own class, and its trainer's whole run."""

import json

import pytest
import torch
from coders import D, K, L, inputs, make_coder, truth

from fastsae.compat import convert

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other library


@pytest.fixture(scope="module")
def peer():
    """(its TopK module, our class)."""
    reason = "dictionary-learning: pip install torch==2.14.1 torchvision==0.29.1, then 'fastsae[peers]'"
    pytest.importorskip("dictionary_learning", reason=reason)
    from dictionary_learning.trainers import top_k

    from fastsae.compat.dictionary_learning import FastAutoEncoderTopK

    return top_k, FastAutoEncoderTopK


def pair(peer):
    top_k, ours = peer
    theirs, mine = top_k.AutoEncoderTopK(D, L, K), ours(D, L, K)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def test_the_same_values_and_gradients(peer):
    theirs, mine = pair(peer)
    x = inputs().flatten(0, 1)
    results = []
    for ae in (theirs, mine):
        f, values, indices, relu = ae.encode(x, return_topk=True)
        loss = (ae.decode(f) - x).square().sum() + relu.square().mean() + values.sum()
        grads = torch.autograd.grad(loss, list(ae.parameters()))
        results.append((f, values.sort(-1, descending=True).values, relu, loss, *grads, *ae(x, output_features=True)))
        assert torch.equal(f.gather(-1, indices), values)
    for mine_, other in zip(*results, strict=True):
        torch.testing.assert_close(other, mine_, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mine.encode(inputs()), theirs.encode(inputs()), atol=1e-5, rtol=1e-5)
    mine.threshold.fill_(0.3)
    theirs.threshold.fill_(0.3)
    torch.testing.assert_close(mine.encode(x, use_threshold=True), theirs.encode(x, use_threshold=True))
    assert (mine.activation_dim, mine.dict_size) == (D, L)


def test_its_trainer_trains_it_as_its_own(peer, tmp_path):
    from dictionary_learning.training import trainSAE

    top_k, ours = peer
    basis = torch.randn(4, D, generator=torch.Generator().manual_seed(0))

    def data():
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(64, 4, generator=generator) @ basis

    common = {
        "trainer": top_k.TopKTrainer, "activation_dim": D, "dict_size": L, "k": K, "layer": 3, "lm_name": "gpt2",
        "steps": 40,
        "warmup_steps": 0, "seed": 0, "device": "cpu", "submodule_name": "h.3.mlp", "lr": 1e-3,
    }  # fmt: skip
    configs = [{**common}, {**common, "dict_class": ours}]
    trainSAE(data(), configs, steps=40, save_dir=str(tmp_path), device="cpu")
    plain, fast = (torch.load(tmp_path / f"trainer_{i}/ae.pt", weights_only=True) for i in range(2))
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name].float(), tensor.float(), atol=2e-3, rtol=1e-2, msg=name)

    from dictionary_learning.utils import load_dictionary

    theirs, _ = load_dictionary(str(tmp_path / "trainer_1"), device="cpu")  # the plain library reads what we trained
    assert json.loads((tmp_path / "trainer_1/config.json").read_text())["trainer"]["dict_class"] == "AutoEncoderTopK"
    x = next(data())
    coder = convert.load_all(tmp_path)["trainer_1"]
    torch.testing.assert_close(coder(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert (x - theirs(x)).square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_from_pretrained(peer, tmp_path):
    _, ours = peer
    convert.save({"": make_coder()}, tmp_path / "out", "dictionary_learning")
    loaded = ours.from_pretrained(tmp_path / "out/ae.pt", device="cpu")
    acts, out = truth(make_coder(), inputs())
    torch.testing.assert_close(loaded.encode(inputs()).double(), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(inputs()).double(), out, atol=1e-5, rtol=1e-5)
