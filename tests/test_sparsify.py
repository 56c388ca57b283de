"""fastsae and the real eai-sparsify 1.3.3 read each other's coders and compute the same with them."""

import os

import pytest
import torch

from fastsae import FastSae, SaeConfig, TranscoderConfig

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import: its decoder would pick Triton on CPU tensors
pytest.importorskip("sparsify", reason="eai-sparsify is not installed; pip install 'fastsae[interop]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the other library


@pytest.fixture(scope="module")
def sparsify():
    import sparsify

    return sparsify


CASES = [
    SaeConfig(num_latents=48, k=5),
    SaeConfig(expansion_factor=3, k=5),
    SaeConfig(num_latents=48, k=6, activation="groupmax"),
    SaeConfig(num_latents=48, k=5, skip_connection=True),
    SaeConfig(num_latents=48, k=5, normalize_decoder=False),
    TranscoderConfig(num_latents=48, k=5, skip_connection=True),
]


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def assert_same(ours: FastSae, theirs, cfg: SaeConfig) -> None:
    x = torch.randn(17, 16, generator=torch.Generator().manual_seed(4))
    mine, other = ours.encode(x), theirs.encode(x)
    other_acts, order = other.top_acts.sort(dim=1, descending=True, stable=True)
    other_indices = other.top_indices.gather(1, order)
    my_acts, order = mine.top_acts.sort(dim=1, descending=True, stable=True)
    my_indices = mine.top_indices.gather(1, order)
    torch.testing.assert_close(my_acts, other_acts, atol=1e-5, rtol=1e-5)
    assert torch.equal(my_indices[my_acts > 0], other_indices[other_acts > 0])
    torch.testing.assert_close(
        ours.decode(mine.top_acts, mine.top_indices),
        theirs.decode(other.top_acts, other.top_indices),
        atol=1e-5,
        rtol=1e-5,
    )
    y = torch.randn(17, 16) if cfg.transcode else x
    torch.testing.assert_close(ours(x, y).sae_out, theirs(x, y).sae_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x, y).fvu, theirs(x, y).fvu, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", CASES, ids=str)
def test_sparsify_reads_ours(tmp_path, sparsify, cfg):
    for name in ("h.0.mlp.act", "h.10.mlp.act"):
        coder = FastSae(16, cfg)
        randomise(coder)
        coder.save_to_disk(tmp_path / name)
    theirs = sparsify.Sae.load_many(str(tmp_path), local=True)
    assert list(theirs) == ["h.0.mlp.act", "h.10.mlp.act"]
    ours = FastSae.load_many(tmp_path, local=True)
    for name, coder in theirs.items():
        assert_same(ours[name], coder, cfg)


@pytest.mark.parametrize("cfg", CASES, ids=str)
def test_we_read_sparsifys(tmp_path, sparsify, cfg):
    theirs = sparsify.Sae(16, sparsify.SparseCoderConfig.from_dict(cfg.to_dict()))
    randomise(theirs)
    theirs.save_to_disk(tmp_path)
    ours = FastSae.load_from_disk(tmp_path)
    assert ours.cfg == cfg
    assert_same(ours, theirs, cfg)


def test_a_trained_run_loads_in_sparsify(tmp_path, sparsify):
    from models import make_model, token_rows

    from fastsae import TrainConfig, Trainer

    cfg = TrainConfig(sae=SaeConfig(num_latents=64, k=4), hookpoints=("h.*.mlp",), batch_size=4, save_dir=str(tmp_path))
    summary = Trainer(cfg, token_rows(24, 16), make_model("gpt2")).fit(progress=False)
    theirs = {coder.name: sparsify.Sae.load_from_disk(summary.folder / coder.name) for coder in summary.coders}
    assert list(theirs) == ["h.0.mlp", "h.1.mlp", "h.2.mlp"]
    x = torch.randn(9, 32)
    for name, ours in FastSae.load_many(summary.folder, local=True).items():
        torch.testing.assert_close(ours(x).sae_out, theirs[name](x).sae_out, atol=1e-5, rtol=1e-5)
