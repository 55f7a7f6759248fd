"""Does the script of every command make the same bytes again, with every option that decides content?

    python tests/bench/scripts.py [--only WORD] [--socket SOCKET]

Runs the LINES in a directory of tiny originals, one artefact after another. The script of each artefact that carries a
record (`lineage --script`, with --allow-code) then runs in a fresh directory that holds only the originals which the
script asks for, by digest. Every byte of what it makes is compared, but for the log of a run. An option that decides the
content and was given must stand in the script, unless its command is known to record it in another form.

The options come from the commands' own table (`llmkit help --json`): one that decides the content, and is given in no
line and excused by no row of EXCUSED, is reported as uncovered. Exit code 1 where a script makes other bytes, lacks an
option, or an option is uncovered.

Cost: 20 minutes on a busy machine, since a script repeats what its artefact was made from.
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from random_pipelines import MODEL, ROOT, WORDS, preloaded, repeat

SEEN = "--index seen.duckdb"
ROWS = "--text-key body --id-key key --on-bad-line skip --max-line-bytes 90k --seed 3"
SHORT = "-b 2 --micro-batch-size 1 --sequence-length 16 --seed 5"
RATES = "--lr 1e-3 --schedule wsd --warmup 0.2 --final-lr-fraction 0.3 --decay 0.4 --decay-shape sqrt"
STEP = "--weight-decay 0.05 --clip 0.5 --precision bf16 --max-rollbacks 3"

# Each line makes an artefact, `-o`, and perhaps `--rejects`; the words before the first `-` that are no paths are the
# command. Later lines read what earlier ones made.
LINES = f"""
extract pages/ --engine plain --time-limit 20 --max-page-bytes 1M --rejects none.jsonl.zst -o plain.jsonl.zst
extract pages.jsonl --html-key page --id-key key --on-bad-line skip --max-line-bytes 90k --seed 3 -o rows.jsonl.gz
extract web.warc --verify --engine trafilatura -o web.parquet
cat docs.jsonl | llmkit filter --preset c4 --preset tiny.toml -o piped.jsonl.zst
filter docs.jsonl --filter length --rule length.min_characters=120 --rejects short.jsonl.zst -o long.jsonl.zst
filter docs.jsonl --preset gopher --words whitespace --annotate -o annotated.jsonl.zst
filter docs.jsonl --preset fineweb --compat datatrove -o compatible.parquet
filter odd.jsonl --filter length {ROWS} -o keyed.jsonl.zst
filter docs.jsonl --licence cc-by,cc0 --respect-opt-out -o free.jsonl.zst
filter docs.jsonl --languages en,de --pii redact -o english.jsonl.zst
filter docs.jsonl --quality good.bin --decontaminate items.jsonl --rejects bad.jsonl.gz -o better.jsonl.zst
filter docs.jsonl --filter length --rule rules.py:short --rule length.min_characters=90 -o own.jsonl.zst
filter docs.parquet --pii annotate --filter length -o marked.parquet
dedup docs.jsonl --annotate --keep longest --clusters components --threshold 0.6 --no-verify --ngram 3 -o a.jsonl.zst
dedup docs.jsonl --group source --keep best:score --bands 10 --rows 4 --bits 61 --shingle characters -o b.jsonl.zst
dedup docs.jsonl --preset code --rejects copies.jsonl.zst --seed 2 -o c.jsonl.zst
dedup docs.jsonl --method exact --key source --normalise case,accents --no-counts -o d.jsonl.zst
dedup docs.jsonl --method exact,minhash --normalise loose --against more.jsonl -o e.parquet
dedup docs.jsonl --method lines --repeated 3 --min-characters 4 --boilerplate lines.txt -o f.jsonl.zst
dedup docs.jsonl --method paragraphs --normalise case -o g.jsonl.zst
dedup docs.jsonl --method substring --length 6 --unit bytes -o h.jsonl.zst
dedup odd.jsonl {ROWS} -o i.jsonl.zst
dedup docs.jsonl {SEEN} --index-full -o night1.jsonl.zst
dedup more.jsonl {SEEN} --index-full --rejects night2r.jsonl.zst -o night2.jsonl.zst
dedup docs.jsonl more.jsonl {SEEN} --index-full --keep longest -o night3.jsonl.zst
vocab docs.jsonl --size 320 --pattern qwen2 --digits single --min-frequency 3 --multiple 16 -o t1
vocab odd.jsonl --size 340 --sample 0.9 --special '[A]' --special '<think>' {ROWS} -o t2
vocab extend tok more.jsonl --add 9 --min-frequency 3 --multiple 8 -o wider
vocab extend tok odd.jsonl --add 4 {ROWS} -o wider2
vocab extend base --tokens words.txt --model base -o bigger
vocab convert ranks.tiktoken --pattern qwen2 --special '<s>' --special '<p>=262' --eos '<e>' --seed 2 -o converted
tokenize docs.jsonl -t tok --eos '<|pad|>' --source web --bos --allow-special -o s1
tokenize docs.jsonl -t tok --source-key license --max-tokens-per-shard 300 --keep-duplicates -o s2
tokenize odd.jsonl -t tok/tokenizer.json {ROWS} -o s3.arrow
tokenize docs.jsonl -t tok --fim-rate 0.5 --fim-spm-rate 0.3 --fim-source docs --seed 4 -o s4
tokenize packed.npy.bin --from nanogpt -t tok --source nano -o s5
tokenize corpus.idx --from megatron -t tok --max-tokens-per-shard 200 -o s6
tokenize s2 --to jsonl -o ids.jsonl.zst
tokenize s2 --decode -o text.jsonl.zst
tokenize docs.jsonl -t tok --to jsonl -o ids2.jsonl.gz
mix s2:0.7 s4:0.3 --tokens 700 --seed 1 --cut-last --shuffle block -o m1
mix s2 s4 --pack best-fit --sequence-length 32 --holdout 20% --shuffle none -o best
tokenize best --to jsonl --lossy -o lossy.jsonl.zst
mix s2:x2 s4 --plan -o m2.toml
mix --stages stages.toml -o m3
mix s2 --weight-by duplicates --weight-map 1:1,2-9:2 -o m4
mix docs.jsonl:1 more.jsonl:2 --tokens 900 -t tok --seed 7 -o m5.jsonl.zst
mix docs.jsonl --weight-by score --weight-map 1:1,2-9:2 -o m6.parquet
mix odd.jsonl {ROWS} -o m7.jsonl.zst
train s2 -m model.json --tokens 256 {SHORT} {RATES} {STEP} --betas 0.8,0.9 --z-loss 1e-4 --no-document-mask -o r1
train m1 -m llama-tiny --tokens 160 --optimizer muon --batch-warmup 1:32,2:64 --length-warmup 8:32 {SHORT} -b 4 -o r2
train s2 --from base --tokens 96 --rewarm --lr 1e-4 {SHORT} -o r3
train s2 -m model.json --recipe steps.toml --tokens 256 {SHORT} --heldout new=more-ids -o r4
anneal r1 s4 --tokens 96 --step 2 --lr 1e-4 --ramp sqrt --final-lr-fraction 0.1 {SHORT} {STEP} --z-loss 1e-4 -o an1
anneal r1 s4 --tokens 64 --no-document-mask {SHORT} -o an2
average base other --method weighted --weights 1,3 -o av1
average base other --method ema --decay 0.7 -o av2
average base other --method slerp --t 0.3 -o av3
average other third --method task --base base --scale 0.5 -o av4
average other third --method ties --base base --density 0.4 --weights 1,2 -o av5
average other third --method dare --base base --density 0.4,0.6 --seed 9 -o av6
average other third --method dare-ties --base base --density 0.5 -o av7
average base other third --method greedy --heldout more.jsonl -o av8
average r1 --last 2 -o av9
sft base chat.jsonl --lossy --train-on turns --epochs 2 --chat-template turns.jinja --too-long truncate {SHORT} --sequence-length 40 {RATES} {STEP} --z-loss 1e-4 -o f1
sft base renamed.jsonl --map messages=data.chat,system=about --neftune 5 -b 2 --no-pack --group-by-length -o f3
sft base turns.jsonl --no-template --too-long truncate-turns {ROWS} -o f2
sft base chat.jsonl:x1.5 turns.jsonl:0.1k --epochs 2 {ROWS} -o f6
dpo base pairs.jsonl:0.5 odd-pairs.jsonl:0.2 {ROWS} -o p6
dpo base pairs.jsonl --lossy --beta 0.3 --epochs 2 --chat-template turns.jinja --too-long truncate {SHORT} --sequence-length 40 {RATES} {STEP} -o p1
dpo base renamed-pairs.jsonl --map chosen=good --map rejected=bad -b 2 --group-by-length -o p3
sft base chat.jsonl --lora 3 --lora-alpha 5 --lora-targets attention --dora --rslora --lora-plus 4 {SHORT} --sequence-length 40 --too-long truncate -o f4
average f4 --merge-adapter -o av10
sft base chat.jsonl --lossy --chat-template llama-3 --lora 2 {SHORT} --sequence-length 40 --too-long truncate -o f5
average f5 --merge-adapter -o av11
dpo base pairs.jsonl --lora 2 --lora-alpha 3 --lora-targets q_proj,v_proj --dora --rslora --lora-plus 2 {SHORT} --sequence-length 40 --too-long truncate -o p4
dpo base pairs.jsonl --lossy --chat-template phi-4 {SHORT} --sequence-length 40 --too-long truncate -o p5
dpo base odd-pairs.jsonl {ROWS} -o p2
quantize base --to int4 --group-size 16 --seed 1 -o q1
quantize base -o q2
quantize f2 --to int4 -o q3
generate base prompts.jsonl --chat --max-tokens 5 --samples 2 --temperature 1.1 --top-p 0.9 --stop e -b 3 -o g1.jsonl.zst
generate q1 -p 'a river; $(id)' -p "it's" --truncate-prompt --max-tokens 60 --dtype bf16 --seed 2 -o g2.jsonl.gz
generate p3 -p 'a river' --max-tokens 3 -o g4.jsonl.zst
generate base odd-prompts.jsonl --control-tokens --max-tokens 3 {ROWS} -o g3.parquet
"""
# Commands whose outputs have no room for a record, or which make none.
WITHOUT_RECORD = ("filter train", "vocab report", "vocab advise", "eval", "trace", "lineage")
# Options that no line gives: why.
EXCUSED = {
    "extract text_key": "refused: the text is found",
}
# Options that decide the content, and which a script gives in another form or not at all: why.
OTHERWISE = {
    "filter": dict.fromkeys(
        ("preset", "filter", "compat", "languages", "licence", "respect_opt_out", "quality", "decontaminate", "pii"),
        "as the rules they stand for, where one of them reads a file",
    ),
    "vocab": {"digits": "as --pattern"},
    "dedup": {"preset": "as --threshold, --ngram and --normalise"},
    "mix": {"sequence_length": "decides nothing without --pack best-fit"},
    "tokenize": {"seed": "decides nothing without --fim-rate"},
}
# Of a run: times and losses by step, absolute paths; the digests of these.
LOGS = {"metrics.jsonl", "events.jsonl", "config.toml", "digests.json", ".lock", "trainer.json", "base.json", "trace"}


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    """Documents with the fields that the lines name; every fourth repeats an earlier text."""
    import random

    drawn = random.Random(start)
    texts: list[str] = []
    for number in range(count):
        repeats = number % 4 == 3
        text = drawn.choice(texts) if repeats else " ".join(drawn.choices(WORDS, k=drawn.randint(8, 60)))
        texts.append(text if repeats else f"{text.capitalize()}.\nSee 12 of {number + start}.\nMenu")
    more = {"license": ["cc-by-4.0", "all rights reserved"], "source": ["web", "docs"], "score": [1, 2, 3]}
    return [
        {"id": f"{start}-{number}", "text": text, "duplicates": 1 + number % 3}
        | {name: values[number % len(values)] for name, values in more.items()}
        | ({"opt_out": ["noai"]} if number % 5 == 1 else {})
        for number, text in enumerate(texts)
    ]


def lay_out_originals(directory: Path, call: Callable[[str], None]) -> None:
    """Write the originals; those that commands make (a classifier, exports) or that carry no record."""
    import pyarrow
    from pyarrow import parquet

    def lines(name: str, items: list[dict[str, object]], end: str = "") -> None:
        (directory / name).write_text("".join(json.dumps(item) + "\n" for item in items) + end)

    docs, more = rows(32), rows(24, 1000)
    lines("docs.jsonl", docs)
    lines("more.jsonl", more)
    parquet.write_table(pyarrow.Table.from_pylist(docs), directory / "docs.parquet")
    odd = [{"key": row["id"], "body": row["text"]} for row in docs]
    lines("odd.jsonl", odd, "{bad\n" + json.dumps({"key": "long", "body": "a river " * 20_000}) + "\n")
    texts = [row["text"] for row in more]
    html = [f"<html><body><article>{f'<p>{text}</p>' * 3}</article></body></html>" for text in texts]
    lines("pages.jsonl", [{"key": str(i), "page": page} for i, page in enumerate(html[:5])], "[]\n")
    (directory / "pages").mkdir()
    for i, page in enumerate(html[:3]):
        (directory / "pages" / f"{i}.html").write_text(page)
    archive = b""
    for i, page in enumerate(html[:4]):
        digest = f"WARC-Block-Digest: sha1:{'3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ'}\r\n" if i == 1 else ""
        body = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n{page}".encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/{i}\r\nWARC-Date: 2024-05-18T01:58:10Z\r\n"
        head += f"WARC-Record-ID: <urn:uuid:{i}>\r\n{digest}Content-Type: application/http; msgtype=response\r\n"
        archive += head.encode() + b"Content-Length: %d\r\n\r\n%b\r\n\r\n" % (len(body), body)
    (directory / "web.warc").write_bytes(archive)
    (directory / "tiny.toml").write_text('[[filter]]\nname = "length"\nmin_characters = 60\n')
    (directory / "rules.py").write_text("def short(page):\n    return len(page.text) < 300\n")
    (directory / "lines.txt").write_text("Menu\n")
    (directory / "words.txt").write_text("riverstone\nhillside\n")
    (directory / "model.json").write_text(json.dumps(MODEL))
    lines("items.jsonl", [{"question": str(docs[0]["text"]), "answer": "stone"}])
    lines("good.jsonl", [{"text": "river stone light " * 5}] * 8)
    lines("poor.jsonl", [{"text": "seven birds over " * 5}] * 8)
    lines("prompts.jsonl", [{"prompt": "the river"}, {"prompt": "seven birds"}, {"prompt": "a hill", "note": 1}])
    lines("odd-prompts.jsonl", [{"key": "1", "body": "the river"}], "{bad\n")
    chat = [
        [{"role": "user", "content": str(r["text"])[:20]}, {"role": "assistant", "content": str(r["text"])[20:60]}]
        for r in docs[:6]
    ]
    lines("chat.jsonl", [{"messages": turns} for turns in chat])
    lines("renamed.jsonl", [{"data": {"chat": turns}, "about": "a river"} for turns in chat])
    turns = [{"key": str(i), "prompt": t[0]["content"], "completion": t[1]["content"]} for i, t in enumerate(chat)]
    lines("turns.jsonl", turns, "{bad\n")
    pairs = [{"prompt": t[0]["content"], "chosen": t[1]["content"], "rejected": "no"} for t in chat]
    lines("pairs.jsonl", pairs)
    lines("renamed-pairs.jsonl", [{"prompt": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in pairs])
    lines("odd-pairs.jsonl", pairs, "{bad\n")
    (directory / "turns.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" r", b"iv", b"ver"]
    ranks_text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (directory / "ranks.tiktoken").write_text(ranks_text)
    stages = '[sources]\na = "s2"\nb = "s4"\n[[stage]]\nmix = { a = "0.2k" }\n[[stage]]\nmix = { b = "x1" }\n'
    (directory / "stages.toml").write_text(stages)
    (directory / "steps.toml").write_text("[[stage]]\nlr = 1e-3\nshedule = 'linear'\n".replace("shed", "sched"))
    call("vocab docs.jsonl more.jsonl --size 320 -o tok")
    config = json.loads((directory / "tok" / "tokenizer_config.json").read_text())
    config.pop("llmkit")
    (directory / "tok" / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    tokenizer = {path.name: path.read_text() for path in (directory / "tok").iterdir()}
    for number, name in enumerate(("base", "other", "third")):
        _write_model(directory / name, number, tokenizer)
    call("filter train good.jsonl poor.jsonl --epochs 3 -o good.bin")
    call("tokenize docs.jsonl -t tok -o exported")
    call("tokenize more.jsonl -t tok -o more-ids")
    call("tokenize exported --to megatron -o corpus")
    call("tokenize exported --to nanogpt -o packed.npy.bin")
    shutil.rmtree(directory / "exported")


def _write_model(path: Path, seed: int, tokenizer: dict[str, str]) -> None:
    """A random model without a record."""
    from llmkit.model.config import ModelConfig
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import save_model

    sizes = {key: value for key, value in MODEL.items() if key in ModelConfig.__dataclass_fields__}
    model = Decoder(ModelConfig(**sizes | {"initializer_range": 0.3}))  # type: ignore[arg-type]
    model.initialize(seed)
    path.mkdir()
    save_model(path, model.state_dict(), model.config, tokenizer, None, None, stop_ids=[0])


def commands_in(line: str, known: dict[str, dict[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """(command, names of its options that are given) of each llmkit command in a line of a shell."""
    for part in f"llmkit {line}".split("llmkit ")[1:]:
        words = shlex.split(part.replace("|", " "), comments=True)
        command = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        if command in known:
            yield command, [known[command][word] for word in words if word in known[command]]


def option_table(schema: dict[str, object]) -> tuple[dict[str, dict[str, str]], dict[str, set[str]]]:
    """Command -> flag -> name of the option, and command -> names of the options that decide the content."""
    flags: dict[str, dict[str, str]] = {}
    decisive: dict[str, set[str]] = {}
    for entry in schema["commands"]:  # type: ignore[attr-defined]
        name = entry["name"]
        pairs = [(flag, o["name"]) for o in entry["options"] for flag in (*o["flags"], *o["negative_flags"])]
        flags[name] = dict(pairs)
        decisive[name] = {o["name"] for o in entry["options"] if o["decides_content"]}
    return flags, decisive


def outputs_of(line: str) -> list[str]:
    words = shlex.split(line)
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-o", "--rejects")]


def different_files(first: Path, second: Path) -> list[str]:
    """Files that are not the same in both; of a run, but for its logs. Links are followed."""
    if first.is_file():
        return [] if second.is_file() and filecmp.cmp(first, second, shallow=False) else [first.name]
    if (first / "final").is_dir():  # a script compares the last checkpoint of a run
        first, second = first / "final", second.parent.parent / "final"
    names = {
        str(path.relative_to(root))
        for root in (first, second)
        for path in root.rglob("*")
        if path.is_file() and not LOGS & set(path.relative_to(root).parts)
    }
    return sorted(name for name in names if not _is_same(first / name, second / name))


def _is_same(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def try_lines(
    lines: list[str], only: str, work: Path, environment: dict[str, str], schema: dict[str, object]
) -> Iterator[tuple[str, str]]:
    """(artefact, what is wrong or "") of each script."""
    directory, originals = work / "first", work / "originals"
    directory.mkdir()
    flags, decisive = option_table(schema)

    def call(line: str) -> None:
        command = line if line.startswith("cat ") else f"llmkit {line}"
        done = subprocess.run(["bash", "-c", f"{command} -q"], cwd=directory, env=environment, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{command}\n{done.stderr.decode()[-800:]}")

    lay_out_originals(directory, call)
    shutil.copytree(directory, originals)
    for line in lines:
        try:
            call(line)
        except RuntimeError as error:
            yield line, f"failed: {error}"
            continue
        for name in outputs_of(line):
            if only not in line:
                continue
            repeated = repeat(directory, environment, originals, name, work / "again", "--allow-code")
            problem = repeated.problem
            if not problem and (differing := different_files(directory / name, repeated.again)):
                problem = f"other bytes in {', '.join(differing)}\n{repeated.script}"
            printed = dict(commands_in(re.sub(r"(?m)^#.*", "", repeated.script), flags))
            for command, given in commands_in(line.removeprefix("cat docs.jsonl | llmkit "), flags):
                lost = decisive[command] & set(given) - set(printed.get(command, []))
                if lost := lost - OTHERWISE.get(command, {}).keys():
                    problem += f"not printed: {', '.join(sorted(lost))}\n{repeated.script}"
            yield f"{name}: llmkit {line}", problem


def uncovered(lines: list[str], schema: dict[str, object]) -> list[str]:
    """Options that decide the content, and that no line gives."""
    flags, decisive = option_table(schema)
    given = {(command, name) for line in lines for command, names in commands_in(line, flags) for name in names}
    return [
        f"{command} {name}"
        for command, names in decisive.items()
        for name in sorted(names)
        if command not in WITHOUT_RECORD and (command, name) not in given and f"{command} {name}" not in EXCUSED
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="check the scripts of lines with this word")
    parser.add_argument("--socket", help="of a running server (tests/preloaded.py), instead of a new one")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from llmkit.cli.shared.schema import schema as schema_of
    from llmkit.cli.shared.table import COMMANDS

    schema = schema_of(COMMANDS)
    lines = LINES.strip().splitlines()
    began, scripts, equal = time.monotonic(), 0, 0
    with preloaded(arguments.socket) as (work, environment):
        for what, problem in try_lines(lines, arguments.only, work, environment, schema):
            scripts += 1
            equal += not problem
            print(f"{'equal' if not problem else 'DIFFERS'}  {what}" + f"\n{problem}" * bool(problem), flush=True)
    missing = uncovered(lines, schema)
    print(*(f"UNCOVERED  {name}" for name in missing), sep="\n")
    print(f"{scripts} scripts, {equal} equal, {len(missing)} options uncovered; {time.monotonic() - began:.0f} s")
    return equal != scripts or bool(missing)


if __name__ == "__main__":
    sys.exit(main())
