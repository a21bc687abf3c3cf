# What is particular to a site and to SLURM; sourced by slurm/wlsup.sbatch. Adapt this file, or set the variables before
# `sbatch`, which passes them on.
# shellcheck shell=bash

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python; fi
fi
: "${STRATEGY:=ddp}" "${MARGIN:=0:10}"
# The node's own disk, where a site gives each job one
: "${NVME:=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1} HF_DATASETS_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# srun of SLURM 22.05 and newer no longer takes --cpus-per-task from sbatch
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
