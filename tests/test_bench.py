"""``fastsae bench``: costs by hand, a truth that notices, a record that adds up, and no speed on a red gate."""

import io
import json
from statistics import median

import pytest
import torch
from fastsae_kernels import cpu
from rich.console import Console

from fastsae import cli
from fastsae.bench import run, timing
from fastsae.bench.cases import chosen_encoder, contestants
from fastsae.bench.problem import Problem, make_problem
from fastsae.bench.record import Row, row_record
from fastsae.bench.report import shape_table
from fastsae.bench.shapes import OPS, SHAPES, Cost, Shape, parse_shapes
from fastsae.bench.timing import Effort, Peaks, percentile, time_rounds
from fastsae.bench.truth import Verdict, judge, limits, row_error, tolerance
from fastsae.errors import ConfigError

SMALL = Shape("small", 33, 17, 96, 5)


@pytest.fixture
def bench(capsys, monkeypatch):
    """(exit code, stdout, stderr) of ``fastsae bench`` on a tiny shape, three rounds each."""
    monkeypatch.setenv("COLUMNS", "80")
    for module in (run, timing):
        monkeypatch.setattr(module, "QUICK", Effort(0.0, 3, 3))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", "--quick", "--device", "cpu", "--shapes", "33,17,96,5", *arguments])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(SMALL, torch.float32, torch.device("cpu"))


# ---- costs -------------------------------------------------------------------------------------------


def test_costs_by_hand():
    shape = Shape("hand", N=6, D=5, L=20, k=3)  # N·k = 18 slots reach 18 of the 20 rows
    assert {name: op.cost(shape, 4) for name, op in OPS.items()} == {
        "encode": Cost(2 * 6 * 5 * 20, 4 * (30 + 100 + 20) + 18 * 12),
        "topk": Cost(0, 4 * 120 + 18 * 8),
        "decode": Cost(2 * 18 * 5, 18 * 12 + 4 * (90 + 30)),
        "decode bwd": Cost(4 * 18 * 5, 18 * 12 + 4 * (90 + 30) + 18 * 4 + 4 * 100),
        "encode bwd": Cost(2 * 18 * 5 + 18, 18 * 12 + 4 * (30 + 100 + 20)),
        "fwd+bwd": Cost(1200 + 180 + 360 + 198, 816 + 696 + 1168 + 816),
    }
    assert OPS["encode"].cost(shape, 2) == Cost(1200, 516)
    assert Cost(1200, 816).bound_ms(peak_flops=600, bandwidth=816) == 3000


def test_shapes_are_the_targets():
    assert SHAPES["S1"][1:] == (8192, 768, 24576, 32)
    assert SHAPES["S2"][1:] == (8192, 4096, 131072, 64)
    assert SHAPES["S3"][1:] == (16384, 2048, 65536, 64)
    assert parse_shapes("S1, C1 ;8,4,32,2;") == [SHAPES["S1"], SHAPES["C1"], Shape("8x4x32x2", 8, 4, 32, 2)]


@pytest.mark.parametrize("text", ["S9", "1,2,3", "8,4,32,33", "8,0,32,2", "-8,4,32,2", ";", "8,4,32,k"])
def test_bad_shapes(text):
    with pytest.raises(ConfigError, match="shapes: expected .*, got"):
        parse_shapes(text)


# ---- the truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_every_contestant_agrees(op, dtype):
    p = make_problem(SMALL, dtype, torch.device("cpu"))
    with torch.no_grad():
        calls = contestants(op, p, ["cpu", "reference", "torch"])
        by_torch = judge(op, p, calls["torch"]()())
        for name, prepare in calls.items():
            verdict = judge(op, p, prepare()(), None if name == "torch" else by_torch)
            assert verdict.difference is None, name
            assert max(verdict.errors.values()) < (2e-6 if dtype == torch.float32 else 1e-2), name
            if dtype == torch.float32 and verdict.exact_sets is not None:
                assert verdict.exact_sets == 1.0, name


