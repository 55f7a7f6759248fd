#!/usr/bin/env bash
# A thousand files on ten machines: extract, filter, deduplicate and tokenize on a Ray cluster.
#
#   bash examples/ray_cluster.sh CRAWL STORE TOKENIZER
#
# CRAWL is a directory of WARC files, STORE the directory of the results. All machines must see both under the same
# name: a shared directory, or a URL that fsspec supports (s3://bucket/crawl/). Before, on each machine:
#
#   pip install 'llmkit[web,ray]'
#   ray start --head                        # on the first machine
#   ray start --address=FIRST:6379          # on the others
#
# RAY_ADDRESS selects a cluster; without it, Ray starts on this machine only. The output is byte-identical to that of
# one process.
#
# With -o DIRECTORY/ each file is one task, read, processed and written on any machine, so that only counts pass
# through this one. --resume makes only the missing outputs, after a kill or for new files. With a single output,
# chunks are processed on all machines and written, in order, by this one. dedup keeps lines, band keys and shingles
# where they were computed, and joins them in two shuffles. Lost workers and machines are replaced, and their work is
# repeated.
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
