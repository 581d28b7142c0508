#!/usr/bin/env bash
# What an image is made of, a layer each. Both recipes beside this file run it as root within the image:
#
#   install.sh system                      the distribution's packages
#   install.sh requirements EXTRAS INDEX   what the project needs: EXTRAS of setup.py, torch from the wheel index INDEX
#                                          (default: pip's own)
#   install.sh sglang VERSION              SGLang of this version; none: no SGLang
#   install.sh project                     the project itself
#
# Two environments, because SGLang pins a PyTorch of its own: PREFIX/megatron_refine and PREFIX/sglang. The sources lie
# in PREFIX/src. Of these, `requirements` reads setup.py, pyproject.toml and constraints.txt alone: its layer stays as
# it is while the sources change.
set -euo pipefail
PREFIX=${PREFIX:-/opt}
sources=$PREFIX/src trainer=$PREFIX/megatron_refine servers=$PREFIX/sglang
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

system() { # g++ and Python's headers: Triton and torch.compile build at run time. verbs: NCCL over InfiniBand.
    apt-get update
    apt-get install --yes --no-install-recommends \
        ca-certificates g++ ibverbs-providers libibverbs1 libnuma1 librdmacm1 python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the base image has no Python 3.11 or newer")'
}

install() { # into the trainer's environment, in the versions of the checks
    "$trainer/bin/python" -m pip install --constraint "$sources/constraints.txt" "$@"
}

requirements() {
    local extras=$1 index=$2 described
    python3 -m venv "$trainer"
    install setuptools
    [ "$index" = default ] || install --no-deps --index-url "$index" "$(grep '^torch==' "$sources/constraints.txt")"
    described=$(mktemp -d) # all that setup.py looks at, without the sources
    cp "$sources/setup.py" "$sources/pyproject.toml" "$described"
    mkdir -p "$described/megatron_refine/"{models,kernels,configs}
    echo '__version__ = "0"' >"$described/megatron_refine/__init__.py"
    install --no-build-isolation "${described}[$extras]"
    "$trainer/bin/python" -m pip uninstall --yes megatron-refine
    rm -r "$described"
}

sglang() { # SGLang's own pins decide here; our kernels need flash-linear-attention as the trainer has it
    local version=$1 kernels
    [ "$version" != none ] || return 0
    python3 -m venv "$servers"
    "$servers/bin/python" -m pip install setuptools "sglang==$version"
    kernels=$("$trainer/bin/python" -m pip freeze | grep -E '^(fla-core|flash-linear-attention)==' || true)
    [ -z "$kernels" ] || xargs "$servers/bin/python" -m pip install --no-deps <<<"$kernels"
}

project() { # in the servers' environment it is SGLang's plug-in
    local environment
    for environment in "$trainer" "$servers"; do
        [ ! -e "$environment" ] || "$environment/bin/python" -m pip install --no-deps --no-build-isolation "$sources"
    done
    "$trainer/bin/python" -m pip check
    "$trainer/bin/python" -m megatron_refine train --help >/dev/null
}

"$@"
