"""Tiny models, data and runs for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIG, ListStream, loop_settings, tiny_model

from llmkit.io.record import Input, Lineage
from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.shards.writer import ShardWriter
from llmkit.training import session as sessions
from llmkit.training.data import HeldOutSource, StreamSource
from llmkit.training.objectives import next_token
from llmkit.training.optim.schedule import build_schedule


@pytest.fixture(scope="session")
def stream() -> ListStream:
    """60 documents of 1 to 59 tokens."""
    return ListStream(np.random.default_rng(7).integers(1, 60, size=60).tolist())


@pytest.fixture(scope="session")
def train(stream: ListStream) -> Callable[..., dict[str, Any]]:
    """Train the tiny model for 16 steps in a run directory; keyword arguments replace parts of it."""

    def go(path: Path, **changes: Any) -> dict[str, Any]:
        report = changes.pop("report", lambda record: None)
        objective = changes.pop("objective", next_token)
        heldout = changes.pop("heldout", False)
        rate = changes.pop("rate", 3e-3)
        say = changes.pop("say", lambda text: None)
        batch_size = changes.pop("batch_size", 4)
        options = changes.pop("options", {"seed": 0})
        at_checkpoint = changes.pop("at_checkpoint", [])
        settings = loop_settings(str(path), **({"micro_batch_size": 2, "save_every": 3} | changes))
        source = StreamSource(stream, 32, batch_size, 16 * 4 * 32)
        plan = build_schedule("cosine", rate, source.tokens(source.steps), warmup=300, floor=0.1)
        with sessions.session(settings, warn=say) as opened:
            opened.at_checkpoint += at_checkpoint
            inputs = [Input("input", "data", "xxh3:0")]
            if not opened.begin(Lineage("train", options), inputs, batch_size, 32, "seed = 0\n"):
                return {"finished": True}
            return opened.train(
                opened.model(tiny_model),
                objective,
                source,
                plan,
                tokenizer_files={},
                heldout=HeldOutSource(ListStream([50, 40], seed=3), 32) if heldout else None,
                report=report,
            )

    return go


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, str]:
    """A byte-level BPE tokenizer with chat tokens, 280 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, str]) -> Path:
    """A directory with token shards `shards/` (3,000 tokens), `heldout.arrow` and a model configuration
    `config.json`."""
    from tokenizers import Tokenizer

    place = tmp_path_factory.mktemp("training")
    info = parse_tokenizer(tokenizer_files, "tokenizer")
    tokenizer = Tokenizer.from_str(tokenizer_files["tokenizer.json"])
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    draw = np.random.default_rng(0)
    for name, documents in (("shards", 60), ("heldout.arrow", 10)):
        with ShardWriter(str(place / name), info, Lineage("tokenize")) as writer:
            for i in range(documents):
                text = " ".join(draw.choice(words, size=int(draw.integers(5, 40))))
                writer.write([*tokenizer.encode(text).ids, info.eos_id], str(i), "test")
            writer.finish({}, [])
    sizes = CONFIG.with_vocabulary(info.vocab_size).to_hf() | {"max_position_embeddings": 64}
    (place / "config.json").write_text(json.dumps(sizes))
    return place