@pytest.mark.parametrize("op", OPS)
def test_triton_contestants_agree(op, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter's bfloat16 is not to be trusted
    p = make_problem(Shape("small", 5, 17, 140, 3), dtype, torch.device(device))
    with torch.no_grad():
        calls = contestants(op, p, ["triton"])
        assert list(calls) == (["triton fused", "triton chunked"] if op == "encode" else ["triton"])
        assert op != "encode" or chosen_encoder(p) in calls
        by_torch = judge(op, p, contestants(op, p, ["torch"])["torch"]()())
        for name, prepare in calls.items():
            assert judge(op, p, prepare()(), by_torch).difference is None, name


def test_the_limit_is_torchs_error_and_a_floor(problem):
    """N, D, L, k = 33, 17, 96, 5."""
    rounding = {"regret": 0.0, "top_acts": 1e-6, "out": 0.0, "dW_dec": 0.0, "db_dec": 0.0}
    assert set(limits(problem, rounding, None).values()) == {tolerance(torch.float32)} == {3e-5}
    by_torch = Verdict({"regret": 2e-6, "top_acts": 0.0, "out": 1.0, "dW_dec": 0.0, "db_dec": 0.0}, None)
    assert limits(problem, rounding, by_torch) == {
        "regret": pytest.approx(2e-6 * (1 + 17**-0.5) + 2**-21 * 17**0.5),
        "top_acts": pytest.approx(1e-6 * (1 + 17**-0.5) + 2**-21 * 17**0.5),  # its rounding
        "out": 3e-5,  # torch's own mistakes excuse nothing
        "dW_dec": pytest.approx(2**-21 * 50**0.5),
        "db_dec": pytest.approx(2**-21 * 146**0.5),
    }


def test_sixteen_bits_excuse_no_more_than_torch_needs():
    """Four roundings of bfloat16 are 3e-2; a result 1e-2 off is red all the same, because torch is nearer."""
    p = make_problem(SMALL, torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        calls = contestants("encode", p, ["cpu", "torch"])
        (acts, indices), by_torch = calls["cpu"]()(), judge("encode", p, calls["torch"]()())
    assert by_torch.difference is None
    assert 1e-3 < by_torch.errors["top_acts"] < 5e-3
    assert by_torch.exact_sets is not None
    verdict = judge("encode", p, (acts, indices), by_torch)
    assert (verdict.difference, verdict.exact_sets) == (None, 1.0)
    assert verdict.exact_sets >= by_torch.exact_sets
    off = acts * 1.01
    assert judge("encode", p, (off, indices)).difference is None  # by the tolerance alone
    assert "top_acts 1.0e-02, expected at most" in str(judge("encode", p, (off, indices), by_torch).difference)
    swapped = indices.clone()
    swapped[:, -1] = (~(indices[:, :, None] == torch.arange(SMALL.L)).any(1)).int().argmax(1)  # unused, at random
    assert "regret" in str(judge("encode", p, (acts, swapped), by_torch).difference)


def test_two_roundings_where_two_parts_are_added():
    """b_dec's gradient has two parts, which autograd rounds and adds: the truth is rounded likewise."""
    p = make_problem(SMALL, torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        verdict = judge("fwd+bwd", p, contestants("fwd+bwd", p, ["cpu"])["cpu"]()(), Verdict(
            dict.fromkeys(["regret", "top_acts", "out", "dW_enc", "db_enc", "dW_dec", "db_dec"], 0.0), None
        ))  # fmt: skip
    assert verdict.limits is not None
    assert verdict.difference is None, (
        "no better than torch needed: only the truth's rounding and the floor are allowed"
    )
    assert verdict.limits["top_acts"] < 3e-6  # float32: no rounding to bfloat16 is excused
    assert 1e-3 < verdict.limits["db_dec"] < 4e-3


def test_the_truth_notices(problem):
    values, indices = problem.best
    acts, other = values.float(), (indices.max() + 1) % SMALL.L
    assert judge("encode", problem, (acts, indices)).errors == {"regret": 0.0, "top_acts": pytest.approx(0, abs=1e-7)}
    assert "top_acts" in str(judge("encode", problem, (acts * 1.001, indices)).difference)
    assert "regret" in str(judge("encode", problem, (acts, torch.where(indices == indices[0, 0], other, indices))))
    repeated = torch.cat([indices[:, :1], indices[:, :-1]], dim=1)
    assert "expected 5 different ones in [0, 96)" in str(judge("encode", problem, (acts, repeated)).difference)
    assert "expected 5 different" in str(judge("topk", problem, (indices + SMALL.L,)).difference)

    (out,) = contestants("decode", problem, ["torch"])["torch"]()()
    assert judge("decode", problem, (out,)).difference is None
    out[7, 3] = float("nan")
    assert "out nan" in str(judge("decode", problem, (out,)).difference)


def test_row_error_is_relative_to_the_row_or_the_median_one():
    want = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0], [0.3, 0.4]], dtype=torch.float64)  # norms 5 0 50 0.5
    for row, error in enumerate((1 / 5, 1 / 5, 1 / 50, 1 / 5)):
        got = want.clone()
        got[row, 1] += 1
        assert row_error(got, want) == pytest.approx(error)
    assert row_error(want[:2], want) == float("inf")
    assert row_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0], dtype=torch.float64)) == 0.5  # one row


