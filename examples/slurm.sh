#!/bin/bash
# A training job that saves itself shortly before its time is up and goes to the end of the queue, until it is done:
#
#   sbatch examples/slurm.sh runs/s --config recipes/imagenet_s.yaml --data IMAGENET
#
# The time between the signal and the end has to be enough for a pass over the validation images.
#SBATCH --job-name=sgformer
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue --open-mode=append --output=slurm-%j.txt

run=$1
shift
if [ -f "$run/config.yaml" ]; then
  srun sgformer train classify --resume "$run" --devices "${SLURM_NTASKS_PER_NODE:-8}"
else
  srun sgformer train classify --run "$run" --devices "${SLURM_NTASKS_PER_NODE:-8}" "$@"
fi
status=$?
# 138 is 128 + SIGUSR1, 143 is 128 + SIGTERM: the state was saved. Anything else is the end, good or bad.
if [ $status -eq 138 ] || [ $status -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
