#!/usr/bin/env bash
# Keeps finished environments, so that another clone, or the next run of the checks, links one instead of installing it.
#
#   tools/environment.sh restore|keep|name FOLDER CACHE PYTHON FILE...
#
# A kept environment is CACHE/<FOLDER>-<hash>: the hash is that of the FILEs, PYTHON's version, the machine, its GPU and
# TORCH_INDEX; `name` prints it. `restore` ends with 1 where there is none, or where FOLDER exists; an empty CACHE keeps
# nothing. Files are hard links where CACHE is on the same file system: pip replaces files, it writes into none. What is
# not used for 30 days is removed.
set -euo pipefail
action=$1 folder=$2 cache=$3 python=$4
shift 4
[ -n "$cache" ] || { [ "$action" = keep ]; exit; }

hash=$({
    cat "$@"
    "$python" -c 'import platform, sys; print(sys.version, platform.platform())'
    nvidia-smi -L 2>/dev/null | grep -c GPU || true
    echo "${TORCH_INDEX:-}"
} | sha256sum | cut -c1-40)
kept=$cache/${folder#.}-$hash

# What make itself writes into an environment is copied: through a link it would be written into the kept one.
link() {
    cp -al "$1" "$2" 2>/dev/null || { rm -rf "$2" && cp -a "$1" "$2"; }
    find "$2" -name 'sglang_cpu_stubs.*' -exec sh -c 'cp -p "$0" "$0.own" && mv "$0.own" "$0"' {} \;
}

case $action in
name) basename -- "$kept" ;;
restore)
    [ -f "$kept/origin" ] && [ ! -e "$folder" ] || exit 1
    echo "linking the environment $folder from $cache"
    touch "$kept"
    trap 'rm -rf "$folder.unfinished"' EXIT
    rm -rf "$folder.unfinished"
    link "$kept" "$folder.unfinished"
    origin=$(cat "$kept/origin")
    { grep -IlF "$origin" "$folder.unfinished"/bin/* || true; } |
        xargs -r sed -i "s|$origin|$PWD/$folder|g" # sed writes new files
    mv -T "$folder.unfinished" "$folder" # whole, or not at all
    ;;
keep)
    mkdir -p "$cache"
    unfinished=$(mktemp -d "$cache/unfinished.XXXXXX")
    trap 'rm -rf "$unfinished"' EXIT
    link "$folder" "$unfinished/env"
    # the project is installed anew in each clone
    find "$unfinished/env" \( -iname '*megatron_refine*' -o -name 'megatron-refine' \) -prune -exec rm -rf {} +
    rm -f "$unfinished/env/ready"
    echo "$PWD/$folder" >"$unfinished/env/origin"
    rm -rf "$kept"
    mv -T "$unfinished/env" "$kept"
    find "$cache" -maxdepth 1 -name "${folder#.}-*" ! -path "$kept" -mtime +30 -exec rm -rf {} +
    ;;
esac
