#!/usr/bin/env bash
# The whole pipeline on this machine's own documentation, from raw text to an aligned, quantised, evaluated model.
#
#   bash examples/quickstart.sh                    about ten minutes on two cores, installation included
#   LLMKIT_TINY=1 bash examples/quickstart.sh      under three minutes: every stage, too little training to learn anything
#
#   LLMKIT_WORK=dir    where everything goes (default: quickstart/ in the checkout)
#   LLMKIT_VENV=dir    virtual environment to use or make (default: .venv in the checkout)
#   LLMKIT_MINUTES=n   minutes of training to aim at (default 5); a slower machine trains on fewer tokens
#
# Run it again and finished stages are passed over: every command compares the record inside its output with what it would make now. The corpus,
# the two pipes and the measured speed, which have no such record to compare with, are passed over where their output is there.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORK=${LLMKIT_WORK:-$ROOT/quickstart}
VENV=${LLMKIT_VENV:-$ROOT/.venv}
TINY=${LLMKIT_TINY:-0}
MINUTES=${LLMKIT_MINUTES:-5}
SECONDS=0
stage() { printf '\n\033[1m== %s\033[0m  (%d s)\n' "$*" "$SECONDS" >&2; }
[ -t 2 ] && [ -z "${NO_COLOR:-}" ] || stage() { printf '\n== %s  (%d s)\n' "$*" "$SECONDS" >&2; }

stage "Install"
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
# Either mark will do: what tests/run.sh installs has all of this in it.
if ! [ "$VENV/.llmkit-quickstart" -nt "$ROOT/pyproject.toml" ] && ! [ "$VENV/.llmkit-installed" -nt "$ROOT/pyproject.toml" ]; then
    "$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -e "$ROOT"
    touch "$VENV/.llmkit-quickstart"
fi
VENV=$(cd "$VENV" && pwd)
export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false
INSTALLED=$SECONDS
mkdir -p "$WORK" && cd "$WORK"

# ---------------------------------------------------------------- Text
stage "Build a corpus from Python's own documentation, sources and packages"
# Evaluation is bounded by the number of questions, sums and documents that each model is asked: all that there are took as long as the training.
# 200 items give a share of 36 % with a standard error of 3.4 %, three of which lie between it and chance. Of the sample of documents every third is
# read, about 50 kB; it is the same for all models, so that they compare more finely than the perplexity itself is known.
if [ "$TINY" = 1 ]; then ITEMS=20 EVERY=10; else ITEMS=200 EVERY=3; fi
[ -e data/summary.json ] || python "$ROOT/examples/build_corpus.py" data --items "$ITEMS" > /dev/null

# Documentation and prose in one pipe; source code by the same rules. Real duplicates go: the same licence lies in dozens of packages.
stage "Filter and remove near duplicates"
RULES=$ROOT/examples/quickstart/technical.toml
[ -e text.jsonl.zst ] || llmkit filter data/train/docs.jsonl data/train/prose.jsonl --preset "$RULES" --rejects dropped.jsonl.zst -j 2 |
    llmkit dedup --method minhash --rejects copies.jsonl.zst -o text.jsonl.zst
[ -e code.jsonl.zst ] || llmkit filter data/train/code.jsonl --preset "$RULES" -j 2 | llmkit dedup --method minhash -o code.jsonl.zst

# ---------------------------------------------------------------- Tokens
stage "Train a vocabulary, tokenise"
llmkit vocab text.jsonl.zst code.jsonl.zst --size 4096 --pattern qwen2 -o tok/
llmkit tokenize text.jsonl.zst -t tok/ -j 2 -o text/
llmkit tokenize code.jsonl.zst -t tok/ -j 2 -o code/

