#!/usr/bin/env bash
# A CytoSyn-class model from TCGA slides on one node of GPUs. Each line may be killed and run again.
# usage: training/full.sh SLIDES GDC_MANIFEST SD_VAE H0_MINI OUT
#   SD_VAE   model folder with the autoencoder to start from (cytosyn-aug convert makes one)
#   H0_MINI  folder with H0-mini's model.safetensors and config.json
# Under SLURM: sbatch --nodes 1 --gpus-per-node 8 --cpus-per-task 96 --time 14-0 --signal TERM@300 \
#                     --requeue --wrap "training/full.sh ..."
# `python -m training STAGE --recipe xl --dry-run` says beforehand what a stage costs.
set -euo pipefail
slides=$1 manifest=$2 sd_vae=$3 h0_mini=$4 out=$5
gpus=$(nvidia-smi --list-gpus | wc -l)
cores=$(nproc)

stage() {
    torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m training "$1" \
        --recipe xl --data "$out/tiles" --out "$out/$1" --compile "${@:2}"
}

python -m training tile --slides "$slides" --manifest "$manifest" --recipe xl \
    --workers "$cores" --out "$out/tiles"
stage repae --vae "$sd_vae" --encoder "$h0_mini"
parts=(--vae "$out/repae" --encoder "$h0_mini")
stage latents "${parts[@]}"
stage distil "${parts[@]}" --latents "$out/latents" --teacher "$out/repae"
stage decoder --vae "$out/repae"
python -m training export --recipe xl "${parts[@]}" --sit "$out/repae" --student "$out/distil" \
    --decoder "$out/decoder" --out "$out/model"
python -m training evaluate --data "$out/tiles" --model "$out/model" --out "$out/report" \
    --extractors own alexnet
