#!/usr/bin/env bash
# All figures of a GPU, in one command: about an hour on one card. Results land in benchmarks/results/ and docs/.
#     pip install -c constraints.txt -e ".[dev,bench]" && benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
pytest -m gpu
python benchmarks/train_step.py --shape 124M --device cuda    # tokens/s and MFU, beside Hugging Face and a plain SDPA GPT
python benchmarks/train_step.py --memory --device cuda        # peak memory of a step
python benchmarks/time_to_loss.py --device cuda --compile --seconds 1200 --seeds 0 --only hf \
    --n-layer 12 --n-head 12 --n-embd 768 --tokens 1024 --batch-size 8 --rates 6e-4
python benchmarks/time_to_loss.py --device cuda --compile --seconds 1200 --seeds 0 --only ours \
    --n-layer 12 --n-head 12 --n-embd 768 --tokens 1024 --batch-size 8
[ -d out/pretrained ] || python train.py
python benchmarks/finetune_epoch.py
