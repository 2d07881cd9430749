#!/bin/sh
# The small real model on one GPU, in two calls where only so much can be copied at a time:
#   first:  sh benchmarks/gpu_smol.sh keep FOLDER...   what travels now and is needed later: part 1 of the base, wheels
#   second: sh benchmarks/gpu_smol.sh train OUT SECONDS [OPTION...]   with part 2 and the data in .gpu/second
# The machine needs torch, transformers, peft, accelerate, gguf, pydantic (wheels in .whl are unpacked, nothing is fetched).
set -eu
kept=${SMOL_KEPT:-/tmp/smol-kept}
case $1 in
keep)
    shift
    mkdir -p "$kept"
    cp -r "$@" "$kept/"
    ls -lR "$kept"
    ;;
train)
    started=$(date +%s)
    out=$2 seconds=$3
    shift 3
    mkdir -p "$out" "$kept/wheels"
    for wheel in .whl/*.whl "$kept"/.whl/*.whl; do
        if [ -e "$wheel" ]; then python3 -m zipfile -e "$wheel" "$kept/wheels"; fi
    done
    first=$kept/first
    if [ ! -e "$first" ]; then first=.gpu/first; fi
    PYTHONPATH=src:benchmarks:$kept/wheels TOKENIZERS_PARALLELISM=true python3 -u benchmarks/smol.py \
        --base "$first/xaa" .gpu/second/xab --data .gpu/second/smol-data.tar.xz \
        --work "${SMOL_WORK:-/tmp/smol-work}" --out "$out" --seconds "$seconds" --started "$started" "$@" \
        2>&1 | tee "$out/log.txt"
    ;;
*)
    echo "keep FOLDER... or train OUT SECONDS" >&2
    exit 2
    ;;
esac
