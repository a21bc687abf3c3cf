# What is particular to a site and to LSF; sourced by lsf/job.sh on the launch node. Adapt this file, or set the
# variables before `bsub`, which passes them on.
# shellcheck shell=bash

# The suite's Python. On a site with modules: `module load python` here, and PYTHON=python.
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python; fi
fi

# A node of Summit and of other AC922 systems: six V100s and 42 cores that jobs may use (Sierra and Lassen have four V100s and 40)
: "${GPUS_PER_NODE:=6}" "${CORES_PER_NODE:=42}"

# V100s have no bfloat16, whatever a recipe says
: "${PRECISION=16-mixed}" "${STRATEGY=ddp}"

# As #BSUB -W in the script, or `bsub -W`: training stops with a checkpoint MARGIN before it
: "${WALLTIME:=2:00}" "${MARGIN:=0:15}"

# The node's own disk, from alloc_flags nvme
: "${NVME:=/mnt/bb/${USER:-$(id -un)}}"

# Compute nodes reach no network: say at once what is missing instead of waiting for a time-out
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Weights are fetched on a login node, into a folder that compute nodes can read
export HF_HOME=${HF_HOME:-$PWD/.cache/huggingface} TORCH_HOME=${TORCH_HOME:-$PWD/.cache/torch}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES_PER_NODE / GPUS_PER_NODE))}
