"""RowOptimizer as a torch optimizer: states that travel, evaluation weights, the same step inside the backward."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels.rules import Adam

from fastsae import FastSae, SaeConfig, TrainConfig
from fastsae.errors import ConfigError
from fastsae.joint import joint_step
from fastsae.optim import default_lr, make_optimizer, make_schedule
from fastsae.row_optimizer import RowOptimizer

OPTIMIZERS = ["adam", "adam8bit", "signum"]


def make_coder(seed: int = 0) -> FastSae:
    torch.manual_seed(seed)
    return FastSae(20, SaeConfig(num_latents=48, k=4))


def make(name: str, coder: FastSae, low: torch.dtype | None = None) -> RowOptimizer:
    optimizer = make_optimizer(TrainConfig(optimizer=name, lr=0.01), [coder], low)
    assert isinstance(optimizer, RowOptimizer)
    return optimizer


def train(coder: FastSae, optimizer: RowOptimizer, steps: range, *, inside: bool = True) -> None:
    """Steps number ``steps``, each on its own tokens; ``inside``: matrices take theirs in the backward pass."""
    for i in steps:
        y = torch.randn(64, 20, generator=torch.Generator().manual_seed(i))
        variance = (y - y.mean(0)).square().sum()
        cfg = TrainConfig()
        joint_step(coder, y, y, variance, cfg, dead=None, share=1.0, optimizer=optimizer, inside=inside)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def tensors(coder: FastSae) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in coder.state_dict().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inside_the_backward_and_after_it_are_the_same_step(name):
    coders = make_coder(), make_coder()
    for coder, inside in zip(coders, (True, False), strict=True):
        train(coder, make(name, coder), range(3), inside=inside)
    for key, tensor in tensors(coders[0]).items():
        torch.testing.assert_close(tensor, coders[1].state_dict()[key], rtol=1e-5, atol=1e-6)
        assert not tensor.equal(make_coder().state_dict()[key])


@pytest.mark.parametrize("inside", [True, False])
def test_the_narrow_copy_is_what_is_encoded_with(inside):
    coder = make_coder()
    optimizer = make("adam", coder, torch.bfloat16)
    optimizer.low[coder.encoder.weight].zero_()  # nothing is active: nothing is explained
    y = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    variance = y.float().square().sum()
    out = joint_step(coder, y, y, variance, TrainConfig(), dead=None, share=1.0, optimizer=optimizer, inside=inside)
    torch.testing.assert_close(out.fvu, torch.tensor(1.0))


def test_adam_is_torchs_adam_on_the_projected_gradient():
    coder, twin = make_coder(), make_coder()
    train(coder, make("adam", coder), range(3))
    theirs = torch.optim.Adam(twin.parameters(), lr=0.01)
    for i in range(3):
        y = torch.randn(64, 20, generator=torch.Generator().manual_seed(i))
        twin(y).fvu.backward()
        twin.remove_gradient_parallel_to_decoder_directions()
        theirs.step()
        theirs.zero_grad()
        twin.set_decoder_norm_to_unit_norm()
    for key, tensor in twin.state_dict().items():
        torch.testing.assert_close(coder.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_goes_on_bit_by_bit(name):
    whole = make_coder()
    train(whole, make(name, whole), range(6))
    first = make_coder()
    optimizer = make(name, first)
    train(first, optimizer, range(3))
    second = make_coder(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = make(name, second)
    resumed.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert resumed.state[ours][key].dtype == value.dtype  # 8-bit codes stay codes
    train(second, resumed, range(3, 6))
    for key, tensor in whole.state_dict().items():
        assert tensor.equal(second.state_dict()[key]), key


def test_evaluation_weights_are_the_average_with_unit_rows_and_leave_no_trace():
    coder = make_coder()
    optimizer = make("signum", coder)
    train(coder, optimizer, range(4))
    before = tensors(coder)
    z = optimizer.state[coder.encoder.weight]["z"]
    with optimizer.evaluation_weights([coder]):
        assert coder.W_dec is not None
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(48))
        expected = (before["encoder.weight"] - 0.05 * z) / 0.95
        torch.testing.assert_close(coder.encoder.weight.data, expected, rtol=1e-4, atol=1e-5)
    assert all(tensor.equal(before[key]) for key, tensor in tensors(coder).items())
    with make("adam", coder).evaluation_weights([coder]):
        assert all(tensor.equal(before[key]) for key, tensor in tensors(coder).items())


def test_narrow_copies_follow_the_weights():
    coder = make_coder()
    optimizer = make("adam", coder, torch.bfloat16)
    assert set(optimizer.low) == {coder.encoder.weight, coder.W_dec}
    train(coder, optimizer, range(2))
    assert all(low.equal(weight.bfloat16()) for weight, low in optimizer.low.items())
    with torch.no_grad():
        coder.encoder.weight.mul_(2)
    optimizer.refresh_low()
    assert optimizer.low[coder.encoder.weight].equal(coder.encoder.weight.bfloat16())


def test_eight_bit_states_take_a_quarter_of_the_memory():
    coder = FastSae(512, SaeConfig(num_latents=64, k=4))
    sizes = {}
    for name in ("adam", "adam8bit"):
        optimizer = make(name, coder)
        state = optimizer._state(coder.encoder.weight)
        sizes[name] = sum(t.nbytes for key, t in state.items() if key != "step")
    assert sizes["adam"] == 8 * 512 * 64
    assert sizes["adam8bit"] == (2 + 2 * 4 / 256) * 512 * 64


def test_rates_and_schedules():
    coder = make_coder()
    assert default_lr("signum", 2**14) == pytest.approx(5e-3)
    assert isinstance(make("adam", coder).rule, Adam)
    for name, last in (("adam", 0.0), ("signum", 0.01)):
        cfg = TrainConfig(optimizer=name, lr=0.01)
        optimizer = make_optimizer(cfg, [coder])
        schedule = make_schedule(cfg, optimizer, 3)
        for _ in range(3):
            optimizer.step()
            schedule.step()
        assert schedule.get_last_lr() == pytest.approx([last, last])


def test_bitsandbytes_needs_a_gpu_and_says_so():
    pytest.importorskip("bitsandbytes", reason="for Linux")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="expected coders on a GPU for 'bnb_adam8bit'.*use 'adam8bit'"):
        make_optimizer(TrainConfig(optimizer="bnb_adam8bit"), [make_coder()])
