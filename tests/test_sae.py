"""FastSae: what it computes, for any leading shape, and its gradients against float64 autograd."""

import pytest
import torch

from fastsae import FastSae, SaeConfig, TranscoderConfig
from fastsae.errors import CheckpointError, ConfigError


def make(
    cfg: SaeConfig | None = None, d_in: int = 7, dtype=torch.float64, implementation="reference", d_out=None
) -> FastSae:
    torch.manual_seed(0)
    cfg = cfg or SaeConfig(num_latents=30, k=4)
    sae = FastSae(d_in, cfg, dtype=dtype, d_out=d_out, implementation=implementation)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sae


def dense_loss(sae: FastSae, x, y, dead=None, alpha=0.0):
    """The same losses written out densely, straight from the paper."""
    W, b, D, b_dec = sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec
    assert D is not None
    z = torch.relu((x if sae.cfg.transcode else x - b_dec) @ W.T + b)

    def keep_top(scores, k):
        return torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0) * scores

    skip = 0 if sae.W_skip is None else x @ sae.W_skip.T
    out = keep_top(z, sae.cfg.k) @ D + b_dec + skip
    variance = (y - y.mean(0)).pow(2).sum()
    total = (y - out).pow(2).sum() / variance
    if sae.cfg.multi_topk:
        total = total + (y - keep_top(z, 4 * sae.cfg.k) @ D - b_dec - skip).pow(2).sum() / variance / 8
    if dead is not None:
        k_aux = {7: 4, 12: 8, 3: 2}[y.shape[1]]  # powers of two: 3.5, 6 and 1.5 lie between
        masked = torch.where(dead, z, 0.0)
        e_hat = keep_top(masked, min(k_aux, int(dead.sum()))) @ D
        scale = min(int(dead.sum()) / k_aux, 1.0)
        total = total + alpha * scale * (e_hat - (y - out).detach()).pow(2).sum() / variance
    return total


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("cfg", "dead"),
    [
        (SaeConfig(num_latents=30, k=4), 0),
        (SaeConfig(num_latents=30, k=4, multi_topk=True), 0),
        (SaeConfig(num_latents=30, k=4, skip_connection=True), 0),
        (SaeConfig(num_latents=30, k=4), 2),
        (SaeConfig(num_latents=30, k=4), 11),
        (TranscoderConfig(num_latents=30, k=4, skip_connection=True, multi_topk=True), 5),
    ],
)
def test_every_gradient_against_float64_autograd(cfg, dead, implementation):
    sae = make(cfg, implementation=implementation)
    x, y = torch.randn(13, 7, dtype=torch.float64, requires_grad=True), torch.randn(13, 7, dtype=torch.float64)
    y = y if cfg.transcode else x
    mask = torch.zeros(30, dtype=torch.bool)
    mask[torch.randperm(30)[:dead]] = True

    out = sae(x, y, dead_mask=mask if dead else None)
    ours = out.fvu + 0.5 * out.auxk_loss + out.multi_topk_fvu / 8
    wanted = dense_loss(sae, x, y, mask if dead else None, 0.5)
    torch.testing.assert_close(ours, wanted)
    inputs = [x, *sae.parameters()]
    for mine, true in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("d_out", [3, 12])
def test_gradients_of_transcoders_with_two_widths(d_out, implementation):
    cfg = TranscoderConfig(num_latents=30, k=4, skip_connection=True, multi_topk=True)
    sae = make(cfg, implementation=implementation, d_out=d_out)
    x, y = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, d_out, dtype=torch.float64)
    out = sae(x, y)
    assert out.sae_out.shape == y.shape
    wanted = dense_loss(sae, x.flatten(0, 1), y.flatten(0, 1))
    ours = out.fvu + out.multi_topk_fvu / 8
    torch.testing.assert_close(ours, wanted)
    parameters = list(sae.parameters())
    for mine, true in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, true)


def test_two_widths_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="d_out: expected 7, the width that an autoencoder encodes, got 5"):
        FastSae(7, SaeConfig(num_latents=30, k=4), d_out=5)
    sae = make(TranscoderConfig(num_latents=30, k=4), d_out=5, dtype=torch.float32)
    with pytest.raises(ConfigError, match="expected y of width 5 beside x of width 7"):
        sae(torch.randn(3, 7))
    with pytest.raises(ConfigError, match=r"expected as many rows of y as of x, \[3, 7\], got \[2, 5\]"):
        sae(torch.randn(3, 7), torch.randn(2, 5))
    sae.save_to_disk(tmp_path)
    config = tmp_path / "cfg.json"
    config.write_text(config.read_text().replace('"d_out": 5', '"d_out": 6'))
    with pytest.raises(CheckpointError, match=r"expected W_dec \[30, 6\]"):
        FastSae.load_from_disk(tmp_path)


def test_relu_masks_and_zero_activations_do_not_fire():
    sae = make(SaeConfig(num_latents=6, k=4))
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.encoder.bias.copy_(torch.tensor([-1.0, 2.0, -1.0, -1.0, 1.0, -1.0]))
    x = torch.randn(3, 7, dtype=torch.float64)
    out = sae(x)
    assert out.latent_acts.tolist() == [[2.0, 1.0, 0.0, 0.0]] * 3
    assert out.latent_indices.tolist() == [[1, 4, 0, 2]] * 3
    out.fvu.backward()
    bias_grad = sae.encoder.bias.grad
    assert bias_grad is not None
    assert bias_grad[[0, 2, 3, 5]].tolist() == [0.0] * 4
    assert (bias_grad[[1, 4]] != 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4)])
