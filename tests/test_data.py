"""From files of every kind to packed tokens."""

import bz2
import gzip
import json
import lzma
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from fastsae import RunConfig, demo
from fastsae.collation import collate
from fastsae.data import load_tokens
from fastsae.errors import ArtifactError, ConfigError
from fastsae.sources import load_data
from fastsae.tokens import tokenize

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


def test_a_folder_of_folders_named_as_files(tmp_path):
    (tmp_path / "part.csv").mkdir()
    write_files(tmp_path / "part.csv", "jsonl")
    assert load_data(str(tmp_path), RunConfig())["text"] == TEXTS


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
        ("corpus.jsonl", "expected a file, a folder or a hub id, got 'corpus.jsonl', which does not exist here"),
        ("org/none", "expected a hub id, a file or a folder, got 'org/none'.*'stdlib' needs none of them"),
    ],
)
def test_missing_datasets(name, message):
    with pytest.raises(ArtifactError, match=message):
        load_data(name, RunConfig())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files(tmp_path, suffix, module, streaming):
    write_files(tmp_path, "jsonl")
    packed = tmp_path / f"a.jsonl{suffix}"
    packed.write_bytes(module.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.jsonl").unlink()
    for name in (packed, tmp_path):
        rows = load_data(str(name), RunConfig(streaming=streaming, max_examples=9))
        assert [row["text"] for row in rows] == TEXTS
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=rf"could not read .*a.jsonl{suffix} as json: .*end-of-stream"):
        load_data(str(packed), RunConfig(streaming=streaming, max_examples=9))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_files_without_a_byte(tmp_path, tokenizer, model_config, suffix, streaming):
    (tmp_path / f"a.{suffix}").touch()
    run = RunConfig(streaming=streaming, max_examples=9)
    with pytest.raises(ArtifactError, match=r"dataset: (could not read|expected at least one row)"):
        load_tokens(str(tmp_path / f"a.{suffix}"), run, tokenizer, model_config)


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
    monkeypatch.setattr("fastsae.sources.load_dataset", lambda name, **options: calls.append((name, options)) or data)
    assert load_data("org/corpus", RunConfig(split="validation", hf_token="hf_x")) is data
    assert calls == [("org/corpus", {"split": "validation", "streaming": False, "token": "hf_x"})]


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


def test_data_args_go_to_load_dataset(tmp_path, monkeypatch):
    calls = []
    data = Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr("fastsae.sources.load_dataset", lambda path, **options: calls.append((path, options)) or data)
    load_data("org/corpus", RunConfig(data_args=("name=wiki-v1", "revision=main", "num_proc=2", "keep=true", "x=a=b")))
    options = {"name": "wiki-v1", "revision": "main", "num_proc": 2, "keep": True, "x": "a=b"}
    assert calls == [("org/corpus", {"split": "train", "streaming": False, "token": None, **options})]
    monkeypatch.undo()
    (tmp_path / "a.csv").write_text("text;id\nhello;1\n")
    rows = load_data(str(tmp_path / "a.csv"), RunConfig(data_args=("sep=;",)))
    assert rows[0] == {"text": "hello", "id": 1}
    with pytest.raises(ArtifactError, match=r"could not read .*a.csv as csv: .*nonsense"):
        load_data(str(tmp_path / "a.csv"), RunConfig(data_args=("nonsense=1",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wiki", "data_args: expected key=value, got 'wiki'"),
        ("=x", "data_args: expected key=value, got '=x'"),
        ("token=hf_x", "data_args: expected no 'token'; use --hf-token"),
        ("streaming=true", "data_args: expected no 'streaming'; use --streaming"),
    ],
)
def test_data_args_that_cannot_be_used(text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(data_args=(text,))


def test_a_memory_map_is_a_dataset_too(tmp_path, model_config):
    import numpy as np

    np.arange(1, 1001, dtype="uint16").tofile(tmp_path / "a.bin")

    def load(**options):
        return load_tokens(str(tmp_path / "a.bin"), RunConfig(ctx_len=10, **options), lambda: None, model_config)

    whole = load()
    rows = [whole[i]["input_ids"].tolist() for i in range(len(whole))]
    assert sorted(rows) == [list(range(i, i + 10)) for i in range(1, 1001, 10)]
    assert rows != sorted(rows)  # shuffled
    assert [load(max_tokens=35)[i]["input_ids"].tolist() for i in range(3)] == rows[:3]
    assert (len(load(max_tokens=35)), len(load(max_examples=7))) == (3, 7)
    assert len(load_tokens(str(tmp_path / "a.bin"), RunConfig(), lambda: None, model_config)) == 1000 // 256
    with pytest.raises(ArtifactError, match=r"expected a .bin file of token ids, got '.*b.bin', which does not exist"):
        load_tokens(str(tmp_path / "b.bin"), RunConfig(), lambda: None, model_config)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [["a", "b"]]}, "expected a list of integers per row in 'input_ids', got"),
        ({"input_ids": [[1.5, 2.5]]}, "expected a list of integers per row in 'input_ids', got float"),
        ({"input_ids": [[]]}, "expected tokens in 'input_ids', got an empty row"),
        ({"input_ids": [[1] * 257]}, "at most 256 tokens for this model, got rows of 257"),
        ({"input_ids": []}, "expected at least one row, got an empty dataset"),
        ({"text": []}, "expected at least one"),
        ({"text": [1, 2]}, "expected text in column 'text', got int"),
        ({"text": [None, ""]}, "expected text in column 'text', got|at least one chunk of 8 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on(tmp_path, tokenizer, model_config, columns, message, streaming):
    Dataset.from_dict(columns).save_to_disk(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_tokens(str(tmp_path), RunConfig(ctx_len=8, streaming=streaming, max_examples=9), tokenizer, model_config)


def test_text_that_is_not_utf_8(tmp_path, tokenizer, model_config):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ArtifactError, match=r"could not read .*a.txt as text: .*utf-8"):
        load_tokens(str(tmp_path / "a.txt"), RunConfig(), tokenizer, model_config)


def test_a_damaged_save_to_disk_folder(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
    (arrow,) = tmp_path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="could not read .* as a save_to_disk folder"):
        load_data(str(tmp_path), RunConfig())


def test_a_folder_of_a_similar_name_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(ArtifactError, match=r"got './corpsu.jsonl', .*; did you mean corpus.jsonl\?"):
        load_data("./corpsu.jsonl", RunConfig())
