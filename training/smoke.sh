#!/usr/bin/env bash
# Every stage of training on a CPU in minutes: from slides to a model folder that generates.
# usage: training/smoke.sh [OUT]     what it makes is of no use; full.sh is the real thing
set -euo pipefail
out=${1:-smoke}
run() {
    echo "== python -m training $*" >&2
    python -m training "$@"
}
stage() { run "$1" --recipe smoke --data "$out/tiles" --out "$out/$1" "${@:2}" > "$out/$1.log"; }

mkdir -p "$out"
python examples/make_slides.py "$out/slides"
for slide in data/slides/*.{svs,tif}; do # real ones beside the synthetic ones, where there are some
    [ -e "$slide" ] || continue
    name=$(basename "$slide")
    ln -sf "$(realpath "$slide")" "$out/slides/$name"
    echo "$name,$name,train" >> "$out/slides/slides.csv"
done
# Exit code 1: slides were refused, each by name, as a frozen section or one without a scale is.
run tile --slides "$out/slides" --slides-csv "$out/slides/slides.csv" --recipe smoke \
    --out "$out/tiles" || { code=$? && [ $code -eq 1 ] || exit $code; }
stage vae
stage encoder
parts=(--vae "$out/vae" --encoder "$out/encoder")
stage latents "${parts[@]}"
stage sit "${parts[@]}" --latents "$out/latents"
stage repae "${parts[@]}" --sit "$out/sit"
parts=(--vae "$out/repae" --encoder "$out/encoder")
run latents --recipe smoke --data "$out/tiles" --out "$out/final_latents" "${parts[@]}"
stage distil "${parts[@]}" --latents "$out/final_latents" --teacher "$out/repae"
stage decoder --vae "$out/repae"
run export --recipe smoke "${parts[@]}" --sit "$out/repae" --student "$out/distil" \
    --decoder "$out/decoder" --out "$out/model"
run evaluate --data "$out/tiles" --model "$out/model" --out "$out/report" \
    --extractors own --sampler student --steps 2 --num 48 --unseen "$out/tiles/unseen" \
    > "$out/evaluate.log"
python -c "
import sys
from cytosyn_aug import TileGenerator
tiles = TileGenerator.from_pretrained(sys.argv[1]).sample(per_condition=2, seed=0)
print('generated', tuple(tiles.shape), 'by', sys.argv[1])
" "$out/model"