def test_any_leading_shape(shape):
    sae = make()
    x = torch.randn(*shape, 7, dtype=torch.float64)
    acts, indices, pre_acts = sae.encode(x)
    assert pre_acts is None
    assert acts.shape == indices.shape == (*shape, 4)
    flat = sae.encode(x.reshape(-1, 7))
    assert torch.equal(acts.reshape(-1, 4), flat.top_acts)
    torch.testing.assert_close(sae.decode(acts, indices).reshape(-1, 7), sae.decode(flat.top_acts, flat.top_indices))
    if shape:
        out = sae(x)
        assert out.sae_out.shape == x.shape
        torch.testing.assert_close(out.sae_out, sae.decode(acts, indices))


def test_other_widths_are_refused_and_empty_batches_are_fine():
    sae = make()
    for call in (sae, sae.encode):
        with pytest.raises(ConfigError, match=r"expected x of width 7 for this coder, got shape \[14, 8\]"):
            call(torch.randn(14, 8, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"expected as many rows of y as of x, \[2, 7\], got \[3, 7\]"):
        sae(torch.randn(2, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64))
    assert sae.encode(torch.zeros(0, 7, dtype=torch.float64)).top_acts.shape == (0, 4)


def test_what_no_coder_can_take_is_said():
    coder = FastSae(7, SaeConfig(num_latents=16, k=2))
    for call in (coder, coder.encode):
        with pytest.raises(ConfigError, match=r"expected x in a floating-point dtype for this coder, got torch.int64"):
            call(torch.ones(3, 7, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"expected y in a floating-point dtype"):
        coder(torch.ones(3, 7), torch.ones(3, 7, dtype=torch.bool))
    for acts, indices in (
        (torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.ones(2, 4), torch.zeros(4, 2, dtype=torch.int64)),
        (torch.ones(2, 4), torch.zeros(2, 4)),
        (torch.tensor(1.0), torch.tensor(0)),
    ):
        with pytest.raises(ConfigError, match=r"expected top_acts \[..., K\] and as many integers in top_indices, got"):
            coder.decode(acts, indices)
    narrow = coder.decode(torch.ones(2, 4), torch.tensor([[0, 1, 2, 15]] * 2, dtype=torch.int32))
    assert torch.equal(narrow, coder.decode(torch.ones(2, 4), torch.tensor([[0, 1, 2, 15]] * 2)))


def test_pre_acts_on_request():
    sae = make()
    x = torch.randn(5, 7, dtype=torch.float64)
    acts, indices, pre_acts = sae.encode(x, return_pre_acts=True)
    assert pre_acts is not None
    torch.testing.assert_close(pre_acts, torch.relu((x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias))
    assert torch.equal(pre_acts.gather(1, indices), acts)


def test_multi_topk_returns_the_k_reconstruction():
    single, multi = make(SaeConfig(num_latents=30, k=4)), make(SaeConfig(num_latents=30, k=4, multi_topk=True))
    multi.load_state_dict(single.state_dict())
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(multi(x).sae_out, single(x).sae_out)
    wide = make(SaeConfig(num_latents=30, k=16))
    wide.load_state_dict(single.state_dict())
    torch.testing.assert_close(multi(x).multi_topk_fvu, wide(x).fvu)


def test_groupmax_takes_one_latent_of_each_group():
    sae = make(SaeConfig(num_latents=30, k=5, activation="groupmax"))
    x = torch.randn(8, 7, dtype=torch.float64)
    acts, indices, _ = sae.encode(x)
    dense = torch.relu((x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias).view(8, 5, 6)
    torch.testing.assert_close(acts, dense.amax(-1))
    assert (indices // 6).tolist() == [[0, 1, 2, 3, 4]] * 8


def test_total_variance_of_a_whole_batch_makes_chunks_add_up():
    sae = make()
    x = torch.randn(12, 7, dtype=torch.float64)
    variance = (x - x.mean(0)).pow(2).sum()
    parts = sum(sae(part, total_variance=variance).fvu for part in x.chunk(3))
    torch.testing.assert_close(parts, sae(x).fvu)


def test_initialisation():
    torch.manual_seed(0)
    sae = FastSae(16, SaeConfig(expansion_factor=4, k=3))
    assert sae.W_dec is not None
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    cosine = torch.nn.functional.cosine_similarity(sae.W_dec, sae.encoder.weight)
    torch.testing.assert_close(cosine, torch.ones(64))
    assert not sae.encoder.bias.any()
    transcoder = FastSae(16, TranscoderConfig(expansion_factor=4, k=3))
    assert transcoder.W_dec is not None
    assert not transcoder.W_dec.any()


def test_without_decoder():
    sae = FastSae(8, SaeConfig(num_latents=16, k=2), decoder=False)
    assert sae.W_dec is None
    acts, indices, _ = sae.encode(torch.randn(3, 8))
    with pytest.raises(CheckpointError, match="decoder=False"):
        sae.decode(acts, indices)


def test_nan_reaches_the_loss():
    sae = make()
    x = torch.randn(5, 7, dtype=torch.float64)
    x[2, 3] = float("nan")
    assert sae(x, total_variance=torch.tensor(1.0)).fvu.isnan()


def test_compiles_without_graph_breaks():
    sae = make(implementation="cpu", dtype=torch.float32)
    x = torch.randn(9, 7)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    eager, fast = sae(x), compiled(x)
    torch.testing.assert_close(fast.fvu, eager.fvu)
    assert torch.equal(fast.latent_indices, eager.latent_indices)
    wanted = torch.autograd.grad(eager.fvu, list(sae.parameters()))
    got = torch.autograd.grad(fast.fvu, list(sae.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
