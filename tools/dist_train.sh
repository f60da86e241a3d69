#!/usr/bin/env bash
# Train with N processes on this machine: tools/dist_train.sh CONFIG N [flags of tools/train.py]
# With N GPUs each process takes one; without GPUs the processes talk over gloo.
# MAX_RESTARTS=N: after a failure start again up to N times, from the newest checkpoint.
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT alike on each.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: tools/dist_train.sh CONFIG N [flags of tools/train.py]" >&2
    exit 2
fi
config=$1
processes=$2
shift 2
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
