#!/usr/bin/env bash
# A thousand files on ten machines: extract, filter, deduplicate and tokenize on a Ray cluster.
#
#   bash examples/ray_cluster.sh CRAWL STORE TOKENIZER
#
# CRAWL is a directory of WARC files, STORE where the results go; every machine sees both under the same name: a shared
# directory, or a URL that fsspec knows (s3://bucket/crawl/). On each machine: pip install 'llmkit[web,ray]'. Before:
#
#   ray start --head                        # on the first machine
#   ray start --address=FIRST:6379          # on the others
#
# RAY_ADDRESS names a cluster; without one, Ray starts on this machine alone. The bytes are those of one process.
#
# With -o DIRECTORY/ each file is one task: read, processed and written wherever there is room, so nothing but counts
# passes through this machine. --resume makes only what is missing: after a kill, or for new files. With one output,
# chunks are processed everywhere, come back in order, and this machine writes. dedup keeps lines, band keys and
# shingles where they were computed, and brings together what has to meet in two shuffles. Lost workers and machines are
# replaced, and their work is repeated.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: ray_cluster.sh CRAWL STORE TOKENIZER" >&2
    exit 2
fi
CRAWL=${1%/} STORE=${2%/} TOKENIZER=$3
case $STORE in *://*) ;; *) mkdir -p "$STORE" ;; esac

llmkit extract "$CRAWL"/*.warc.gz --engine ray -o "$STORE/pages/" --resume
llmkit filter "$STORE/pages/" --preset fineweb --engine ray -o "$STORE/good/" --resume
llmkit dedup "$STORE/good/" --engine ray -o "$STORE/unique.jsonl.zst"
llmkit tokenize "$STORE/unique.jsonl.zst" -t "$TOKENIZER" --engine ray -o "$STORE/shards/"
