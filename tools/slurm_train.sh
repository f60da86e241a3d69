#!/usr/bin/env bash
# Train on a SLURM cluster: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [flags of tools/train.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS come from the environment; GPUS_PER_NODE=0 asks
# for no GPU and runs GPUS processes.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [flags of tools/train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
exec "$(dirname "$0")/slurm/srun.sh" "$partition" "$job_name" \
    "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
