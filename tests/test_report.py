"""The report: what it says of latents against direct computation, and that one file is all it needs."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from models import make_model, token_rows
from test_cli import one_line, run
from test_eval import make_coder

from fastsae import demo
from fastsae.report.codes import Codes, collect_codes
from fastsae.report.curves import density_chart, read_metrics, training_charts
from fastsae.report.latents import choose_latents, describe_latents, strongest_contexts
from fastsae.report.lens import logit_lens


def test_codes_are_what_the_coder_says():
    model, rows, coder = make_model("gpt2"), token_rows(5, 8), make_coder(32)
    ids, codes = collect_codes({"h.1": coder}, model, rows, batch_size=2, exclude_tokens=(7,), progress=False)
    assert torch.equal(ids, rows["input_ids"][:])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
        acts, indices, _ = coder.encode(hidden)
    dense = torch.zeros(40, 40).scatter(1, indices, acts)  # [tokens, L]
    dense[ids.flatten() == 7] = 0
    for latent in range(40):
        strengths, positions = codes["h.1"].of(latent)
        assert positions.tolist() == torch.nonzero(dense[:, latent])[:, 0].tolist()
        torch.testing.assert_close(strengths, dense[positions, latent], rtol=1e-4, atol=1e-5)
    assert codes["h.1"].counts.sum() == (dense > 0).sum()


def test_strongest_contexts():
    ids = torch.arange(200).view(4, 50)
    acts = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    positions = torch.tensor([3, 49, 60, 61, 180])
    first, second = strongest_contexts(acts, positions, ids, 2)
    assert (first["sequence"], first["tokens"], first["peak"]) == (0, list(range(29, 50)), 20)
    assert first["acts"] == [0] * 20 + [5.0]  # the one at token 3 is out of sight
    assert (second["sequence"], second["peak"]) == (1, 11)
    assert second["acts"][10:12] == [2.0, 4.0]  # both firings of that sequence in one context
    assert [c["sequence"] for c in strongest_contexts(acts, positions, ids, 9)] == [0, 1, 3]


def test_chosen_latents_span_the_densities():
    counts = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64])
    codes = Codes(torch.ones(127), torch.arange(127), torch.cat([torch.zeros(1), counts.cumsum(0)]).long())
    assert torch.equal(codes.counts, counts)
    assert choose_latents(codes, 3) == [2, 4, 7]  # neither dead nor met once
    assert choose_latents(codes, 100) == [2, 3, 4, 5, 6, 7]
    assert choose_latents(codes, 0, wanted=(0, 5, 99)) == [0, 5]


def test_the_logit_lens_and_neighbours():
    model, coder = make_model("gpt2"), make_coder(32)
    with torch.no_grad():
        coder.W_dec[3] = 2 * coder.W_dec[17]
    (seen,) = logit_lens(model, coder.W_dec[5:6], count=3)
    head = model.lm_head.weight.double()
    logits = (head - head.mean(0)) @ coder.W_dec[5].double()
    assert [i for i, _ in seen.up] == logits.topk(3).indices.tolist()
    assert [i for i, _ in seen.down] == logits.topk(3, largest=False).indices.tolist()
    assert seen.up[0][1] == pytest.approx(logits.max().item(), rel=1e-4)
    assert logit_lens(model, torch.zeros(1, 128)) is None  # not the residual stream's width
    assert logit_lens(make_model("bert"), torch.zeros(1, 32)) is None  # no head
    ids, codes = collect_codes({"h.1": coder}, model, token_rows(3, 8), batch_size=2, progress=False)
    (record,) = describe_latents(coder, codes["h.1"], [3], ids, model, 2)
    assert record["near"][0] == (17, 1.0)
    assert record["density"] == len(codes["h.1"].of(3)[0]) / 24
    assert sum(record["histogram"]) == len(codes["h.1"].of(3)[0])


def test_charts_are_well_formed_and_follow_the_page(tmp_path):
    line = {"step": 1, "tokens": 100, "fvu": 0.5, "lr": 0.1, "fvu/a": 0.9, "fvu/b": 0.1, "auxk/a": 0.4, "auxk/b": 0.2}
    lines = [line, {**line, "step": 2, "tokens": 200}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tok')
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records == lines  # the line that was cut short is left out
    charts = training_charts(records, ["a", "b"], auxk_alpha=0.5)
    assert [chart.title for chart in charts] == ["Loss", "FVU of each batch", "AuxK loss", "Learning rate"]
    from fastsae.report.curves import _loss

    assert _loss(records[0], ["a", "b"], 0.5) == pytest.approx((0.9 + 0.1 + 0.5 * 0.6) / 2)
    for svg in [chart.svg for chart in charts] + [density_chart([-2, -1, 0], [3, 4], 5)]:
        root = ET.fromstring(svg)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "currentColor" in svg
        assert "#010203" not in svg
    assert training_charts([], ["a"]) == []


def test_one_file_with_everything_in_it(report):
    _, html, data = report
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)  # nothing is fetched
    assert set(re.findall(r"https?://[\w./-]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert list(data["coders"]) == ["h.1", "h.2.mlp.act"]
    for records in data["coders"].values():
        assert 3 in [record["latent"] for record in records]
        assert 10 <= len(records) <= 11
    assert data["coders"]["h.1"][0]["up"] is not None
    assert data["coders"]["h.2.mlp.act"][0]["up"] is None  # not in the residual stream
    record = max(data["coders"]["h.1"], key=lambda record: record["largest"])
    best = record["contexts"][0]
    assert best["acts"][best["peak"]] == record["largest"] == max(best["acts"])
    assert all(str(i) in data["words"] for i in best["tokens"])
    for word in ("Loss", "Dead latents", "Densities", "fastsae eval"):
        assert word in html
    assert "recovered" not in html


def test_numbers_of_a_later_evaluation_are_shown(report, capsys):
    folder, _, _ = report
    assert run(capsys, "eval", str(folder), "--device", "cpu")[0] == 0
    code, out, _ = run(capsys, "report", str(folder), "--per-coder", "2", "--output", str(folder / "two.html"))
    assert code == 0
    assert f"report: {folder / 'two.html'}" in out
    html = (folder / "two.html").read_text()
    loss = json.loads((folder / "eval.json").read_text())["coders"][0]["cross_entropy"]
    assert f"<td>{loss['recovered']['value']:.3f}" in html
    assert "CE added" in html


def test_markup_in_names_and_tokens_is_text(tmp_path):
    from fastsae.report.page import render_page

    row = {"latent": 1, "contexts": [{"tokens": [7], "acts": [1], "peak": 0, "sequence": 0}], "up": None, "down": None}
    html = render_page(
        title="<b>run", facts={"data": "<i>x"}, coders=[], charts=[], densities=[], latents={"h": [row]},
        words=lambda ids: ["</script><script>alert(1)"] * len(ids),
    )  # fmt: skip
    assert "<b>" not in html
    assert "<i>x" not in html
    assert "</script><script>alert" not in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "error: run: expected the folder of a run, got './nowhere'"),
        (["RUN", "--hookpoints", "h.9"], "error: expected coders matching 'h.9'"),
        (["RUN", "--contexts", "0"], "error: contexts: expected at least 1, got 0"),
    ],
)
def test_mistakes(report, capsys, arguments, message):
    code, _, err = run(capsys, "report", *(str(report[0]) if a == "RUN" else a for a in arguments))
    assert code == 2
    assert message in one_line(err)


def test_the_demo_is_named_in_the_page(report):
    assert f"<dd>{demo.NAME}</dd>" in report[1]
