#!/usr/bin/env bash
# Text to tokens to training order: a vocabulary from this machine's own documentation and sources, what it costs twenty languages, shards, and a mix
# with multipliers like K2's (examples/k2.toml). Ends with the proof that `train` sees the same batches from a plan and from the mix written out.
#
#   bash examples/tokens.sh udhr.jsonl.zst WORK/          under a minute; needs llmkit on the PATH
#
# The first file holds documents with a field `key`, the name of a language: the Universal Declaration of Human Rights in as many as there are.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TEXTS=$(realpath "$1")
mkdir -p "$2" && cd "$2"
LANGUAGES="eng deu_1996 fra spa por_PT ita nld swe pol rus ukr ell_monotonic tur arb heb hin ben tha jpn cmn_hans"

# Documentation, prose around it, and source code of Python and its packages.
[ -e data/summary.json ] || python "$ROOT/examples/build_corpus.py" data --items 20 > /dev/null
DOCS=data/train/docs.jsonl PROSE=data/train/prose.jsonl CODE=data/train/code.jsonl

llmkit vocab $DOCS $PROSE $CODE --size 8192 --pattern llama-bpe -o tok/

# What each language costs: tokens a word and bytes a token, and a warning where a language costs over 1.5 times what English does.
[ -e languages.jsonl ] || python - "$TEXTS" "$LANGUAGES" > languages.jsonl <<'PYTHON'
import io, json, sys
import zstandard
with open(sys.argv[1], "rb") as raw:
    for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), encoding="utf-8"):
        if json.loads(line)["key"] in sys.argv[2].split():
            sys.stdout.write(line)
PYTHON
llmkit vocab report tok/ --text languages.jsonl --by key --baseline eng -f -o fertility.json

# Half of the code is stored out of order, so that a model learns to fill in what is missing.
llmkit tokenize $DOCS -t tok/ --source docs -o docs/
llmkit tokenize $PROSE -t tok/ --source prose -o prose/
llmkit tokenize $CODE -t tok/ --source code --fim-rate 0.5 --fim-spm-rate 0.5 --seed 1 -o code/

# Small and good sources several times, large ones in part; half a percent of each source is held out, by what it says.
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
