#!/usr/bin/env bash
# Every stage of training on a CPU in minutes: from slides to a model folder that generates.
# usage: training/smoke.sh [OUT]     what it makes is of no use; full.sh is the real thing
# What it proves, on synthetic slides named as TCGA names its own, and on those of data/slides where
# there are some: slides are taken from a GDC manifest, sizes and MD5 compared; patients and sites
# are read from barcodes; a table keeps patients in one split; a frozen section is refused by its
# barcode, a slide without scale by name, and taken once the table states its scale. From the tiles
# every stage trains, is exported as one model, is judged on held-out slides, and generates.
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
    echo "$name,$name,train," >> "$out/slides/slides_with_scale.csv"
    printf '%s\t%s\t%s\t%s\treleased\n' "$name" "$name" "$(md5sum < "$slide" | cut -c -32)" \
        "$(wc -c < "$slide")" >> "$out/slides/gdc_manifest.txt"
done
tile() {
    run tile --slides "$out/slides" --manifest "$out/slides/gdc_manifest.txt" --check-md5 \
        --recipe smoke "$@"
}
# Exit code 1: slides failed, each by name, and the others are enough.
code=0
tile --slides-csv "$out/slides/slides.csv" --out "$out/tiles" 2> "$out/tile.err" || code=$?
cat "$out/tile.err" >&2
[ $code -eq 1 ]
grep -q "refused: TCGA-A1-0000-01A-01-TS1.svs: is a frozen, top section" "$out/tile.err"
grep -q "failed: TCGA-D4-0000-01Z-00-DX1: .*states neither microns/pixel" "$out/tile.err"
code=0 # 1 where a slide of data/slides lacks a scale
tile --slides-csv "$out/slides/slides_with_scale.csv" --out "$out/more_tiles" || code=$?
[ $code -le 1 ]
grep -q "^TCGA-D4-0000-01Z-00-DX1,taken,train,,D4,TCGA-D4-0000," "$out/more_tiles/slides.csv"
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
