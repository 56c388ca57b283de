"""``fastsae convert`` and ``fastsae info``, as commands."""

import pytest
from coders import make_coder
from test_cli import one_line, run

from fastsae.compat import convert


@pytest.fixture
def folder(tmp_path):
    coders = {
        f"h.{i}.mlp": make_coder(hookpoint=f"h.{i}.mlp", notes={"version": "0.1", "tokens": 5000}) for i in range(2)
    }
    convert.save(coders, tmp_path / "run", "sparsify")
    return tmp_path / "run"


def test_convert_and_info(capsys, folder, tmp_path):
    code, out, err = run(capsys, "convert", str(folder), str(tmp_path / "out"), "--to", "saelens")
    assert (code, err) == (0, "")
    assert out == f"2 coders written to {tmp_path / 'out'} as saelens\n"
    code, out, _ = run(capsys, "info", str(tmp_path / "out"))
    assert code == 0
    head, *rows = out.splitlines()  # a narrow terminal folds the last column
    assert head.split() == ["coder", "format", "kind", "width", "latents", "dtype", "hookpoint", "model", "from"]
    words = " ".join(" ".join(rows).split())
    for name in ("h.0.mlp", "h.1.mlp"):
        assert f"{name} saelens topk k=4 16 48 float32 {name} gpt2 fastsae" in words
    _, out, _ = run(capsys, "info", str(folder))
    assert all(word in out for word in ("fastsae", "0.1,", "5,000", "tokens"))


def test_what_would_be_lost_is_one_line_and_exit_code_2(capsys, folder, tmp_path):
    target = str(tmp_path / "out")
    code, out, err = run(capsys, "convert", str(folder), target, "--to", "openai")
    assert (code, out) == (2, "")
    assert one_line(err).startswith("error: openai cannot hold this without loss: h.0.mlp: OpenAI's TopK normalises")
    assert "Traceback" not in err
    code, out, _ = run(capsys, "convert", str(folder), target, "--to", "openai", "--hookpoint", "h.1.mlp", "--force")
    assert code == 0
    assert out.startswith("lost: h.1.mlp: OpenAI's TopK normalises its input")
    assert out.endswith("1 coder written to " + target + " as openai\n")


def test_users_mistakes(capsys, folder, tmp_path):
    for arguments, message in [
        (["convert", str(folder), str(folder), "--to", "saelens"], "expected a new or empty folder"),
        (["convert", str(folder), str(tmp_path / "out"), "--to", "onnx"], "expected a format among sparsify, saelens"),
        (["convert", str(tmp_path / "none"), str(tmp_path / "out"), "--to", "saelens"], "no such path"),
        (["info", str(tmp_path / "none")], "no such path"),
    ]:
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert message in one_line(err)
