#!/usr/bin/env bash
# The main job, in a folder of its own: train on real digits, kill it, resume it, look at it, use it. Run: make demo
set -euo pipefail
folder=$(mktemp -d)
reports=$PWD/build/demo
mkdir -p "$reports"
children=()
tidy() { for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done; rm -rf "$folder"; }
trap tidy EXIT
cd "$folder"
began=$(date +%s)

say() { printf '\n\033[1;36m%s\033[0m\n' "$*"; }
run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say "1. A registry is a folder. It keeps every checkpoint, each distinct tensor once."
run registry init

say "2. Train LeNet5 on 1,438 handwritten digits, and pull the plug in the fourth epoch (kill -9)."
printf '\n\033[1m$ registry train lenet5 --epochs 8 &\033[0m\n'
registry train lenet5 --epochs 8 &
training=$!
children+=("$training")
until grep -qs 'Epochs\[4/8\] -- batch' .registry/runs/lenet5/run-1/run.log; do
  kill -0 "$training" 2>/dev/null || { echo "the training ended too early"; exit 1; }
  sleep 0.02
done
kill -9 "$training"
wait "$training" 2>/dev/null || true
children=()
echo "(killed)"

say "3. Everything that was saved is there: model, optimizer, epoch, loss, metrics, hyperparameters."
run registry history lenet5
run registry runs
run registry verify

say "4. Go on where it was. Random numbers, the order of the data and the schedule go on as well."
run registry train --resume lenet5

say "5. Is that the same as training in one go? Train once more without a stop, and compare."
run registry train lenet5 --epochs 8 --name uninterrupted --json > /dev/null
python - <<'PYTHON'
from registry import Registry

registry = Registry()
stopped, whole = (
    {path: digest for path, _, _, digest in registry[name].parameters() if not path.startswith(("rng", "loader"))}
    for name in ("lenet5", "uninterrupted")
)
assert stopped == whole
print(f"\nyes: all {len(whole)} tensors of model and optimizer are equal, bit for bit")
PYTHON

say "6. The best version by accuracy, measured again on the 359 digits that were held out."
run registry best lenet5 --by accuracy
run registry eval lenet5@best

say "7. What does it say of digits that it never saw?"
python - <<'PYTHON'
import sys

import numpy as np
from PIL import Image

from registry import Registry
from registry.models import data

accuracy = Registry()["lenet5@best"].metrics["accuracy"]
if accuracy < 0.97:
    sys.exit(f"accuracy {accuracy} is below 0.97")

test = data.load("digits").test
for i in (0, 40, 80):
    Image.fromarray((test[i][0][0].numpy() * 255).astype(np.uint8)).save(f"this-is-a-{int(test[i][1])}.png")
PYTHON
run registry predict lenet5@best this-is-a-*.png

say "8. TensorBoard has the curves, the graph, histograms, sample predictions and the embedding of both runs."
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
printf '\n\033[1m$ registry board --port %s &\033[0m\n' "$port"
registry board --port "$port" 2>/dev/null &
children+=("$!")
python - "$port" <<'PYTHON'
import json, sys, time, urllib.request

for _ in range(300):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/data/plugin/scalars/tags") as reply:
            runs = json.load(reply)
        if len(runs) == 3:
            break
    except OSError:
        pass
    time.sleep(0.1)
for name in sorted(runs):
    print(f"{name}: {', '.join(sorted(tag for tag in runs[name] if not tag.startswith('hparam')))}")
PYTHON
kill "${children[-1]}"
children=()

say "9. LeNet6 has one more layer. What of LeNet5 fits?"
run registry diff lenet5@best lenet6 || true
run registry plan lenet5@best lenet6 --expect 'fc.5.*=skip' --expect 'fc.7.*=new' --freeze loaded -o plan.json

say "10. Train LeNet6 on 200 digits only: from scratch, fine-tuned from LeNet5, and with the part of LeNet5 frozen."
few=(--epochs 5 --set samples=200 --set lr=0.003)
for how in scratch finetuned frozen; do
  from=()
  [[ $how == scratch ]] || from=(--from lenet5@best)
  [[ $how != frozen ]] || from+=(--freeze loaded)
  run registry train lenet6 --name "lenet6-$how" "${from[@]}" "${few[@]}" | grep -v -e 'batch\[' -e 'see it with'
done
run registry compare lenet6-scratch lenet6-finetuned lenet6-frozen
run registry verify --frozen lenet6-frozen:v1 lenet6-frozen
run registry log lenet6-frozen:v1
registry diff lenet5@best lenet6 --plan plan.json --format html -o "$reports/plan.html" >/dev/null || true
registry diff lenet6-finetuned:v1 lenet6-finetuned --values --format html -o "$reports/diff.html" >/dev/null || true
registry compare lenet6-scratch lenet6-finetuned lenet6-frozen --format html -o "$reports/compare.html" >/dev/null
printf '\nreports to open in a browser:\n  %s\n  %s\n  %s\n' "$reports/plan.html" "$reports/diff.html" "$reports/compare.html"

say "11. Data that is prepared once: a miss computes, a hit maps the result from the store."
cat > prepare.py <<'PYTHON'
import logging
import sys
from pathlib import Path

import torch
from PIL import Image

from registry import cached

logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)


@cached(key=["size"])
def enlarged(folder: Path, size: int) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.png")):
        image = torch.frombuffer(bytearray(Image.open(file).convert("L").tobytes()), dtype=torch.uint8)
        pixels = image.reshape(1, 1, 28, 28).float() / 255
        found[file.stem] = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic")
    return found


print(*enlarged(Path("images"), size=2048))
PYTHON
mkdir images && cp this-is-a-*.png images/
run python prepare.py
run python prepare.py
run registry cache list

say "12. Files in and out: hand the model to somebody, and take a checkpoint in. Equal tensors are not stored again."
run registry export lenet5@best lenet5.pt
run registry import lenet5.pt --name from-a-colleague
run registry ls
run registry show from-a-colleague
run registry status
run registry verify

say "Done in $(($(date +%s) - began)) seconds."
