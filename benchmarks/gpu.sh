#!/usr/bin/env bash
# All figures of a GPU, in one command: about two hours on one card, once the text is cleaned and encoded (a whole dump takes hours).
# The text must be large, such as a Wikipedia dump: in these minutes a sample would be read hundreds of times.
#     pip install -c constraints.txt -e ".[dev,bench]" && benchmarks/gpu.sh TEXT
set -euo pipefail
text=$(realpath "${1:?the text to train on, such as enwiki-latest-pages-articles.xml.bz2}")
cd "$(dirname "$0")/.."
pytest -m gpu
python benchmarks/train_step.py --shape 124M --device cuda    # tokens/s and MFU, beside Hugging Face and a plain SDPA GPT
python benchmarks/train_step.py --memory --device cuda        # peak memory of a step
python benchmarks/decode.py --device cuda                     # tokens/s beside Hugging Face's generate
python benchmarks/serve.py --shape 124M                       # requests/s and latency of the server
python benchmarks/time_to_loss.py --device cuda --compile --seconds 1200 --seeds 0 --variants "hugging face" nanochat \
    --data "$text" --n-layer 12 --n-head 12 --n-embd 768 --tokens 1024 --batch-size 8 --rates 3e-4 6e-4 1e-3
[ -e out/pretrained/last ] || python train.py
python benchmarks/finetune_epoch.py
python benchmarks/methods.py                                  # full fine-tuning, LoRA, freezing
python benchmarks/card_memory.py --check                      # which GPT-2 fits which card: computed, and tried
