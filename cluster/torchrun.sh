#!/usr/bin/env bash
# A workstation, or nodes without a scheduler:   APPROACH=film GPUS_PER_NODE=4 cluster/torchrun.sh
# Several nodes: the same on each, with NODES=2 and RENDEZVOUS=host:port of the first; RUN_DIR on a file system of all.
# Again with the same RUN_DIR goes on from the last checkpoint. `make train ARGS="--trainer.devices 4"` does without this.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=cluster/common.sh
source cluster/common.sh

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python; fi
fi
NODES=${NODES:-1}
if [ -z "${GPUS_PER_NODE:-}" ]; then
    command -v nvidia-smi >/dev/null || fail "set GPUS_PER_NODE, the number of processes a node."
    GPUS_PER_NODE=$(nvidia-smi --list-gpus | wc -l)
fi
PROCESSES=$GPUS_PER_NODE
if [ "$NODES" = 1 ]; then
    where=(--standalone)
else
    [ -n "${RENDEZVOUS:-}" ] && [ -n "${RUN_DIR:-}" ] ||
        fail "NODES=$NODES needs RENDEZVOUS=host:port of one node, and RUN_DIR on a file system that all see."
    where=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-wlsup}")
fi
RUN_DIR=${RUN_DIR:-$(run_dir_of "torchrun-$(date +%Y%m%d-%H%M%S)")}
wlsup_options
say "$NODES nodes x $PROCESSES processes, into $RUN_DIR"
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" "${where[@]}" \
    -m wlsup fit "${OPTIONS[@]}"
