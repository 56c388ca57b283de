"""Tokens that have names."""

import pytest
from transformers import AutoTokenizer

from fastsae import demo
from fastsae.errors import ConfigError
from fastsae.tokens import named_token_ids, split_token_names


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


def test_ids_and_names_are_told_apart():
    assert split_token_names(["bos", "5,eos", "7"]) == ((5, 7), ("bos", "eos"))
    with pytest.raises(ConfigError, match="expected a token id or one of bos, eos, pad,.* got 'boss'"):
        split_token_names(["boss"])
    with pytest.raises(ConfigError, match="got '-1'"):
        split_token_names(["-1"])


def test_names_become_the_tokenizers_ids(tokenizer):
    eos = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "mask_token": "<|mask|>"})
    pad, mask = tokenizer.convert_tokens_to_ids(["<|pad|>", "<|mask|>"])
    assert len({eos, pad, mask}) == 3
    assert named_token_ids(["pad", "eos"], tokenizer) == tuple(sorted([pad, eos]))
    assert set(named_token_ids(["special"], tokenizer)) == set(tokenizer.all_special_ids) >= {eos, pad, mask}
    assert named_token_ids([], tokenizer) == ()


def test_a_token_that_the_tokenizer_lacks(tokenizer):
    with pytest.raises(ConfigError, match="with the token 'cls', got one that has .*eos.*; leave cls out"):
        named_token_ids(["cls"], tokenizer)