# ---------------------------------------------------------------- Model
# 2.4 million parameters. The shape is Qwen3's; any directory that this pipeline writes opens in transformers as it is.
cat > model.json <<'JSON'
{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 4096, "hidden_size": 192, "num_hidden_layers": 4,
 "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "intermediate_size": 512, "max_position_embeddings": 256,
 "tie_word_embeddings": true, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
JSON

# How much a machine can train in the time differs threefold: measure its speed once, then choose how many tokens and rows to train on.
stage "Measure this machine"
[ -e scale.sh ] || { python "$ROOT/examples/quickstart/scale.py" --tiny "$TINY" --minutes "$MINUTES" > scale.tmp && mv scale.tmp scale.sh; }
cat scale.sh >&2
source scale.sh

stage "Mix, pre-train: $TRAIN_TOKENS tokens"
llmkit mix text/:0.75 code/:0.25 --tokens "$TRAIN_TOKENS" --seed 1 -o mix/
llmkit train mix/ -m model.json --tokens "$TRAIN_TOKENS" --batch-size 4 --lr 3e-4 --schedule constant --seed 1 --resume -o run/

# The last stretch: more documentation, less code, the learning rate down to zero. The run's checkpoint brings its optimiser along.
stage "Anneal: $ANNEAL_TOKENS tokens"
llmkit mix text/:0.9 code/:0.1 --tokens "$ANNEAL_TOKENS" --seed 2 -o anneal-mix/
llmkit anneal run/ anneal-mix/ --tokens "$ANNEAL_TOKENS" --resume -o annealed/
llmkit average annealed/ --last 3 -o averaged/

# ---------------------------------------------------------------- Alignment
# Conversations: what does this function do (its docstring's first sentence), and sums of two digits with their working. The same sentences
# stand once more on their own, with no question before them: that is what lm-eval's PMI compares with.
stage "Fine-tune on $ANSWER_ROWS answers and $SUM_ROWS sums, $EPOCHS times"
for name in answers bare; do head -n "$ANSWER_ROWS" data/rows/$name.jsonl > $name.jsonl; done
head -n "$SUM_ROWS" data/rows/sums.jsonl > sums.jsonl
llmkit sft annealed/ answers.jsonl bare.jsonl sums.jsonl --epochs "$EPOCHS" --batch-size 4 --lr 1.5e-3 --resume -o sft/

# Preferences: the right docstring against that of another function, of the same length.
stage "Align on $PAIR_ROWS pairs"
head -n "$PAIR_ROWS" data/rows/pairs.jsonl > pairs.jsonl
llmkit dpo sft/ pairs.jsonl --beta 0.1 --batch-size 8 --lr 1e-4 --resume -o chat/

# ---------------------------------------------------------------- Release
stage "Quantise"
llmkit quantize chat/ --to int8 -o chat-int8/
llmkit quantize chat/ --to int4 --group-size 32 -o chat-int4/

# Base models are asked in plain text, the others as a user would ask them. Nothing of the tasks or the documents was trained on: they come from
# other modules, and the sums are held out in both orders.
stage "Evaluate"
TASKS="--tasks docstring_choice,two_digit_sums --include-path data/tasks --limit $ITEMS"
TEXTS="--perplexity heldout.jsonl"
[ -e heldout.jsonl ] || awk "NR % $EVERY == 1" data/test/sample.jsonl > heldout.jsonl
evaluate() { # OUTPUT [OPTION...] MODEL/...: again only where a model is newer than its scores
    local out=$1 model config; shift
    for model in "$@"; do
        case $model in -* | *[!/]) continue ;; esac
        config=$model/config.json
        [ -e "$config" ] || config=$model/final/config.json
        [ "$out" -nt "$config" ] || { llmkit eval "$@" $TEXTS --quiet -f -o "$out"; return; }
    done
}
evaluate averaged-scores.json averaged/
evaluate base-scores.json $TASKS run/ annealed/
evaluate chat-scores.json $TASKS --apply-chat-template sft/ chat/ chat-int8/ chat-int4/

stage "A conversation: questions about functions, and sums, that it has never seen"
llmkit generate chat/ data/prompts.jsonl --temperature 0 --max-tokens 80 --text --quiet

stage "Scores"
python "$ROOT/examples/quickstart/scores.py" data/summary.json base-scores.json averaged-scores.json chat-scores.json
printf '\nHow the last of them was made:  llmkit lineage %s/chat-int4/\n' "$WORK"
printf 'Done in %d s, %d s of it for the installation.\n' "$SECONDS" "$INSTALLED"
