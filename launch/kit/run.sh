#!/usr/bin/env bash
# What to run first on a GPU machine, with or without network: bash .gpu-kit/run.sh, from the folder of the project.
#
# Stages, most valuable first. Each has a deadline and writes its result at once; one that fails, or runs out of time,
# stops none of the others. All of them together take less than nine minutes. Results come as files in $OUT: results.txt
# (a line and the last lines of each stage), the whole output of each, kernels-*.json, and Inductor's cache. More:
# docs/gpu.md. `make gpu-kit` makes the folder that this file lies in.
#
# Set by the environment: PYTHON, OUT, WORK, STAGES (names; default: all); for a rehearsal also DELTA, LACT, SIZE and ROUNDS of the steps, and SLACK, by
# which deadlines are multiplied.
set -uo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-kit-results} WORK=${WORK:-/tmp/gpu-kit}
DELTA=${DELTA:-model=delta_net_1.3b} LACT=${LACT:-model=lact_760m} ROUNDS=${ROUNDS:-3} SLACK=${SLACK:-1}
SIZE=${SIZE:-data.seq_length=16384 train.precision=bf16}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
mkdir -p "$OUT" "$WORK" && OUT=$(cd "$OUT" && pwd) && : >"$OUT/results.txt" || exit 2
began=$SECONDS

say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/results.txt"; }

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 limit=$(($2 * SLACK)) code
    shift 2
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return 0
    say "begin $name, at most $limit s"
    timeout -k 2 "$limit" "$@" >"$OUT/$name.txt" 2>&1
    code=$?
    say "end $name, code $code$([ "$code" = 124 ] && echo ": out of time")"
    tail -n 25 "$OUT/$name.txt" >>"$OUT/results.txt"
}

# Wheels of what this machine lacks; what it has stays, in whatever version.
install() {
    local wheel name lacking=()
    for wheel in "$kit"/wheels/*.whl; do
        [ -e "$wheel" ] || return 0
        name=$(basename "$wheel") && name=${name%%-*}
        "$PYTHON" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || lacking+=("$wheel")
    done
    [ "${#lacking[@]}" = 0 ] || "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$WORK/site" "${lacking[@]}"
}

# Compiled kernels. Triton's cache names its files by their absolute paths: they move to where they are now.
unpack() {
    [ -e "$kit/triton.tar.xz" ] && [ ! -e "$TRITON_CACHE_DIR" ] || return 0
    mkdir -p "$TRITON_CACHE_DIR" && tar -C "$TRITON_CACHE_DIR" -xJf "$kit/triton.tar.xz" || return
    find "$TRITON_CACHE_DIR" -name '__grp__*.json' -exec sed -i "s|$(cat "$kit/triton.path")|$TRITON_CACHE_DIR|g" {} +
}

keep_inductor() {
    [ ! -d "$TORCHINDUCTOR_CACHE_DIR" ] || tar -C "$WORK" -cJf "$OUT/inductor.tar.xz" inductor 2>/dev/null
}

# A run of ours or a test: the folder of the project is the working directory.
refine() { echo "$PYTHON -m megatron_refine $*"; }
tests() { echo "$PYTHON -m pytest -q -rs -m gpu -p no:cacheprovider $*"; }

install >"$OUT/install.txt" 2>&1 || say "wheels: $(tail -n 1 "$OUT/install.txt")"
unpack || say "compiled kernels: cannot be unpacked"
export PYTHONPATH=$WORK/site:$PWD${PYTHONPATH:+:$PYTHONPATH}
config="--config configs/bench.yaml $SIZE"

# the words of commands and settings are meant to be split
# shellcheck disable=SC2046,SC2086
{
    stage facts 30 $(refine bench facts $config $DELTA --rounds 10)
    timeout 100 $(refine prepare $config $DELTA) >"$OUT/prepare.txt" 2>&1 & # rows of text, while others work
    stage cache 30 $(refine kernels warm $config $DELTA --pinned --jobs 2) # with the carried binaries: 0 compiled
    stage parity 60 $(tests tests/test_delta_rule.py)
    stage measure 60 $(refine kernels measure $config $DELTA --json "$OUT/kernels-delta.json")
    wait
    stage delta 80 $(refine bench step $config $DELTA --rounds "$ROUNDS")
    stage delta-profile 40 $(refine bench profile $config $DELTA --rounds 1)
    stage lact 80 $(refine bench step $config $LACT --rounds "$ROUNDS")
    keep_inductor
    stage lact-profile 40 $(refine bench profile $config $LACT --rounds 1)
    stage hf 50 $(refine bench step --hf $config $DELTA --rounds "$ROUNDS")
    stage tests 40 $(tests tests/test_lact.py tests/test_decode.py)
}
keep_inductor
say "done: $OUT"
