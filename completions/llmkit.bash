# bash completion for llmkit. Source it, or put it where bash-completion looks for scripts.
_llmkit() {
    local current=${COMP_WORDS[COMP_CWORD]} words=''
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W 'extract filter filter-train dedup vocab tokenize mix train anneal average sft dpo quantize eval generate lineage --help --version' -- "$current"))
        return
    fi
    case "${COMP_WORDS[1]}" in
        extract) words='--engine --html-key --verify --time-limit --max-page-bytes --rejects --resume --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        filter) words='--preset --filter --rule --words --compat --languages --licence --respect-opt-out --quality --decontaminate --pii --annotate --stats --rejects --resume --engine --print-preset --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        filter-train) words='--label-key --epochs --dim --ngrams --rate --folds --text-key --id-key --on-bad-line --max-line-bytes --files-from --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        dedup) words='--method --rejects --resume --engine --annotate --keep --clusters --group --against --counts --no-counts --threshold --verify --no-verify --ngram --bands --rows --bits --key --normalise --index --index-full --stats --repeated --boilerplate --min-characters --length --unit --memory --temp-dir --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        vocab) words='--size -s --pattern -p --digits --min-frequency --sample --special --multiple --text-key --id-key --on-bad-line --max-line-bytes --files-from --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        tokenize) words='--tokenizer -t --source --allow-special --max-tokens-per-shard --decode --engine --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        mix) words='--tokens --plan --tokenizer -t --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        train) words='--model -m --tokens --batch-size -b --micro-batch-size --sequence-length --document-mask --no-document-mask --lr --schedule --warmup --min-lr --decay --weight-decay --clip --precision --threads --processes --resume --save-every --keep --heldout --eval-every --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        anneal) words='--tokens --step --batch-size -b --micro-batch-size --sequence-length --document-mask --no-document-mask --lr --weight-decay --clip --precision --threads --processes --resume --save-every --keep --heldout --eval-every --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        average) words='--method --last --weights --decay --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        sft) words='--epochs --chat-template --template --no-template --too-long --batch-size -b --micro-batch-size --sequence-length --lr --schedule --warmup --min-lr --decay --weight-decay --clip --precision --threads --processes --resume --save-every --keep --heldout --eval-every --text-key --id-key --on-bad-line --max-line-bytes --files-from --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        dpo) words='--beta --epochs --chat-template --too-long --batch-size -b --micro-batch-size --sequence-length --lr --schedule --warmup --min-lr --decay --weight-decay --clip --precision --threads --processes --resume --save-every --keep --text-key --id-key --on-bad-line --max-line-bytes --files-from --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        quantize) words='--to --group-size --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        eval) words='--tasks --include-path --perplexity --shots --limit --apply-chat-template --stride --dtype --device --text-key --id-key --on-bad-line --max-line-bytes --files-from --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        generate) words='--prompt -p --chat --text --max-tokens --samples --temperature --top-p --stop --truncate-prompt --batch-size -b --dtype --device --text-key --id-key --on-bad-line --max-line-bytes --files-from --plain --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
        lineage) words='--script --check --inputs --output -o --force -f --dry-run -n --quiet -q --verbose -v --jobs -j --config -c --seed --json --summary --print-config --debug --version -V -h --help' ;;
    esac
    case "$current" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
        *) COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
}
complete -o filenames -F _llmkit llmkit
