"""The shuffle buffer of tokens: nothing twice, nothing lost, pairs together, well mixed, resumable."""

import pytest
import torch

from fastsae.errors import CheckpointError
from fastsae.token_shuffle import TokenShuffle


def batches(sizes):
    start = 0
    for size in sizes:
        ids = torch.arange(start, start + size)
        yield torch.stack([ids, ids * 2], 1).float()
        start += size


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
@pytest.mark.parametrize("sizes", [[10] * 20, [1, 7, 123, 2, 0, 50], [64] * 3])
def test_every_token_comes_out_once_or_is_held(capacity, sizes):
    buffer, out = TokenShuffle(capacity), []
    for x in batches(sizes):
        full = len(buffer) == capacity
        x_out, y_out = buffer.exchange(x, x + 0.5)
        assert torch.equal(x_out + 0.5, y_out)  # pairs stay together
        assert len(x_out) == len(x) if full else len(x_out) >= len(x) / 2
        out += x_out[:, 0].tolist()
    held = buffer.state_dict()["held"]
    assert len(buffer) <= capacity
    assert sorted(out + (held[0][:, 0].tolist() if held else [])) == list(range(sum(sizes)))


def test_a_full_buffer_gives_tokens_of_many_batches():
    buffer = TokenShuffle(400, seed=1)
    outs = [buffer.exchange(x)[0][:, 0] // 20 for x in batches([20] * 100)]
    assert len(buffer) == 400
    assert len(outs[-1].unique()) >= 10  # of 100 batches, in 20 tokens


def test_the_seed_decides():
    def run(seed):
        buffer = TokenShuffle(30, seed)
        return torch.cat([buffer.exchange(x)[0] for x in batches([10] * 12)])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_restored_buffer_goes_on_alike(stop):
    data = list(batches([10] * 12))
    buffer, again = TokenShuffle(30, seed=3), TokenShuffle(30, seed=9)
    for x in data[:stop]:
        buffer.exchange(x)
    again.load_state_dict(buffer.state_dict())
    for x in data[stop:]:
        assert torch.equal(buffer.exchange(x)[0], again.exchange(x)[0])


def test_a_state_that_is_too_large():
    buffer = TokenShuffle(30)
    for x in batches([20] * 5):
        buffer.exchange(x)
    with pytest.raises(CheckpointError, match="at most 10 tokens in the shuffle buffer, got 30"):
        TokenShuffle(10).load_state_dict(buffer.state_dict())
