#!/usr/bin/env bash
# The whole pipeline in a minute, in a folder of its own: bash docs/tour.sh (CI runs it).
set -euo pipefail
cd "$(mktemp -d)"
TINY="--preset tiny-attention --set model.context_length=128 --set train.batch_tokens=1024 --set train.eval.tokens=4096"

lm tokenize --dataset stdlib --max-documents 60 --tokenizer train:1024 --out shards/tour  # text -> verified shards
lm validate shards/tour                                                # check every byte of them
lm split shards/tour --val-docs 6                                      # train/ and val/ views, no token copied
lm inspect shards/tour --token 12345                                   # which document is this token from?
lm plan $TINY --data shards/tour --tokens 12k                          # what will it cost?
lm train runs/a $TINY --data shards/tour --steps 12                    # train; killed at any moment, run it again
lm train runs/a $TINY --data shards/tour --steps 12                    # nothing left to do
lm train runs/b $TINY --data shards/tour --steps 12 --set model.gate=elementwise  # another architecture: one setting
lm eval runs/a runs/b                                                  # bits per byte, and is the difference real?
lm generate --checkpoint runs/a --prompt "import " --max-tokens 20     # let it write
lm plot runs/a runs/b --out curves.svg                                 # draw both
lm export runs/a --out exported --check                                # a Hugging Face model with equal logits
lm import-model exported --out runs/c                                  # and back again
lm info exported                                                       # what it is, and the chain down to the source files
