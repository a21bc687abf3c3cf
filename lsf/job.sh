# The body of an LSF job, on its launch node: stage, train, go on in another job if there is more to do; to be sourced.
# shellcheck shell=bash
set -euo pipefail

# shellcheck source=cluster/common.sh
source cluster/common.sh
# shellcheck source=lsf/env.sh
source lsf/env.sh

[ -r "${LSB_DJOB_RANKFILE:-}" ] ||
    fail "there is no rank file to read (LSB_DJOB_RANKFILE=${LSB_DJOB_RANKFILE:-}): submit this by bsub, to an LSF with jsrun."
# its first line is the launch node; every other one a slot of a compute node
NODES=$(tail -n +2 "$LSB_DJOB_RANKFILE" | sort -u | grep -c .) ||
    fail "the rank file $LSB_DJOB_RANKFILE names no compute node; ask for some with bsub -nnodes."
PROCESSES=$GPUS_PER_NODE
export RUN_DIR=${RUN_DIR:-$(run_dir_of "lsf-${LSB_JOBID:-0}")}

# -X 1: one process that fails ends all, which would wait for it otherwise
on_nodes=(jsrun -X 1 -n "$NODES" -r1 -a1 -c1)

wlsup_options # what is wrong with them is told before anything is copied
staged=
unstage() { # a node's disk is wiped anyway
    [ -z "$staged" ] || "${on_nodes[@]}" cluster/stage.sh --remove "$staged" || true
    staged=
}
trap unstage EXIT
if [ -n "${SHARDS:-}" ]; then
    staged=$NVME/wlsup-${LSB_JOBID:-0}
    export WLSUP_STAGED=$staged
    "${on_nodes[@]}" cluster/stage.sh "$SHARDS" "$staged"
fi
# training stops so long after its start; what has gone by since the job's is SECONDS
walltime=$(seconds_of WALLTIME)
margin=$(seconds_of MARGIN)
LIMIT=$((walltime - margin - SECONDS))
[ "$LIMIT" -gt 0 ] ||
    fail "WALLTIME=$WALLTIME leaves nothing of MARGIN=$MARGIN, in which the last step and the checkpoint are written."
wlsup_options

# LSF sends SIGUSR2 at the run limit and kills ten minutes later; bkill and the like send SIGINT and SIGTERM
CHILD='' SIGNALLED='' at_limit='' cancelled=''
trap 'SIGNALLED=1 at_limit=1; [ -z "$CHILD" ] || kill -USR2 "$CHILD" 2>/dev/null || true' USR2
trap 'SIGNALLED=1 cancelled=1; [ -z "$CHILD" ] || kill -TERM "$CHILD" 2>/dev/null || true' INT TERM

before=$(checkpoint_mark)
rm -f "$RUN_DIR/checkpoints/stopped"
say "job ${LSB_JOBID:-}: $NODES nodes x $PROCESSES processes, $LIMIT s, into $RUN_DIR"
run_trapped jsrun -X 1 -n "$NODES" -r1 "-a$GPUS_PER_NODE" "-g$GPUS_PER_NODE" "-c$CORES_PER_NODE" \
    -b "packed:$((CORES_PER_NODE / GPUS_PER_NODE))" -d packed --smpiargs=-disable_gpu_hooks \
    "$PYTHON" -m wlsup fit "${OPTIONS[@]}"

! stopped || CODE=75 # whatever the launcher made of it
unstage
if finished; then
    say "the run is finished: $RUN_DIR/results.json"
elif [ "$CODE" = 0 ]; then
    fail "the launcher ended without an error, and there is no $RUN_DIR/results.json; look at $RUN_DIR/run.log."
elif [ -n "$cancelled" ]; then
    say "cancelled; go on with RUN_DIR=$RUN_DIR lsf/chain.sh ${WLSUP_SCRIPT:-lsf/summit.lsf}"
elif stopped || [ -n "$at_limit" ]; then
    lsf/chain.sh --next "$before" ||
        say "the next job could not be submitted; go on with RUN_DIR=$RUN_DIR lsf/chain.sh ${WLSUP_SCRIPT:-lsf/summit.lsf}"
fi
exit "$CODE"
