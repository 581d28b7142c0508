# --- the same in every job: how it begins, is told to stop, goes on and ends -------------------------------------------
log() { echo "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $*"; }
job_field() { scontrol -o show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -1; }

signal_trainer() { # by its step's name: steps that begin together are numbered as they come
    squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | sed -n 's/ train$//p' | xargs -r scancel --signal="$1"
}

signalled=
stop() {
    signalled=yes
    log "told to stop"
    signal_trainer USR1
}
trap stop USR1 TERM

attempt="$run_dir/logs/slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
output=${attempt//%/%%} # as srun reads it
mkdir -p "$attempt"
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then # set by newer versions of SLURM only
    end=$(job_field EndTime)
    [ "${end:-Unknown}" = Unknown ] || SLURM_JOB_END_TIME=$(date -d "$end" +%s)
fi
export SLURM_JOB_END_TIME
addresses=()
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    addresses+=("$(scontrol -o show node "$node" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')")
done
export MASTER_ADDR=${MASTER_ADDR:-${addresses[0]}}

again() { # only a job that runs may come back: one that was cancelled stays away
    state=$(job_field JobState)
    if [ "$requeues" = no ] || [ "$state" != RUNNING ]; then
        log "$1; not requeued (${state:-unknown}, requeue $requeues)"
        exit "$code"
    fi
    log "$1; requeued"
    trap - USR1 TERM
    scontrol requeue "$SLURM_JOB_ID" || exit "$code"
    while :; do sleep 60; done # a script that ends before SLURM ends it would not be requeued
}

failures() { # in a row, without a new checkpoint in between
    latest=$(cat "$run_dir/checkpoints/latest" 2>/dev/null)
    read -r count of < <(cat "$run_dir/logs/slurm-$SLURM_JOB_ID.failures" 2>/dev/null)
    [ "${of:-}" = "${latest:-none}" ] || count=0
    echo "$((count + 1)) ${latest:-none}" >"$run_dir/logs/slurm-$SLURM_JOB_ID.failures"
    echo "$((count + 1))"
}

if [ "$engine_nodes" != 0 ]; then
    engines=("${addresses[@]:train_nodes}")
    urls=("${engines[@]/%/:$engine_port}")
    train+=('engine.python=""' "engine.urls=[$(IFS=,; echo "${urls[*]/#/http://}")]" "engine.master_address=$MASTER_ADDR")
    serve+=(--hosts "$(IFS=,; echo "${engines[*]}")")
fi

log "begins on $SLURM_JOB_NODELIST; logs in $attempt"
# --ntasks of its own for every step: srun inherits that of the whole job
srun --job-name=train --nodes="$train_nodes" --ntasks=$((train_nodes * ranks_per_node)) \
    --ntasks-per-node="$ranks_per_node" --relative=0 \
    --kill-on-bad-exit=0 --wait=60 --label --output="$output/ranks.log" "${srun_options[@]}" "${train[@]}" &
trainer=$!
if [ "$engine_nodes" != 0 ]; then
    srun --nodes="$engine_nodes" --ntasks="$engine_nodes" --ntasks-per-node=1 --relative="$train_nodes" --cpu-bind=none \
        --output="$output/engine-%n.log" "${srun_options[@]}" "${serve[@]}" &
    engine=$!
fi

code=0 refused=
while :; do # a signal interrupts the wait
    signalled=
    wait -n "$trainer" ${engine:+"$engine"}
    ended=$?
    if [ -n "${engine:-}" ] && kill -0 "$trainer" 2>/dev/null && ! kill -0 "$engine" 2>/dev/null; then
        engine= # what did not start for its settings will not; a server that died later is the trainer's to judge
        log "the servers ended with code $ended: $attempt/engine-*.log"
        case "$ended" in
        2 | 4) refused=$ended && tail -n 1 "$attempt"/engine-*.log && signal_trainer KILL ;;
        esac
        continue
    fi
    [ "$ended" = 127 ] || code=$ended
    [ -n "$signalled" ] || break
done
code=${refused:-$code}
[ -z "${engine:-}" ] || kill "$engine" 2>/dev/null
tail -n 3 "$attempt/ranks.log" 2>/dev/null
case "$code" in
0) log "done" ;;
75) again "stopped after saving" ;;
2 | 3 | 4 | 6 | 7) log "failed with code $code, which running again does not mend: $attempt/ranks.log" ;;
*)
    count=$(failures)
    [ "$count" -gt "$retries" ] || again "failed with code $code (failure $count; $retries retries)"
    log "failed with code $code, $count times without a new checkpoint: $attempt/ranks.log"
    ;;
esac
exit "$code"
