#!/usr/bin/env bash
# Nightly refresh of a corpus, for cron: new files only, one run at a time, bad lines and files quarantined.
#
#   15 2 * * *  llmkit-user  bash /path/to/examples/nightly_refresh.sh /data/incoming /data/store /data/tok
#
# INCOMING is a drop box of *.jsonl, *.jsonl.gz and *.jsonl.zst files, which are only read. A file is new if its
# content is new, whatever its name; it is processed once it has not changed for SETTLE minutes (default 5). Written
# to STORE:
#   clean/ID.jsonl.zst           each batch of new files, filtered
#   unique/ID.jsonl.zst          its documents that no earlier batch had
#   shards/ID/                   their tokens; `llmkit mix STORE/shards/*` combines all nights
#   seen.duckdb                  index of the documents kept so far, so that a night costs only its new documents
#   quarantine/ID.jsonl          unreadable lines and damaged files, with file, line and reason
#   rejects/ID.jsonl.zst         documents dropped by the filter, with the reason
#   seen.txt, log.jsonl          digests of the processed files; counts, one line per run
# Exit codes: 0 done or nothing new; 75 another run is active; otherwise that of the failed llmkit command. A failed
# or killed run does not change seen.txt, so the next run processes the same files again.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: nightly_refresh.sh INCOMING STORE TOKENIZER" >&2
    exit 2
fi
INCOMING=$1 STORE=$2 TOKENIZER=$3
mkdir -p "$STORE"/{clean,quarantine,rejects,shards,unique}

exec 9> "$STORE/.refresh.lock"
if ! flock --nonblock 9; then
    echo "nightly_refresh: another run is active in $STORE" >&2
    exit 75
fi

touch "$STORE/seen.txt"
files=() digests=()
while IFS= read -r -d '' file; do
    if ! digest=$(sha256sum < "$file" | cut -d' ' -f1); then
        continue # its error is on stderr; the next run tries again
    fi
    case "$(cat "$STORE/seen.txt") ${digests[*]-}" in
        *"$digest"*) ;; # processed before, perhaps under another name
        *) files+=("$file") digests+=("$digest") ;;
    esac
done < <(find "$INCOMING" -type f \( -name '*.jsonl' -o -name '*.jsonl.gz' -o -name '*.jsonl.zst' \) -mmin "+${SETTLE:-5}" -print0 | sort -z)
if [ ${#files[@]} -eq 0 ]; then
    exit 0 # silently: cron mails any output
fi

# The batch is named after its content, so that a run that was killed and repeated uses the same names.
ID=$(printf '%s\n' "${digests[@]}" | sort | sha256sum | cut -c1-16)
counts=$(mktemp) && trap 'rm -f "$counts".*' EXIT
rm -f "$counts" "$STORE/quarantine/$ID.jsonl"

# -f replaces what a failed run left under these names.
# The complete lines of a damaged file are processed, and the rest when a complete copy arrives, which is a new file.
llmkit filter "${files[@]}" --preset "${PRESET:-gopher}" --on-bad-line "quarantine=$STORE/quarantine/$ID.jsonl" \
    --on-bad-file "quarantine=$STORE/quarantine/$ID.jsonl" \
    --rejects "$STORE/rejects/$ID.jsonl.zst" --summary "$counts.filter" -q -f -o "$STORE/clean/$ID.jsonl.zst"
llmkit dedup "$STORE/clean/$ID.jsonl.zst" --index "$STORE/seen.duckdb" --summary "$counts.dedup" -q -f -o "$STORE/unique/$ID.jsonl.zst"
llmkit tokenize "$STORE/unique/$ID.jsonl.zst" -t "$TOKENIZER" --summary "$counts.tokenize" -q -f -o "$STORE/shards/$ID"

printf '%s\n' "${digests[@]}" >> "$STORE/seen.txt"
printf '{"batch": "%s", "files": %d, "filter": %s, "dedup": %s, "tokenize": %s}\n' \
    "$ID" "${#files[@]}" "$(cat "$counts.filter")" "$(cat "$counts.dedup")" "$(cat "$counts.tokenize")" >> "$STORE/log.jsonl"
tail -n 1 "$STORE/log.jsonl"
