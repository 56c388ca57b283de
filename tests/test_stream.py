"""Streams: the same tokens as from a dataset on disk, a shuffle that the seed decides, and exact resumption."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from fastsae import RunConfig, demo
from fastsae.data import load_tokens
from fastsae.errors import ArtifactError, CheckpointError, ConfigError
from fastsae.rows import split_held_out
from fastsae.stream import TokenStream

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def model_config():
    return AutoConfig.from_pretrained(demo.MODEL_DIR)


@pytest.fixture
def load(tmp_path, tokenizer, model_config, monkeypatch):
    for module in ("data", "tokens"):  # several batches of documents, so that resuming crosses their borders
        monkeypatch.setattr(f"fastsae.{module}.DOCUMENTS_PER_BATCH", 16)
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[part::3]]
        (tmp_path / f"train-{part}.jsonl").write_text("".join(lines))

    def load(**options):
        options = {"ctx_len": 8, "streaming": True, "max_examples": 1000, **options}
        return load_tokens(str(tmp_path), RunConfig(**options), tokenizer, model_config)

    return load


def ids(rows):
    return [torch.as_tensor(row["input_ids"]).tolist() for row in rows]


def test_a_stream_gives_what_the_dataset_gives(load):
    stream = load(shuffle_buffer=1)
    assert isinstance(stream, TokenStream)
    whole = load(streaming=False)
    streamed = ids(stream.take(1000))
    assert sorted(streamed) == sorted(ids(whole))
    assert 100 < len(streamed) < 1000


def test_the_seed_decides_the_order(load):
    def rows(**options):
        return ids(load(**options).take(1000))

    plain = rows(shuffle_buffer=1)
    shuffled = rows(shuffle_buffer=32)
    assert rows(shuffle_buffer=32) == shuffled != plain
    assert rows(shuffle_buffer=32, shuffle_seed=1) != shuffled
    assert sorted(shuffled) == sorted(plain)
    assert all(plain.index(row) < i + 32 for i, row in enumerate(shuffled))  # none comes before it is read


def test_limits(load):
    assert len(load(max_examples=5).take(99)) == 5
    stream = load(max_examples=None, max_tokens=8 * 7 + 3)
    assert (len(stream), len(stream.take(99)), len(stream.take(1))) == (7, 7, 0)


def test_a_stream_that_ends_early_says_so(load, caplog):
    stream = load(max_examples=100_000)
    assert len(stream) == 100_000
    count = len(stream.take(100_000))
    assert f"the dataset ended after {count} of 100000 sequences" in caplog.messages[-1]
    assert stream.take(1) == []


def test_a_model_trains_on_a_stream_as_on_the_same_rows(load, tmp_path):
    from models import make_model

    from fastsae import SaeConfig, TrainConfig, Trainer

    files = []
    in_order = load(max_examples=100).take(100)
    for name, rows in (("stream", load(max_examples=100)), ("rows", in_order[5:] + in_order[:5])):  # the held-out last
        cfg = TrainConfig(
            SaeConfig(num_latents=64, k=4), hookpoints=("h.1",), batch_size=8, save_dir=str(tmp_path), run_name=name
        )
        summary = Trainer(cfg, rows, make_model("gpt2")).fit(progress=False)
        assert summary.coders[0].tokens == 95 * 8
        files.append((summary.folder / "h.1/sae.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("buffer", [1, 5, 1000])
@pytest.mark.parametrize("taken", [0, 1, 17, 90])
def test_resuming_gives_the_very_next_row(load, buffer, taken):
    stream = load(shuffle_buffer=buffer)
    stream.take(taken)
    state = stream.state_dict()
    rest = ids(stream.take(1000))
    assert rest
    again = load(shuffle_buffer=buffer)
    again.load_state_dict(state)
    assert ids(again.take(1000)) == rest
    again.load_state_dict(state)  # also a second time, from the end
    assert ids(again.take(1000)) == rest


def test_the_state_is_plain_enough_to_store(load, tmp_path):
    stream = load(shuffle_buffer=5)
    stream.take(17)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    rest = ids(stream.take(1000))
    again = load(shuffle_buffer=5)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert ids(again.take(1000)) == rest


def test_what_is_held_out_is_not_trained_on(load):
    plain = ids(load(max_examples=100).take(100))
    rows, held_out = split_held_out(load(max_examples=100), 3)
    assert (len(rows), len(held_out)) == (97, 3)
    assert ids(held_out.take(9)) == plain[:3]
    rows.take(10)
    state = rows.state_dict()
    assert ids(rows.take(99)) == plain[13:]
    again, _ = split_held_out(load(max_examples=100), 3)
    again.load_state_dict(state)
    assert ids(again.take(99)) == plain[13:]


def test_the_state_of_another_stream_is_refused(load):
    state = load().state_dict()
    with pytest.raises(CheckpointError, match="with shuffle_seed = 42, got 1"):
        load(shuffle_seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="with rows = 1000, got 10"):
        load(max_examples=10).load_state_dict(state)


def test_tokens_that_are_there_already(tmp_path, model_config):
    data = Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(9)], "text": ["x"] * 9})
    data.save_to_disk(tmp_path)
    run = RunConfig(streaming=True, max_tokens=10, shuffle_buffer=1)
    stream = load_tokens(str(tmp_path), run, lambda: pytest.fail("needs no tokenizer"), model_config)
    rows = stream.take(99)
    assert ids(rows) == [[i, i + 1] for i in range(5)]
    assert set(rows[0]) == {"input_ids"}


def test_a_stream_needs_a_limit():
    with pytest.raises(ConfigError, match="expected --max-tokens or --max-examples with it, got neither"):
        RunConfig(streaming=True)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "at least one chunk of 8 tokens, got fewer"),
        (b"caf\xe9 au lait", {}, "could not read on: .*utf-8.*must be UTF-8"),
        (b"short", {"ctx_len": 64}, "at least one chunk of 64 tokens"),
        (b"text", {"text_column": "prose"}, "expected a text column 'prose'.*got columns text"),
    ],
)
def test_text_that_cannot_be_streamed(tmp_path, tokenizer, model_config, content, options, message):
    (tmp_path / "a.txt").write_bytes(content)
    run = RunConfig(**{"ctx_len": 8, "streaming": True, "max_examples": 9, **options})
    with pytest.raises(ArtifactError, match=message):
        load_tokens(str(tmp_path / "a.txt"), run, tokenizer, model_config)
