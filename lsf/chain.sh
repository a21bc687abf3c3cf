#!/usr/bin/env bash
# A run longer than the queue's limit, as a chain of jobs that each go on from the last one's checkpoint.
#   lsf/chain.sh lsf/summit_moe.lsf [options of bsub]     submit the first job; the others follow by themselves
# A job that stops with a checkpoint submits the next. The chain ends when the run is finished, when a job fails, when
# two jobs in a row made no step, and after JOBS jobs (12). Variables as of the script; RUN_DIR goes on with that run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=cluster/common.sh
source cluster/common.sh

if [ "${1:-}" = --next ]; then # from lsf/job.sh, with the mark of the checkpoint from before the job
    : "${RUN_DIR:?}" "${WLSUP_SCRIPT:?}"
    if ! made_a_step "${2:?}"; then
        say "two jobs in a row made no step: the chain ends. Look at $RUN_DIR/run.log; is WALLTIME too short to start in?"
        exit 0
    fi
    if [ -z "${WLSUP_JOBS_LEFT:-}" ]; then
        say "stopped with a checkpoint; go on with RUN_DIR=$RUN_DIR lsf/chain.sh $WLSUP_SCRIPT"
        exit 0
    fi
    if [ "$WLSUP_JOBS_LEFT" -le 0 ]; then
        say "the chain's last job has run and the run is not finished; go on with RUN_DIR=$RUN_DIR lsf/chain.sh $WLSUP_SCRIPT"
        exit 0
    fi
else
    WLSUP_SCRIPT=${1:?give the script, such as lsf/chain.sh lsf/summit.lsf}
    [ -f "$WLSUP_SCRIPT" ] || fail "There is no script $WLSUP_SCRIPT in $PWD."
    case ${JOBS:=12} in *[!0-9]* | 0) fail "JOBS=$JOBS is not a number of jobs." ;; esac
    shift
    export WLSUP_JOBS_LEFT=$JOBS WLSUP_BSUB=''
    [ $# = 0 ] || WLSUP_BSUB=$(printf '%q ' "$@") # the options go on to every job
    [ -z "${RUN_DIR:-}" ] || rm -f "$RUN_DIR/.idle"
fi
options=()
[ -z "${WALLTIME:-}" ] || options+=(-W "$WALLTIME")
[ -z "${PROJECT:-}" ] || options+=(-P "$PROJECT")
# as it was given, quoted by printf above
eval "given=(${WLSUP_BSUB:-})"
# shellcheck disable=SC2154 # given is set by eval
options+=(${given[@]+"${given[@]}"})
export WLSUP_JOBS_LEFT=$((WLSUP_JOBS_LEFT - 1))
# by standard input, which every LSF reads directives from; `bsub SCRIPT` does where LSB_BSUB_PARSE_SCRIPT is set
bsub ${options[@]+"${options[@]}"} <"$WLSUP_SCRIPT"
