#!/usr/bin/env bash
# Train under mpirun: Open MPI, MPICH or Intel MPI, with mpi4py (pip install '.[mpi]' brings it, and an MPICH).
#
#     RANKS=8 bash launch/mpirun.sh --out run                                # the 8 ranks of this host
#     RANKS=16 HOSTFILE=hosts bash launch/mpirun.sh --out /shared/run        # on the hosts of a file of your MPI's kind
#
# MPI ends the whole job when a rank dies. It is started again MAX_RESTARTS times at most, and resumes.
# The arguments are train.py's: --backend mpi sends the tensors through MPI, too. PYTHON is the interpreter, if not the
# first python3; PROGRAM your own program, if not train.py.
#
# Open MPI as root, as in containers, wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; for more ranks
# than cores PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # else the ranks of one host fight for its cores
max_restarts="${MAX_RESTARTS:-3}"

command=(mpirun -n "${RANKS:-2}" ${HOSTFILE:+-hostfile "$HOSTFILE"})
command+=("${PYTHON:-python3}" "${PROGRAM:-$(dirname "${BASH_SOURCE[0]}")/train.py}" --resume "$@")

for ((restarts = 0; ; restarts++)); do
    "${command[@]}" && exit 0
    status=$?
    ((restarts < max_restarts)) || exit "$status"
    echo "mpirun.sh: ended with $status, restart $((restarts + 1)) of $max_restarts" >&2
done
