#!/usr/bin/env bash
# Evaluate with N processes on this machine: tools/dist_test.sh CONFIG CHECKPOINT N [flags of tools/test.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT alike on each.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: tools/dist_test.sh CONFIG CHECKPOINT N [flags of tools/test.py]" >&2
    exit 2
fi
config=$1
checkpoint=$2
processes=$3
shift 3
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
