#!/usr/bin/env bash
# One srun for training and evaluation: srun.sh PARTITION JOB_NAME SCRIPT [arguments]
set -euo pipefail
partition=$1
job_name=$2
shift 2
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
request=()
if [ "$per_node" -gt 0 ]; then
    tasks_per_node=$((gpus < per_node ? gpus : per_node))
    request=(--gres="gpu:$tasks_per_node" --ntasks-per-node="$tasks_per_node")
fi
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name="$job_name" --ntasks="$gpus" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${request[@]+"${request[@]}"} ${SRUN_ARGS:-} \
    python -u "$@"
