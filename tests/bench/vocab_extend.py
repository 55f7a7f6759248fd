"""Are rows that are the mean of their pieces a better start for new tokens than random ones? Prints a dated table.

    python tests/bench/vocab_extend.py [--shared ../shared/data] [--seeds 2] > tests/bench/vocab_extend.md

A decoder of 0.6M weights learns English (Gutenberg books), with a vocabulary of 2,048 tokens of that English. Then its tokenizer is extended by 400 merges
learned on Genesis in another language, and training goes on for 100 steps on that text: once with the rows that `llmkit vocab extend` writes, once
with random rows of the same mean norm as the old ones, once with the old tokenizer. The last tenth of the text is held out and measured
in bits a byte, so that tokenizers compare. Equal batches of windows (equal seeds) for the two kinds of rows. Minutes on one core.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from peers import SHARED, members

LANGUAGES = ("german", "finnish")
BASE_STEPS, STEPS, BATCH, LENGTH = 400, (10, 100), 16, 64
ADD = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    report(arguments.shared / "text", arguments.seeds)


def english(place: Path) -> str:
    return "".join(
        data.decode("utf-8", "replace")[:200_000] for _, data in members(place / "gutenberg_17_books.tar.zst")
    )


def genesis(place: Path, language: str) -> str:
    data = zipfile.ZipFile(place / "nltk_genesis.zip").read(f"genesis/{language}.txt")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


class Trial:
    """A model with its tokenizer, trained on windows of a text."""

    def __init__(self, model: Any, info: Any) -> None:
        from llmkit.tokens.text_encoder import load_tokenizer

        self.model, self.tokenizer = model, load_tokenizer(info)

    def ids(self, text: str) -> Any:
        import torch

        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def train(self, text: str, steps: int, rate: float, seed: int) -> Iterator[int]:
        """Train, saying each step when it is done."""
        import torch
        import torch.nn.functional as F

        ids, random = self.ids(text), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(self.model.parameters(), rate, (0.9, 0.95), weight_decay=0.1)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20)
            starts = (torch.rand(BATCH, generator=random) * (len(ids) - LENGTH - 1)).long()
            batch = torch.stack([ids[start : start + LENGTH + 1] for start in starts])
            loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimiser.step()
            yield step + 1

    def bits_per_byte(self, text: str) -> float:
        """Each window of the text given nothing before it."""
        import math

        import torch
        import torch.nn.functional as F

        ids = self.ids(text)
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        size = sum(len(self.tokenizer.id_to_token(i)) for i in windows[:, 1:].flatten().tolist())  # a character a byte
        with torch.no_grad():
            nats = sum(
                float(F.cross_entropy(self.model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
                for part in windows.split(BATCH)
            )
        return nats / math.log(2) / size


def randomised(model: Any, first: int, seed: int) -> None:
    """Give the rows from `first` on random directions and the mean norm of the others."""
    import torch

    with torch.no_grad():
        for weight in [module.weight for module in (model.model.embed_tokens, model.lm_head) if module is not None]:
            rows = torch.randn(weight[first:].shape, generator=torch.Generator().manual_seed(seed))
            norm = weight[:first].norm(dim=1).mean()
            weight[first:] = rows / rows.norm(dim=1, keepdim=True) * norm


def report(place: Path, seeds: int) -> None:
    import torch

    from llmkit import __version__
    from llmkit.model.config import load_config
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import load_info, load_model, save_model
    from llmkit.model.resize import write_resized
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.tokens import extend, vocabulary

    torch.set_num_threads(1)
    text = english(place)
    files = vocabulary.train([text], 2048).files
    info = parse_tokenizer(files, "base")
    model = Decoder(load_config("tiny", info.vocab_size))
    model.initialize(0)
    base = Trial(model, info)
    for _ in base.train(text, BASE_STEPS, 3e-3, 0):
        pass
    print("# Rows for new tokens: mean of their pieces, or random\n")
    print(
        f"llmkit {__version__}, torch {torch.__version__}, Python {platform.python_version()}; `python tests/bench/vocab_extend.py`\n"
    )
    print(
        f"{model.config.parameters():,} weights, {BASE_STEPS} steps of English, then {STEPS[-1]} steps on Genesis; "
        f"{ADD} merges added to {info.vocab_size:,}. Bits a byte on held-out text, mean of {seeds} seeds (least, most).\n"
    )
    print("| language | rows | tokens of the text | before | after 10 steps | after 100 steps |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        old = Path(temporary, "base")
        old.mkdir()
        save_model(old, model.state_dict(), model.config, files)
        for language in LANGUAGES:
            whole = genesis(place, language)
            known, held = whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
            made = extend.with_merges(info, "base", extend.learn_merges(info, [known], ADD), 64)
            new = Path(temporary, language)
            new.mkdir()
            write_resized(load_info(old), info.vocab_size, made.pieces, new, made.files)
            wider = parse_tokenizer(made.files, language)
            for rows in ("mean of pieces", "random, same norm", "none: the old tokenizer"):
                scores = []
                for seed in range(seeds):
                    start, codec = (old, info) if rows.startswith("none") else (new, wider)
                    trial = Trial(load_model(start)[0], codec)
                    if rows.startswith("random"):
                        randomised(trial.model, info.vocab_size, seed)
                    row = [trial.bits_per_byte(held)]
                    for step in trial.train(known, STEPS[-1], 1e-3, seed):
                        row += [trial.bits_per_byte(held)] if step in STEPS else []
                    scores.append(row)
                cells = [f"{mean(s):.3f} ({min(s):.3f}, {max(s):.3f})" for s in zip(*scores, strict=True)]
                print(f"| {language} | {rows} | {len(trial.ids(whole)):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
