#!/usr/bin/env bash
# A CytoSyn-class model from TCGA slides on one node of GPUs. It may be killed and run again: what is
# finished stays, and what was begun goes on.
# usage: training/full.sh SLIDES GDC_MANIFEST SD_VAE H0_MINI OUT
#   SD_VAE   the autoencoder to start from: a folder of diffusers' AutoencoderKL, or a model folder
#   H0_MINI  folder with H0-mini's model.safetensors and config.json
# `python -m training STAGE --recipe xl --dry-run` says beforehand what a stage costs, and how to
# start all of this under SLURM, where it puts itself back into the queue before its time is over.
set -euo pipefail
slides=$1 manifest=$2 sd_vae=$3 h0_mini=$4 out=$5
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
cores=$(nproc)
recipe=${RECIPE:-xl} # smoke, GPUS=1, COMPILE= and NUM=16 try the script itself on a CPU
num=${NUM:-10000}
compile=(${COMPILE---compile})
# Seconds that torchrun gives its processes to save after SIGTERM, fewer than the 600 that SLURM is asked
# for; its own 30 may not do for the 12 GB of xl. Before torch 2.12 it knows no others: a save that
# takes longer is lost there, and with it what came after the checkpoint before, 15 minutes at most.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

# In the background, because bash looks at signals only between commands: the stage saves first.
run() {
    "$@" &
    child=$!
    wait "$child"
}
stop() {
    trap '' TERM
    kill -TERM "$child" 2> /dev/null && wait "$child" || true
    [ -z "${SLURM_JOB_ID:-}" ] || scontrol requeue "$SLURM_JOB_ID"
    exit 143
}
child=
trap stop TERM

stage() {
    run torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m training "$1" \
        --recipe "$recipe" --data "$out/tiles" --out "$out/$1" "${@:2}"
}

# Exit code 1: some slides failed and are named; the others are enough.
run python -m training tile --slides "$slides" --manifest "$manifest" --recipe "$recipe" \
    --workers "$cores" --out "$out/tiles" || { code=$? && [ $code -eq 1 ] || exit $code; }
stage repae --vae "$sd_vae" --encoder "$h0_mini" "${compile[@]}"
parts=(--vae "$out/repae" --encoder "$h0_mini")
stage latents "${parts[@]}"
stage distil "${parts[@]}" --latents "$out/latents" --teacher "$out/repae" "${compile[@]}"
stage decoder --vae "$out/repae" "${compile[@]}"
parts+=(--sit "$out/repae" --student "$out/distil" --decoder "$out/decoder")
export_model() {
    run python -m training export --recipe "$recipe" "${parts[@]}" --out "$out/model" "$@"
}
export_model
run python -m training evaluate --data "$out/tiles" --model "$out/model" --encoder "$h0_mini" \
    --sampler student --num "$num" --num-training $((10 * num)) --unseen "$out/tiles/unseen" \
    --extractors own alexnet --out "$out/report"
export_model --report "student=$out/report"  # again, with the numbers in the model card
