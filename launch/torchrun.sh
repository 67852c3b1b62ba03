#!/usr/bin/env bash
# Train under torchrun. When a rank dies, all are restarted and resume from the newest checkpoint by themselves.
#
#     PET_NPROC_PER_NODE=8 bash launch/torchrun.sh --out run              # the 8 ranks of this host
#
# Several hosts: on each of them the same line, with the number of hosts (2:4 for any from 2 to 4), a directory that
# they share, and the address of one of them, which then carries the rendezvous and must not be lost:
#
#     PET_NNODES=2:4 PET_RDZV_ENDPOINT=host0:29400 PET_NPROC_PER_NODE=8 bash launch/torchrun.sh --out /shared/run
#
# The arguments are train.py's. PET_* are torchrun's own: PET_MAX_RESTARTS stands for its --max-restarts, and so on.
# PYTHON is the interpreter, if not the first python3; PROGRAM your own program, if not train.py.
set -euo pipefail

export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-2}"
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's default, without its warning

if [[ -n "${PET_RDZV_ENDPOINT:-}" ]]; then
    export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}" # torchrun's default restarts the ranks of one host only
else
    export PET_STANDALONE=1
fi

# With the store of torchrun's agent, a restarted rank may meet the address that a rank of the life before had left
# there ("Gloo connectFullMesh failed", pytorch/pytorch#135712). This gives every life a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

exec "${PYTHON:-python3}" -m torch.distributed.run "${PROGRAM:-$(dirname "${BASH_SOURCE[0]}")/train.py}" --resume "$@"
