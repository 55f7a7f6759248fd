#!/usr/bin/env bash
# Text to tokens to training order: trains a tokenizer on this machine's own documentation and source code, measures
# its fertility in twenty languages, and makes shards and a mix with multipliers like those of K2 (examples/k2.toml).
# Finally checks that `train` gets the same batches from a plan and from the written mix.
#
#   bash examples/tokens.sh udhr.jsonl.zst WORK/          under a minute; needs llmkit on the PATH
#
# The first file has documents with a field `key`, the name of a language: the Universal Declaration of Human Rights
# in many languages.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TEXTS=$(realpath "$1")
mkdir -p "$2" && cd "$2"
LANGUAGES="eng deu_1996 fra spa por_PT ita nld swe pol rus ukr ell_monotonic tur arb heb hin ben tha jpn cmn_hans"

# Documentation, prose around it, and source code of Python and its packages.
[ -e data/summary.json ] || python "$ROOT/examples/build_corpus.py" data --items 20 > /dev/null
DOCS=data/train/docs.jsonl PROSE=data/train/prose.jsonl CODE=data/train/code.jsonl

llmkit vocab $DOCS $PROSE $CODE --size 8192 --pattern llama-bpe -o tok/

# Tokens per word and bytes per token of each language, with a warning for those that need over 1.5 times the tokens
# of English.
[ -e languages.jsonl ] || python - "$TEXTS" "$LANGUAGES" > languages.jsonl <<'PYTHON'
import io, json, sys
import zstandard
with open(sys.argv[1], "rb") as raw:
    for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), encoding="utf-8"):
        if json.loads(line)["key"] in sys.argv[2].split():
            sys.stdout.write(line)
PYTHON
llmkit vocab report tok/ --text languages.jsonl --by key --baseline eng -f -o fertility.json

# Half of the code documents are split for fill-in-the-middle.
llmkit tokenize $DOCS -t tok/ --source docs -o docs/
llmkit tokenize $PROSE -t tok/ --source prose -o prose/
llmkit tokenize $CODE -t tok/ --source code --fim-rate 0.5 --fim-spm-rate 0.5 --seed 1 -o code/

# Small, good sources are repeated and large ones subsampled; half a percent of each source is held out, by content.
cat > stages.toml <<'TOML'
[sources]
docs = "docs"
prose = "prose"
code = "code"

[[stage]]
name = "like K2"
mix = { docs = "x6", prose = "x3", code = "x0.5" }
TOML
llmkit mix --stages stages.toml --holdout 0.5% --seed 1 -o mix/
llmkit mix --stages stages.toml --holdout 0.5% --seed 1 --plan -o plan/ --quiet

python "$ROOT/examples/batches.py" mix/ plan/
