#!/usr/bin/env bash
# Everything a GPU is needed for, in one go:  benchmarks/gpu.sh OUT_DIR [options of fastsae bench]
#
# Runs the tests compiled (no interpreter), then the benchmark, growth, crossover, the step beside its peers and whole runs
# beside sparsify's, and leaves logs and results in OUT_DIR.
# No speed is measured if a test fails. PYTHON chooses the interpreter; TESTS, what pytest is given instead of all
# tests (environment.txt notes it). Exit code 0: all passed; 1: something failed; 2: it could not begin.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: benchmarks/gpu.sh OUT_DIR [options of fastsae bench]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python}
tests=${TESTS:-tests}
unset TRITON_INTERPRET
rm -f "$out"/{tests.xml,tests.log,bench.json,bench.log,growth.json,peers.json,end_to_end.json} # of an earlier run
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" COLUMNS=${COLUMNS:-80}

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh: expected a GPU that $python's torch sees, found none; see python -m torch.utils.collect_env" >&2
    exit 2
}

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    git status --porcelain --untracked-files=no 2>/dev/null
    echo "tests: $tests"
    echo "bench: $*"
    "$python" -m torch.utils.collect_env
    "$python" -m pip list 2>/dev/null
} >"$out/environment.txt" 2>&1
nvidia-smi -q >"$out/nvidia-smi.txt" 2>&1 || rocm-smi >"$out/rocm-smi.txt" 2>&1

# shellcheck disable=SC2086  # TESTS may be several words
"$python" -m pytest -ra --junitxml="$out/tests.xml" $tests 2>&1 | tee "$out/tests.log" || {
    echo "benchmarks/gpu.sh: tests failed, see $out/tests.log; no speed is measured" >&2
    exit 1
}
"$python" -m fastsae bench --json "$out/bench.json" "$@" 2>&1 | tee "$out/bench.log" || {
    echo "benchmarks/gpu.sh: the benchmark failed, see $out/bench.log" >&2
    exit 1
}
"$python" benchmarks/growth.py --device cuda --json "$out/growth.json" 2>&1 | tee "$out/growth.log" || exit 1
"$python" benchmarks/crossover.py --device cuda 2>&1 | tee "$out/crossover.log" || exit 1
# A step beside the peers that are installed (benchmarks/peers/requirements.txt); fastsae alone where none is.
have="fastsae fastsae-graph"
for library in sparsify:eai-sparsify SAELens:sae-lens dictionary_learning:dictionary-learning; do
    "$python" -c "import importlib.metadata as m, sys; m.version(sys.argv[1])" "${library#*:}" 2>/dev/null && have="$have ${library%%:*}"
done
# shellcheck disable=SC2086  # several words
"$python" benchmarks/peers/run.py --device cuda --only $have --json "$out/peers.json" 2>&1 | tee "$out/peers.log" || {
    echo "benchmarks/gpu.sh: the comparison with peers failed, see $out/peers.log" >&2
    exit 1
}
whole=fastsae
case "$have" in *sparsify*) whole="fastsae sparsify" ;; esac
# shellcheck disable=SC2086  # several words
"$python" benchmarks/peers/end_to_end.py --only $whole --json "$out/end_to_end.json" 2>&1 | tee "$out/end_to_end.log" || {
    echo "benchmarks/gpu.sh: whole runs failed, see $out/end_to_end.log" >&2
    exit 1
}