# ---- clocks ------------------------------------------------------------------------------------------


def test_rounds_interleave_and_keep_to_their_number():
    seen = []

    class Fake:
        def ms(self, call):
            call()
            return 100.0

        def peak_mib(self, call):
            return None

    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = time_rounds(Fake(), calls, Effort(seconds=1.2, least=2, most=9))
    assert times == {name: [100.0] * 4 for name in "abc"}  # 300 ms a round
    assert "".join(seen[6:]) == "abcbcacababc"
    assert percentile([1.0, 2.0, 3.0], 10) == pytest.approx(1.2)
    assert percentile([7.0], 90) == 7.0


def test_cpu_clock_sees_memory_and_time():
    clock = timing.CpuClock()
    mib = clock.peak_mib(lambda: torch.ones(16 * 2**20))
    assert mib is None or 60 < mib < 90
    assert clock.ms(lambda: torch.ones(16 * 2**20)) > 0.5


# ---- the command -------------------------------------------------------------------------------------


def test_record_adds_up(bench, tmp_path):
    code, out, _ = bench("--implementation", "cpu", "--json", str(tmp_path / "bench.json"))
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (code, record["failed"]) == (0, False)
    assert record["settings"]["implementations"] == ["cpu", "torch"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]["type"] == "cpu"
    peaks = record["peaks"]
    assert peaks["gemm_flops"] == 2 * peaks["gemm_size"] ** 3 / (1e-3 * min(peaks["gemm_ms"]))
    assert peaks["copy_bytes"] == 2 * peaks["copy_size"] / (1e-3 * min(peaks["copy_ms"]))
    assert [(c["op"], c["implementation"]) for c in record["cases"]] == [
        (op, i) for op in OPS for i in ("cpu", "torch")
    ]
    for case, base in zip(record["cases"], [c for c in record["cases"][1::2] for _ in range(2)], strict=True):
        cost = OPS[case["op"]].cost(Shape("33x17x96x5", 33, 17, 96, 5), 4)
        assert (case["flops"], case["bytes"]) == cost
        assert case["agrees"]
        assert len(case["times_ms"]) == 3
        assert case["ms"] == median(case["times_ms"])
        assert case["p10_ms"] <= case["ms"] <= case["p90_ms"]
        assert case["tflops"] == pytest.approx(cost.flops / (case["ms"] * 1e-3) / 1e12)
        assert case["gb_s"] == pytest.approx(cost.bytes / (case["ms"] * 1e-3) / 1e9)
        bound = 1e3 * (cost.flops / peaks["gemm_flops"] + cost.bytes / peaks["copy_bytes"])
        assert case["ratio_to_bound"] == pytest.approx(case["ms"] / bound)
        assert case["ratio_to_torch"] == pytest.approx(base["ms"] / case["ms"])
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "tokens with the exact float64 set: cpu 100.0 %, torch 100.0 %" in out


