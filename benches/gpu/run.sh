#!/usr/bin/env bash
# All of benches/gpu in order, each part within ten minutes:
#
#   benches/gpu/run.sh BINARY CHECKPOINTS [PART...]
#
# Parts: checkpoints oracle decode-1 decode-64 embeddings mixed three start; all unless named.
# DEVICE=cpu QUICK=1 tries the scripts out on tiny shapes. Lines of JSON go to CHECKPOINTS/results.
set -uo pipefail
binary="$(realpath "$1")" checkpoints="$2"
shift 2
device="${DEVICE:-cuda}" quick="${QUICK:+--quick}" python="${PYTHON:-python3}"
here="$(dirname "$0")"
parts=("$@")
[ $# -gt 0 ] || parts=(checkpoints oracle decode-1 decode-64 embeddings mixed three start)
mkdir -p "$checkpoints"
failed=0

bounded() {
    echo "== $*" >&2
    timeout --kill-after=10 590 "$@" | tee -a "$checkpoints/results" || failed=1
}

if [ -n "$quick" ]; then
    shapes=(tiny-qwen3 tiny-llama tiny-bert)
    oracles=(tiny-qwen3 tiny-llama)
    oracle=(--batches 1,7 --lengths 1,16,100 --tokens 8)
else
    shapes=(qwen3-0.6b llama-1b qwen3-4b llama-8b bge-large)
    oracles=(qwen3-0.6b llama-1b)
    oracle=()
fi
for part in "${parts[@]}"; do
    case "$part" in
    checkpoints)
        for shape in "${shapes[@]}"; do
            [ -e "$checkpoints/$shape/tokenizer.json" ] ||
                bounded "$python" "$here/make_checkpoint.py" "$shape" "$checkpoints/$shape" \
                    --device "$device"
        done
        ;;
    oracle)
        for shape in "${oracles[@]}"; do
            bounded "$python" "$here/oracle.py" "$checkpoints/$shape" --binary "$binary" \
                --device "$device" "${oracle[@]}"
        done
        ;;
    *)
        bounded "$python" "$here/measure.py" "$part" "$checkpoints" --binary "$binary" \
            --device "$device" $quick
        ;;
    esac
done
exit $failed
