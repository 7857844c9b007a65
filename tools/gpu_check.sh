#!/usr/bin/env bash
# Acceptance of surgery on a GPU. From the root of a checkout, on a machine with a GPU:
#     DEVICE=cuda bash tools/gpu_check.sh            first call: everything, within LIMIT seconds (default 540)
#     DEVICE=cuda bash tools/gpu_check.sh profile    second call: where the time goes, within 300
#     DEVICE=cpu SIZE=tiny bash tools/gpu_check.sh   rehearsal without a GPU, on the CPU
#     REHEARSE=1 bash tools/gpu_check.sh             rehearsal without a GPU, on a pretended one whose work is late (tests/late_gpu.py)
# Needs neither huggingface-hub 2 nor httpx2 nor an installation: local folders only. Logs and JSON under $OUT (8 files at most).
set -uo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(pwd)
[ "${REHEARSE:-0}" = 1 ] && DEVICE=cuda:0 SIZE=tiny
BENCH=${DEVICE:-cuda}; [ "${REHEARSE:-0}" = 1 ] && BENCH=cpu  # benchmarks start processes, and measure: no pretended device
DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-full} LIMIT=${LIMIT:-540} PY=${PY:-python3} OUT=${OUT:-gpu-out}
WORK=${WORK:-gpu-work}
mkdir -p "$OUT"; rm -rf "$WORK"; mkdir -p "$WORK"
export PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT:$ROOT/benchmarks:$HERE${PYTHONPATH:+:$PYTHONPATH}" OUT WORK DEVICE SIZE REHEARSE=${REHEARSE:-0} HF_HUB_OFFLINE=1 TMPDIR="$WORK"
BEGUN=$SECONDS; RESULTS=()
left() { echo $((LIMIT - (SECONDS - BEGUN))); }
# step NAME SECONDS COMMAND...: runs it if that much time is left; its output goes to $OUT/log.txt and, the end of it, to the screen
step() {
    local name=$1 most=$2; shift 2
    local room; room=$(left); if [ "$room" -lt 15 ]; then RESULTS+=("$name skipped: no time left"); return; fi
    [ "$most" -gt "$room" ] && most=$room
    local t=$SECONDS; echo "=== $name" | tee -a "$OUT/log.txt"
    timeout --kill-after=5 "$most" "$@" >"$WORK/step.log" 2>&1; local rc=$?
    cat "$WORK/step.log" >>"$OUT/log.txt"; tail -n "${TAIL:-12}" "$WORK/step.log"
    local verdict=ok; [ $rc -ne 0 ] && verdict="FAILED (exit $rc)"; [ $rc -eq 124 ] && verdict="OUT OF TIME ($most s)"
    RESULTS+=("$name $verdict, $((SECONDS - t)) s")
}
PYTEST=("$PY" -m pytest -q -x --maxfail=20 -p no:cacheprovider --timeout=120)
N=8; [ "$SIZE" = tiny ] && N=2
if [ "$SIZE" = tiny ]; then GB=0.06 HIDDEN=512 SVD=(small) REPEATS=1; else GB=6 HIDDEN=4096 SVD=(square wide stored ranks small hard) REPEATS=3; fi
case ${1:-all} in
all)
    step "machine and ceilings" 60 "$PY" "$HERE/gpu_check.py" ceilings
    TAIL=25 step "tests marked cuda" 90 "${PYTEST[@]}" -m cuda tests/linalg/test_svd.py tests/engine/test_device.py
    step "end to end on the device" 120 "${PYTEST[@]}" tests/engine/test_pretend_gpu.py
    TAIL=30 step "exactness: device and CPU, three dtypes" 150 "$PY" "$HERE/gpu_check.py" exact
    TAIL=40 step "FP8 decoded on the device, and proofs" 60 "$PY" "$HERE/gpu_check.py" quantized
    step "a device that is full" 60 "$PY" "$HERE/gpu_check.py" full
    TAIL=20 step "224 matrices in the batches that factorize plans" 60 "$PY" "$HERE/gpu_check.py" windows
    TAIL=20 step "pipeline beside a copy" 170 "$PY" benchmarks/pipeline.py --gigabytes $GB --hidden $HIDDEN --repeats 1 --device "$BENCH" --folder "$WORK" --json "$OUT/pipeline.json" --rows copy,factorize-no-correction,factorize,factorize-overlay,fold-untouched,fold-all-changed
    TAIL=60 step "svd.py against its peers" 100 "$PY" benchmarks/svd.py "${SVD[@]}" --device "$BENCH" --repeats $REPEATS
    step "the rest of the suite with --device auto" 120 "${PYTEST[@]}" -n $N --dist worksteal tests/lossless/test_lossless.py tests/lossless/test_directions.py tests/linalg/test_energy.py tests/commands/test_round_trip.py tests/commands/test_verify.py tests/commands/test_project.py -k "not from_the_hub"
    ;;
profile)
    LIMIT=${LIMIT_PROFILE:-290}
    TAIL=60 step "stages of a run (surgery --profile)" 120 "$PY" "$HERE/gpu_check.py" stages
    TAIL=70 step "kernels of the SVD and of the split (torch.profiler)" 90 "$PY" "$HERE/gpu_check.py" kernels
    TAIL=30 step "stream races (torch.cuda._sanitizer in every thread)" 60 "$PY" "$HERE/gpu_check.py" races
    ;;
esac
echo; echo "--- $DEVICE, $((SECONDS - BEGUN)) s"; printf '%s\n' "${RESULTS[@]}" | tee "$OUT/summary.txt"
rm -rf "$WORK"
for line in "${RESULTS[@]}"; do case $line in *FAILED*|*OUT*) exit 1;; esac; done
