#!/usr/bin/env bash
# Evaluate on a SLURM cluster: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of tools/test.py]
# The environment is that of slurm_train.sh.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of tools/test.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
checkpoint=$4
shift 4
exec "$(dirname "$0")/slurm/srun.sh" "$partition" "$job_name" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher slurm "$@"
