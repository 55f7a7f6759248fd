#!/usr/bin/env bash
# Anneals one run on three different mixes and averages the results; then continues an old model on new data, with and
# without re-warming the learning rate. Prints held-out losses on documentation and source code, and the cost of the
# forks compared with three runs from scratch.
#
#   bash examples/forks.sh WORK/            three minutes on one core; needs llmkit on the PATH
#   bash examples/forks.sh WORK/ 5k         unit of tokens, of which all amounts are multiples (default 20k)
#
# A repeated run skips finished stages.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UNIT=${2:-20k}
mkdir -p "$1" && cd "$1"
case $UNIT in *k) UNIT=$((${UNIT%k} * 1000)) ;; esac
TRUNK=$((12 * UNIT)) FORK=$((3 * UNIT)) NEW=$((4 * UNIT))

# Documentation and source code of Python and its packages. Test documents come from modules without training documents.
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

# The trunk is trained on both halves at a constant learning rate; each fork decays it to zero on its own mix.
llmkit mix docs/:1 code/:1 --tokens $TRUNK --seed 1 --quiet -o mix/
train mix/ -m model.json --lr 2e-3 --schedule constant -o trunk/
for fork in docs:9:1 code:1:9 both:1:1; do
    IFS=: read -r name docs code <<< "$fork"
    llmkit mix docs/:"$docs" code/:"$code" --tokens $FORK --seed 2 --quiet -o "mix-$name/"
    llmkit anneal trunk/ "mix-$name/" --ramp sqrt --resume --quiet -o "fork-$name/"
done
llmkit average fork-docs/ fork-code/ fork-both/ --quiet -o average/

# New data for an old model: a finished run on documentation alone continues on source code. A twentieth of the new
# mix is documentation, since without any the old data is forgotten even faster.
llmkit mix docs/:1 --tokens $((6 * UNIT)) --seed 1 --quiet -o mix-old/
train mix-old/ -m model.json --lr 2e-3 -o old/
llmkit mix docs/:1 code/:19 --tokens $NEW --seed 3 --quiet -o mix-new/
train mix-new/ --from old/ -o continued/
train mix-new/ --from old/ --rewarm --lr 2e-3 -o rewarmed/

llmkit eval trunk/ fork-docs/ fork-code/ fork-both/ average/ old/ continued/ rewarmed/ --perplexity test-docs.jsonl --perplexity test-code.jsonl \
    --quiet -f -o scores.json
python - $TRUNK $FORK <<'PYTHON'
import json, sys
trunk, fork = map(int, sys.argv[1:])
models = json.load(open("scores.json"))["models"]
def table(title, names):
    print(f"\n{title:44}{'documentation':>14}{'source code':>14}   nats per token")
    for name, label in names.items():
        texts = models[f"{name}/"]["perplexity"]
        print(f"{label:44}" + "".join(f"{texts[f'test-{kind}.jsonl']['nats_per_token']:14.3f}" for kind in ("docs", "code")))
forks = {"fork-docs": "annealed on 90 % documentation", "fork-code": "annealed on 90 % source code", "fork-both": "annealed on both"}
table("one trunk", {"trunk": "trunk, at a constant rate", **forks, "average": "average of the three"})
forked, separate = trunk + 3 * fork, 3 * (trunk + fork)
print(f"tokens: {forked:,} for the three forks, {separate:,} for three runs from scratch ({forked / separate:.0%})")
table("new data for an old model", {"old": "documentation alone, finished", "continued": "then source code, at the last rate", "rewarmed": "then source code, --rewarm"})
PYTHON
