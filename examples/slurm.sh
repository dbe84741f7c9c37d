#!/bin/bash
# On each of four machines with eight GPUs; put on again by itself before its time is up.
#     sbatch examples/slurm.sh --preset vith14_in1k --data /images --out /shared/runs/h14
#SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@120
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# two minutes before the time is up: stop the steps, which save, and queue the job again
trap 'scancel --signal=TERM "$SLURM_JOB_ID"; wait; scontrol requeue "$SLURM_JOB_ID"' USR1
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 110 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
    -m ijepa_fast.train "$@" &
wait
