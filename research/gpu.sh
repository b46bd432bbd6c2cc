#!/usr/bin/env bash
# Every test and every figure that needs a GPU, in under ten minutes:
#
#   research/gpu.sh                   # results in research/results/benchmarks
#   OUT=/some/folder research/gpu.sh
#
# A part that fails or takes too long does not stop the others; the last lines name those that did, and the exit code is
# then 1. PYTHON (default: python) is the interpreter: sparsepeft with its extra "dev" must be installed in it, or
# PYTHONPATH be src. DEVICE=cpu QUICK=1 shows on a machine without a GPU that the commands are right.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
device=${DEVICE:-cuda}
out=${OUT:-research/results/benchmarks}
mkdir -p "$out"
failed=()
export SPARSEPEFT_ENABLE=${SPARSEPEFT_ENABLE:-triton}  # kernels that have not run on such a GPU yet, too

# part NAME SECONDS COMMAND...: runs it with a time limit, its output also in OUT/NAME.log.
part() {
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --foreground --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        [ "$code" -eq 124 ] && failed+=("$name (over $seconds s)") || failed+=("$name (exit code $code)")
    fi
    echo "== $name: $((SECONDS - started)) s, exit code $code"
}

quick=()
tests=(-n 4)  # most of their time is compiling
stack=(--model llama-4096 --layers 1 --lengths 8192 --dtype bf16 --repeats 7)
if [ -n "${QUICK:-}" ]; then
    quick=(--quick --threads 1)
    tests=(--collect-only)
    stack=(--model opt-1024 --layers 1 --lengths 128 --repeats 2 --threads 1)
fi

"$python" - "$device" <<'PYTHON' || exit 1
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU here; DEVICE=cpu QUICK=1 tries the commands without one.")
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "without a GPU")
PYTHON

part tests_gpu 220 "$python" -m pytest -q -m gpu "${tests[@]}" tests
benchmark=("$python" -m sparsepeft_cli benchmark)
part memory_gpu 50 "${benchmark[@]}" memory --device "$device" --dtype bfloat16 "${quick[@]}" \
    --output "$out/memory_gpu.json"
part sparse_attention_gpu 120 "${benchmark[@]}" sparse_attention --device "$device" "${quick[@]}" \
    --output "$out/sparse_attention_gpu.json"
part routed_ffn_gpu 60 "${benchmark[@]}" routed_ffn --device "$device" "${quick[@]}" \
    --output "$out/routed_ffn_gpu.json"
part spt_stack_gpu 110 "${benchmark[@]}" spt --device "$device" "${stack[@]}" \
    --output "$out/spt_stack_gpu.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts passed; results in $out"
