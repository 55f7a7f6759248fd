#!/usr/bin/env bash
# Nightly refresh of a corpus: new files only, one run at a time, bad lines put aside. For cron:
#
#   15 2 * * *  llmkit-user  bash /path/to/examples/nightly_refresh.sh /data/incoming /data/store /data/tok
#
# INCOMING gets *.jsonl, *.jsonl.gz, *.jsonl.zst files dropped into it; nothing in it is touched. A file counts as new by its content, not by its
# name, once it has not changed for SETTLE minutes (default 5). STORE is filled with
#   clean/ID.jsonl.zst           each batch of new files, filtered
#   unique/ID.jsonl.zst          of those, what no earlier batch had; shards/ID/ their tokens: `llmkit mix STORE/shards/*` takes all nights together
#   seen.duckdb                  what the batches have kept: a night costs what is new, however much there is
#   quarantine/ID.jsonl          lines that could not be read, with file, line and reason
#   rejects/ID.jsonl.zst         what the filter dropped, with its reason
#   seen.txt, log.jsonl          digests of the files taken in; one line of counts a run
# Exit codes: 0 done or nothing new, 75 another run is at work, anything else is the code of the llmkit command that failed. A run that failed or
# was killed leaves seen.txt alone, so the next one takes the same files again.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: nightly_refresh.sh INCOMING STORE TOKENIZER" >&2
    exit 2
fi
INCOMING=$1 STORE=$2 TOKENIZER=$3
mkdir -p "$STORE"/{clean,quarantine,rejects,shards,unique}

exec 9> "$STORE/.refresh.lock"
if ! flock --nonblock 9; then
    echo "nightly_refresh: another run is at work in $STORE" >&2
    exit 75
fi

touch "$STORE/seen.txt"
files=() digests=()
while IFS= read -r -d '' file; do
    digest=$(sha256sum < "$file" | cut -d' ' -f1)
    case "$(cat "$STORE/seen.txt") ${digests[*]-}" in
        *"$digest"*) ;; # taken in before, perhaps under another name
        *) files+=("$file") digests+=("$digest") ;;
    esac
done < <(find "$INCOMING" -type f \( -name '*.jsonl' -o -name '*.jsonl.gz' -o -name '*.jsonl.zst' \) -mmin "+${SETTLE:-5}" -print0 | sort -z)
if [ ${#files[@]} -eq 0 ]; then
    exit 0 # quiet: cron mails what is printed
fi

# The batch is named after what is in it: a run that was killed and starts over makes the same names.
ID=$(printf '%s\n' "${digests[@]}" | sort | sha256sum | cut -c1-16)
counts=$(mktemp) && trap 'rm -f "$counts".*' EXIT
rm -f "$counts" "$STORE/quarantine/$ID.jsonl"

# -f: what a failed run left under these names is made again.
llmkit filter "${files[@]}" --preset "${PRESET:-gopher}" --on-bad-line "quarantine=$STORE/quarantine/$ID.jsonl" \
    --rejects "$STORE/rejects/$ID.jsonl.zst" --summary "$counts.filter" -q -f -o "$STORE/clean/$ID.jsonl.zst"
llmkit dedup "$STORE/clean/$ID.jsonl.zst" --index "$STORE/seen.duckdb" --summary "$counts.dedup" -q -f -o "$STORE/unique/$ID.jsonl.zst"
llmkit tokenize "$STORE/unique/$ID.jsonl.zst" -t "$TOKENIZER" --summary "$counts.tokenize" -q -f -o "$STORE/shards/$ID"

printf '%s\n' "${digests[@]}" >> "$STORE/seen.txt"
printf '{"batch": "%s", "files": %d, "filter": %s, "dedup": %s, "tokenize": %s}\n' \
    "$ID" "${#files[@]}" "$(cat "$counts.filter")" "$(cat "$counts.dedup")" "$(cat "$counts.tokenize")" >> "$STORE/log.jsonl"
tail -n 1 "$STORE/log.jsonl"
