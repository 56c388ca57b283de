"""From files of every kind to packed tokens."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from fastsae import RunConfig, demo
from fastsae.data import collate, load_data, load_tokens, tokenize
from fastsae.errors import ArtifactError

TEXTS = ["def f(x):\n    return x\n", "", "import os\n", "class A:\n    pass\n" * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def model_config():
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(demo.MODEL_DIR)


def write_files(folder, kind):
    data = Dataset.from_dict({"text": TEXTS})
    if kind == "save_to_disk":
        data.save_to_disk(folder)
    elif kind == "dataset_dict":
        DatasetDict(train=data, test=data.select([0])).save_to_disk(folder)
    elif kind == "parquet":
        data.to_parquet(folder / "a.parquet")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif kind == "csv":
        data.to_csv(folder / "a.csv")
    else:
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)


@pytest.mark.parametrize("kind", ["save_to_disk", "dataset_dict", "parquet", "jsonl", "csv", "txt"])
def test_every_kind_of_folder(tmp_path, kind):
    write_files(tmp_path, kind)
    rows = [row["text"] or "" for row in load_data(str(tmp_path), RunConfig())]
    assert [text for text in rows if text] == [text for text in TEXTS if text]


def test_a_single_file_and_another_split(tmp_path):
    write_files(tmp_path, "jsonl")
    assert load_data(str(tmp_path / "a.jsonl"), RunConfig())["text"][2] == TEXTS[2]
    write_files(both := tmp_path / "both", "dataset_dict")
    assert len(load_data(str(both), RunConfig(split="test"))) == 1
    with pytest.raises(ArtifactError, match="has the splits train, test, not 'dev'; choose with --split"):
        load_data(str(both), RunConfig(split="dev"))


def test_packing_keeps_every_token_in_order_with_eos_between_documents(tokenizer):
    eos = tokenizer.eos_token_id
    stream = []
    for text in TEXTS:
        if text:
            stream += [eos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    packed = tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer, ctx_len=8)
    rows = packed["input_ids"]
    assert list(chain.from_iterable(rows)) == stream[: len(stream) // 8 * 8]
    assert all(len(row) == 8 for row in rows)


def test_a_small_last_map_batch_is_no_error(tokenizer):
    data = Dataset.from_dict({"text": ["a b c d e f g h i j"] * 2048 + ["x"]})
    assert len(tokenize(data, tokenizer, ctx_len=64)) > 0


def test_several_processes_give_the_same_tokens(tokenizer):
    data = Dataset.from_dict({"text": TEXTS * 300})
    one, two = (tokenize(data, tokenizer, ctx_len=16, num_proc=n) for n in (1, 2))
    assert abs(len(one) - len(two)) <= 1  # each process drops its own unfinished chunk
    assert one["input_ids"][:50] == two["input_ids"][:50]


def test_too_little_text(tokenizer):
    with pytest.raises(ArtifactError, match="at least one chunk of 64 tokens.*lower --ctx-len"):
        tokenize(Dataset.from_dict({"text": ["x"]}), tokenizer, ctx_len=64)


def test_columns_are_named_when_text_is_missing(tokenizer):
    with pytest.raises(ArtifactError, match="'text'.*got columns prose, id; choose one with --text-column"):
        tokenize(Dataset.from_dict({"prose": ["x"], "id": [1]}), tokenizer, ctx_len=4)


def test_load_tokens_shuffles_and_limits(tmp_path, tokenizer, model_config):
    write_files(tmp_path, "parquet")

    def rows(**options):
        data = load_tokens(str(tmp_path), RunConfig(ctx_len=4, **options), tokenizer, model_config)
        return [row["input_ids"].tolist() for row in data]

    whole = rows()
    assert rows() == whole
    assert rows(shuffle_seed=1) != whole
    assert sorted(rows(shuffle_seed=1)) == sorted(whole)
    assert rows(max_examples=3) == whole[:3]
    assert rows(max_tokens=11) == whole[:2]


def test_tokens_that_are_there_already_need_no_tokenizer(tmp_path, model_config):
    Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "text": ["x"] * 4}).save_to_disk(tmp_path)

    def no_tokenizer():
        raise AssertionError("not needed")

    data = load_tokens(str(tmp_path), RunConfig(), no_tokenizer, model_config)
    assert data.column_names == ["input_ids"]
    assert torch.equal(data[0]["input_ids"], torch.tensor([1, 2, 3]))


def test_context_is_lowered_to_the_models_out_loud(tmp_path, tokenizer, model_config, caplog):
    (tmp_path / "a.txt").write_text("x = 1\n" * 2000)
    with caplog.at_level("INFO", logger="fastsae"):
        data = load_tokens(str(tmp_path), RunConfig(ctx_len=4096), lambda: tokenizer, model_config)
    assert len(data[0]["input_ids"]) == 256
    assert "ctx_len: 4096 lowered to 256, the most this model can take" in caplog.messages


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing-here", "expected a file, a folder or a hub id, got './nothing-here'"),
        ("org/none", "expected a hub id, a file or a folder, got 'org/none'.*'stdlib' needs none of them"),
    ],
)
def test_missing_datasets(name, message):
    with pytest.raises(ArtifactError, match=message):
        load_data(name, RunConfig())


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(ArtifactError, match="found none"):
        load_data(str(tmp_path), RunConfig())
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ArtifactError, match="found json, text"):
        load_data(str(tmp_path), RunConfig())
    (broken := tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ArtifactError, match=r"could not read .*broken.parquet as parquet"):
        load_data(str(broken), RunConfig())
    (other := tmp_path / "a.pickle").write_bytes(b"")
    with pytest.raises(ArtifactError, match="expected one of .parquet.*got a.pickle"):
        load_data(str(other), RunConfig())


def test_the_standard_library_is_a_dataset():
    data = load_data("stdlib", RunConfig())
    texts = set(data["text"])
    assert len(data) > 300
    assert Path(json.__file__).read_text(encoding="utf-8") in texts


def test_collate():
    rows = [
        {"input_ids": torch.tensor([1, 2]), "attention_mask": [1, 0]},
        {"input_ids": [3, 4], "attention_mask": [1, 1]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ArtifactError, match="of one length, got lengths from 2 to 3"):
        collate([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])


def test_hub_datasets_go_through_load_dataset_with_split_and_token(monkeypatch):
    calls = []
    data = Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr("fastsae.data.load_dataset", lambda name, **options: calls.append((name, options)) or data)
    assert load_data("org/corpus", RunConfig(split="validation", hf_token="hf_x")) is data
    assert calls == [("org/corpus", {"split": "validation", "token": "hf_x"})]


def test_splits_of_a_folder_are_kept_apart(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict({"text": [split]}).to_parquet(tmp_path / f"data/{split}-0.parquet")
    for split in ("train", "test"):
        assert load_data(str(tmp_path), RunConfig(split=split))["text"][:] == [split]
    with pytest.raises(ArtifactError, match="nope"):
        load_data(str(tmp_path), RunConfig(split="nope"))
    with pytest.raises(ArtifactError, match="has the split train only, not 'test'"):
        load_data(str(tmp_path / "data/train-0.parquet"), RunConfig(split="test"))
    with pytest.raises(ArtifactError, match="expected text in column 'id', got int64"):
        tokenize(Dataset.from_dict({"id": [1]}), tokenizer, ctx_len=4, text_column="id")
