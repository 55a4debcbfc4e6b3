#!/bin/sh
# Make the weights of sgformer_n that come with the package, as they were made: five parts, some six hours of one core.
#
#   sh benchmarks/weights_of_n.sh TINY NAMES.tsv RUNS
#
# TINY has Tiny ImageNet's train/CLASS; NAMES.tsv a line of WordNet id, tab, synonyms for each class; RUNS is a new
# folder. 25 photographs of each class are kept aside, to look at the progress.
set -eu
tiny=$1 names=$2 runs=$3 here=$(dirname "$0")
PYTHONPATH=$here python -c 'import sys; from pathlib import Path; from peers import keep_aside
keep_aside(*map(Path, sys.argv[1:]))' "$tiny" "$runs/data"
part() { # NAME, settings
  name=$1
  shift
  sgformer train classify --data "$runs/data" --run "$runs/$name" "$@"
}
large=$here/../recipes/tiny_imagenet_n.yaml small=$here/../recipes/tiny_imagenet_n_48.yaml
part 1-48 --config "$small"
part 2-64 --config "$large" --weights "$runs/1-48"
part 3-48 --config "$small" --weights "$runs/2-64" --epochs 12 --min-lr 1.44e-2 --color-jitter 0
part 4-64 --config "$large" --weights "$runs/3-48" --epochs 5 --lr 1.44e-2 --color-jitter 0
part 5-96 --config "$large" --weights "$runs/4-64" --image-size 96 --epochs 6 --lr 1e-2 --warmup-epochs .1 --color-jitter 0
python "$here/package_weights.py" "$runs/5-96" "$names" 128
