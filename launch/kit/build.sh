#!/usr/bin/env bash
# Make a folder to carry to a GPU machine without network: launch/kit/build.sh FOLDER PYTHON (make gpu-kit)
#
# PYTHON has the versions of Python and Triton that the GPU machine has, PyTorch and flash-linear-attention: it compiles
# the kernels, and its version chooses the wheels. Empty: neither kernels nor wheels. The folder gets
#   wheels/          what a machine with PyTorch, Triton, transformers and pytest may lack
#   triton.tar.xz    kernels, compiled for ARCH (sm_90): all candidates of MODELS, and the pinned ones of OTHERS
#   run.sh           the stages
# It stays below 64 MiB. Set by the environment: ARCH, MODELS, OTHERS, WHEELS, JOBS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kit=$1 python=${2:-} limit=$((64 << 20))
ARCH=${ARCH:-sm_90} JOBS=${JOBS:-$(nproc)}
MODELS=${MODELS-delta_net_1.3b} OTHERS=${OTHERS-gated_delta_net_1.3b gated_delta_net_bench delta_net_100m}
SIZE=${SIZE:-data.seq_length=16384 train.precision=bf16}
WHEELS=${WHEELS-flash-linear-attention fla-core megatron-core einops pydantic pydantic-core annotated-types \
    typing-inspection psutil httpx httpcore h11 anyio idna certifi rouge sentencepiece pytest-timeout matplotlib contourpy cycler \
    fonttools kiwisolver pillow pyparsing python-dateutil six}

rm -rf "$kit"
mkdir -p "$kit/wheels"
kit=$(cd "$kit" && pwd)
cp launch/kit/run.sh "$kit"
if [ -n "$python" ]; then
    # shellcheck disable=SC2086
    [ -z "$WHEELS" ] || "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --constraint constraints.txt --dest "$kit/wheels" $WHEELS
    cache=$(mktemp -d)
    trap 'rm -rf "$cache"' EXIT
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=$cache TRITON_STORE_BINARY_ONLY=1
    warm() { # shellcheck disable=SC2086
        "$python" -m megatron_refine kernels warm --config configs/bench.yaml $SIZE --arch "$ARCH" --jobs "$JOBS" "$@"
    }
    for model in $MODELS; do warm "model=$model"; done
    for model in $OTHERS; do warm "model=$model" --pinned; done
    find "$cache" -name '*.autotune.json' -delete # choices of launches that did nothing
    echo "$cache" >"$kit/triton.path"
    tar -C "$cache" -cJf "$kit/triton.tar.xz" .
fi
size=$(du -sb "$kit" | cut -f1)
[ "$size" -lt "$limit" ] || { echo "$kit: $size bytes, more than $limit: carry fewer wheels or kernels" >&2; exit 1; }
echo "$kit: $((size >> 10)) KiB; on the GPU machine: bash $(basename "$kit")/run.sh, from the project's folder"
