#!/usr/bin/env bash
# All that is measured on a GPU, in under six minutes on an H100: the tests, the engine, the training.
#
#     bash benchmarks/gpu_all.sh OUT_DIR                        # one GPU with 60 GB or more
#     bash benchmarks/gpu_all.sh OUT_DIR --quick --device cpu   # the same at a tiny size, to try it
#
# Each part has a time limit of its own, writes its results as they come, and ends no other one by failing. OUT_DIR
# gets log.txt, engine.json (gpu.py), training.json (gpu_training.py), tests.xml and summary.json, whose lines are
# printed at the end. PYTHON is the interpreter (python3). ONLY names the parts (ONLY="tests engine training").
set -uo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
out=$1 device=cuda quick=
shift
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --device) [ $# -ge 2 ] || usage; device=$2; shift ;;
        *) usage ;;
    esac
    shift
done

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
threads= patience=1
# A CPU that others use too takes its time; only seconds of a GPU are counted.
[ "$device" != cpu ] || { threads="--threads 1"; patience=4; }
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
rm -f "$out"/{log.txt,engine.json,training.json,tests.xml,parts.tsv,summary.json}

part() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case " ${ONLY:-tests engine training} " in *" $name "*) ;; *) return ;; esac
    printf '\n== %s, %s s at most: %s\n' "$name" "$limit" "$*" | tee -a "$out/log.txt"
    # As Ctrl-C does: pytest and the benchmarks then end with what they have.
    timeout -s INT -k 8 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$limit" >>"$out/parts.tsv"
    printf '== %s: status %s after %s s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$out/log.txt"
}

if command -v nvidia-smi >/dev/null; then
    timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm \
        --format=csv 2>&1 | tee -a "$out/log.txt"
fi
# Warnings of other releases of the packages are shown, not raised.
part tests $((90 * patience)) "$python" -m pytest -m gpu -W default -p no:cacheprovider -v --tb=short --durations=8 \
    --junitxml="$out/tests.xml" tests/gpu
part engine $((150 * patience)) "$python" benchmarks/gpu.py $quick $threads --device "$device" \
    --budget $((130 * patience)) --out "$out/engine.json"
part training $((100 * patience)) "$python" benchmarks/gpu_training.py $quick $threads --device "$device" --budget $((80 * patience)) \
    --out "$out/training.json"
timeout 30 "$python" benchmarks/gpu_summary.py "$out" 2>&1 | tee -a "$out/log.txt"
