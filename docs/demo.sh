#!/usr/bin/env bash
# The main job in a folder of its own: make two checkpoints, import them, look at them, verify. Run: make demo
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

python - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
)
head = net[-1]
optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
for epoch in (1, 2):  # two epochs on random images, with all layers frozen but the last
    loss = nn.functional.cross_entropy(net(torch.randn(64, 1, 28, 28)), torch.randint(10, (64,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    torch.save(
        {"epoch": epoch, "loss": loss.item(), "model": net.state_dict(), "optimizer": optimizer.state_dict()},
        f"epoch{epoch}.pt",
    )
PYTHON

run ls -l
run registry init
run registry import epoch1.pt epoch2.pt --name lenet5
run registry list lenet5
run registry alias lenet5:v2 production
run registry show lenet5@production --params
run registry status
run registry verify
run registry export lenet5@production back.pt
run registry export lenet5@production model.safetensors
python - <<'PYTHON'
import torch

before, after = (torch.load(name, weights_only=True) for name in ("epoch2.pt", "back.pt"))
assert before.keys() == after.keys()
assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
print("\nback.pt holds what epoch2.pt held, bit for bit")
PYTHON
