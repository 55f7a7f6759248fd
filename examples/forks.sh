#!/usr/bin/env bash
# One trunk, three anneals on different data, and their average; then new data for an old model, with and without a re-warm-up. Two tables: loss on
# documentation and on source code that no model has seen, and what the forks cost beside three runs from scratch.
#
#   bash examples/forks.sh WORK/            three minutes on one core; needs llmkit on the PATH
#   bash examples/forks.sh WORK/ 5k         the unit of tokens that everything is a multiple of (default 20k)
#
# Run it again and finished stages are passed over.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UNIT=${2:-20k}
mkdir -p "$1" && cd "$1"
case $UNIT in *k) UNIT=$((${UNIT%k} * 1000)) ;; esac
TRUNK=$((12 * UNIT)) FORK=$((3 * UNIT)) NEW=$((4 * UNIT))

# Documentation and source code of Python and its packages; test documents are of modules that no training document is of.
[ -e data/summary.json ] || python "$ROOT/examples/build_corpus.py" data --items 20 > /dev/null
[ -e test-code.jsonl ] || python - <<'PYTHON'
import json
for name, sources in (("docs", ("docs", "prose")), ("code", ("code",))):
    with open("data/test/sample.jsonl") as rows, open(f"test-{name}.jsonl", "w") as out:
        out.writelines(row for row in rows if json.loads(row)["source"] in sources)
PYTHON
llmkit vocab data/train/docs.jsonl data/train/code.jsonl --size 2048 --pattern llama-bpe -o tok/
llmkit tokenize data/train/docs.jsonl data/train/prose.jsonl -t tok/ -o docs/
llmkit tokenize data/train/code.jsonl -t tok/ -o code/
cat > model.json <<'JSON'
{"model_type": "qwen3", "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
 "head_dim": 32, "intermediate_size": 352, "max_position_embeddings": 256, "tie_word_embeddings": true, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
JSON
train() { llmkit train --batch-size 4 --seed 1 --resume --quiet "$@"; }

# The trunk sees both halves at a constant rate; each fork takes it down to zero on a mix of its own.
llmkit mix docs/:1 code/:1 --tokens $TRUNK --seed 1 --quiet -o mix/
train mix/ -m model.json --lr 2e-3 --schedule constant -o trunk/
for fork in docs:9:1 code:1:9 both:1:1; do
    IFS=: read -r name docs code <<< "$fork"
    llmkit mix docs/:"$docs" code/:"$code" --tokens $FORK --seed 2 --quiet -o "mix-$name/"
    llmkit anneal trunk/ "mix-$name/" --ramp sqrt --resume --quiet -o "fork-$name/"
done
llmkit average fork-docs/ fork-code/ fork-both/ --quiet -o average/

# New data for an old model: one that was trained on documentation alone, and has come to its end, goes on with source code. A twentieth of the new
# mix is documentation: without any the old is lost faster still.
llmkit mix docs/:1 --tokens $((6 * UNIT)) --seed 1 --quiet -o mix-old/
train mix-old/ -m model.json --lr 2e-3 -o old/
llmkit mix docs/:1 code/:19 --tokens $NEW --seed 3 --quiet -o mix-new/
train mix-new/ --from old/ -o went-on/
train mix-new/ --from old/ --rewarm --lr 2e-3 -o rewarmed/

llmkit eval trunk/ fork-docs/ fork-code/ fork-both/ average/ old/ went-on/ rewarmed/ --perplexity test-docs.jsonl --perplexity test-code.jsonl \
    --quiet -f -o scores.json
python - $TRUNK $FORK <<'PYTHON'
import json, sys
trunk, fork = map(int, sys.argv[1:])
models = json.load(open("scores.json"))["models"]
def table(title, names):
    print(f"\n{title:44}{'documentation':>14}{'source code':>14}   nats a token")
    for name, what in names.items():
        texts = models[f"{name}/"]["perplexity"]
        print(f"{what:44}" + "".join(f"{texts[f'test-{kind}.jsonl']['nats_per_token']:14.3f}" for kind in ("docs", "code")))
forks = {"fork-docs": "annealed on 90 % documentation", "fork-code": "annealed on 90 % source code", "fork-both": "annealed on both"}
table("one trunk", {"trunk": "trunk, at its constant rate", **forks, "average": "average of the three"})
spent, whole = trunk + 3 * fork, 3 * (trunk + fork)
print(f"tokens: {spent:,} for the three, {whole:,} for three runs from scratch ({spent / whole:.0%})")
table("new data for an old model", {"old": "documentation alone, to its end", "went-on": "then source code at the last rate", "rewarmed": "then source code, --rewarm"})
PYTHON