def test_no_speed_on_a_red_gate(bench, monkeypatch):
    right = cpu.decode
    monkeypatch.setattr(cpu, "decode", lambda *tensors: right(*tensors) * 1.01)
    code, out, err = bench("--json", "-")
    record = json.loads(out)  # stdout is the record alone; the table goes to stderr
    assert (code, record["failed"]) == (1, True)
    for case in record["cases"]:
        red = case["op"] in ("decode", "fwd+bwd")
        assert (case["ms"] is None) == (case["ratio_to_torch"] is None) == (case["times_ms"] == []) == red
        assert case["agrees"] != (red and case["implementation"] == "cpu")
    wrong = next(c for c in record["cases"] if c["op"] == "decode")
    assert wrong["errors"]["out"] == pytest.approx(0.01, rel=1e-3)
    assert wrong["errors"]["out"] > 1e3 * wrong["limits"]["out"] > 1e-3 * 2e-6
    assert "decode, cpu differs: relative error of out 1.0e-02, expected at most" in " ".join(err.split())


def test_what_raises_differs_and_what_torch_lacks_is_skipped(problem, monkeypatch):
    def broken(*_tensors, **_options):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(cpu, "decode", broken)
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", broken)
    with torch.no_grad():
        ours, torchs = run.measure("decode", problem, ["cpu", "torch"], timing.CpuClock(), Effort(0.0, 1, 1))
    assert ours.difference == "raised RuntimeError: out of luck"
    assert (torchs.skipped, torchs.verdict) == ("out of luck", None)
    assert not ours.times
    assert not torchs.times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "S9"], "shapes: expected names (S1, S2, S3, C1, C2, tiny) or N,D,L,k split by ';', got 'S9'"),
        (["--implementation", "fast"], "implementation: expected some of auto, triton, cpu, reference, torch"),
        (["--device", "cpu", "--implementation", "triton"], "implementation 'triton' expects"),
        (["--device", "mps"], "device: expected cuda, cuda:N or cpu, got 'mps'"),
        (
            ["--device", "cuda:99"],
            "GPUs, got 'cuda:99'" if torch.cuda.is_available() else "expected a GPU for 'cuda:99', got a machine",
        ),
        (["--json", "/nowhere/bench.json"], "json: expected a file in a folder that exists"),
    ],
)
def test_mistakes_end_with_code_2(bench, arguments, message):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_gpu_sized_numbers_fit_80_columns():
    peaks = Peaks(7.9e14, 4e12, 8192, 2**30, [1.39], [0.5])
    rows = [
        Row(
            "encode", "triton chunked", Verdict({"regret": 0.0}, None, 1.0), None, [12.11, 12.34, 12.91], 12345.6, True
        ),
        Row("decode bwd", "torch", Verdict({}, None), None, [0.0912, 0.0934, 0.0951], 8600.0),
        Row("fwd+bwd", "triton", Verdict({}, "wrong"), None),
        Row("fwd+bwd", "torch", None, "out of memory"),
    ]
    records = [row_record(row, SHAPES["S2"], OPS[row.op].cost(SHAPES["S2"], 2), peaks, [50.1, 50.2]) for row in rows]
    page = io.StringIO()
    Console(width=80, file=page).print(shape_table("S2", records))
    text = page.getvalue()
    assert "…" not in text
    assert "triton chunked*" in text
    assert f"{50.15 / 12.34:.2f}x" in text
    assert [record["ms"] for record in records] == [12.34, 0.0934, None, None]
