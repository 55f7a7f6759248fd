"""Data, models and disturbances for benchmarks of training runs: real text with known poison in it, and processes that are killed at chosen places.

Text is Python's own language reference (pydoc_data); the rare domain is Georgian, of which the vocabulary and the model know nothing. `prepare` writes token shards in which
document i of the clean and of the poisoned set has the same number of tokens, so that step n reads the same batch in both, poison apart.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard
from peers import SHARED

SIZE = 512  # tokens a document; half a step
STEP_TOKENS = 1024
CONFIG = {
    "model_type": "qwen3", "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
TRAIN = ("-m", "model.json", "--batch-size", "8", "--sequence-length", "128", "--lr", "3e-3", "-q")


def prepare(place: Path, steps: int, poison: dict[int, str], rare: tuple[int, ...]) -> None:
    """clean/ and poisoned/ shards, heldout.arrow and model.json in `place`, for `steps` steps. `poison` maps steps to "noise" or "repetition": the first
    document of that step; `rare` steps begin with Georgian in both."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from llmkit.io.record import Lineage
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.shards.writer import ShardWriter

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.json").write_text(json.dumps(CONFIG))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    info = parse_tokenizer({"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}, "bench")
    ids = tokenizer.encode(text).ids
    packed = (SHARED / "lang" / "udhr_xml_text.jsonl.zst").read_bytes()
    rows = map(json.loads, zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines())
    foreign = tokenizer.encode(next(row["text"] for row in rows if row["iso639_3"] == "kat")).ids
    pieces = [ids[at : at + SIZE - 1] for at in range(0, len(ids) - SIZE, SIZE - 1)]
    held, ordinary = pieces[::20], [piece for i, piece in enumerate(pieces) if i % 20]
    draw = random.Random(0)
    draw.shuffle(ordinary)

    def documents(poisoned: bool) -> Iterator[tuple[str, list[int]]]:
        for i in range(steps * STEP_TOKENS // SIZE + 2):
            step = i // 2 + 1 if i % 2 == 0 else 0
            tokens, name = ordinary[i % len(ordinary)], f"text-{i}"
            if step in rare:
                at = rare.index(step) * SIZE
                tokens, name = foreign[at : at + SIZE - 1], f"georgian-{i}"
            if step in poison and poisoned:
                name = f"{poison[step]}-{i}"
                bad = random.Random(step)
                if poison[step] == "noise":
                    tokens = tokenizer.encode(bad.randbytes(SIZE).decode("latin-1")).ids[: SIZE - 1]
                else:
                    tokens = [bad.randrange(300, 1000)] * (SIZE - 1)
            yield name, [*tokens, info.eos_id]

    for name in ("clean", "poisoned"):
        with ShardWriter(str(place / name), info, Lineage("tokenize"), force=True) as writer:
            for document, tokens in documents(name == "poisoned"):
                writer.write(tokens, document, document.split("-")[0])
            writer.finish({}, [])
    with ShardWriter(str(place / "heldout.arrow"), info, Lineage("tokenize"), force=True) as writer:
        for i, tokens in enumerate(held[:12]):
            writer.write([*tokens, info.eos_id], f"held-{i}", "text")
        writer.finish({}, [])


# Read by every Python that is started with this directory on its path: patches one function as it is imported.
SITE = """
import os, sys
from importlib.abc import MetaPathFinder


class Hook(MetaPathFinder):
    def __init__(self, module, name, call, action):
        self.module, self.name, self.call, self.action = module, name, int(call), action

    def find_spec(self, found, path, target=None):
        if found != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(found)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda made: (execute(made), self.patch(made))
        return spec

    def patch(self, made):
        owner, _, attribute = self.name.rpartition(".")
        place = getattr(made, owner) if owner else made
        original, count = getattr(place, attribute), [0]

        def replacement(*arguments, **named):
            count[0] += 1
            if count[0] == self.call and self.action == "nan":
                import torch
                with torch.no_grad():
                    arguments[0].model.model.embed_tokens.weight[65] = float("nan")
            elif count[0] == self.call:
                os.kill(os.getpid(), int(os.environ["DISTURB_SIGNAL"]))
            return original(*arguments, **named)

        setattr(place, attribute, replacement)


for wanted in filter(None, os.environ.get("DISTURB", "").split(";")):
    module, name, call, action, rank = wanted.split(":")
    if rank in ("all", os.environ.get("RANK", "0")):
        sys.meta_path.insert(0, Hook(module, name, call, action))
"""


def disturbing(place: Path, what: str = "", number: int = 9) -> dict[str, str]:
    """The environment of a process that is disturbed: `what` is module:function:call:kill|nan:rank|all, several between semicolons."""
    (place / "site").mkdir(exist_ok=True)
    (place / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join(filter(None, (str(place / "site"), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"PYTHONPATH": path, "DISTURB": what, "DISTURB_SIGNAL": str(number), "OMP_NUM_THREADS": "1"}


def start(place: Path, arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`llmkit ARGUMENTS` in `place`."""
    call = [sys.executable, "-m", "llmkit", *arguments]
    return subprocess.Popen(call, cwd=place, env=environment or disturbing(place), stderr=subprocess.PIPE, text=True)


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    found = (json.loads(line) for line in (run / "metrics.jsonl").open())
    return {record["step"]: record.get("loss", float("nan")) for record in found}


def events(run: Path, name: str) -> list[dict]:
    """Events of a kind."""
    return [event for event in map(json.loads, (run / "events.jsonl").open()) if event["event"] == name]
