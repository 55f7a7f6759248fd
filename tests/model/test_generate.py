"""Generation: parity with transformers and with plain recomputation, sampling, stops, the command."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.chat.messages import RowError
from llmkit.chat.prompts import cut_at_stop, read_prompts, stop_test
from llmkit.errors import LlmkitError
from llmkit.lineage.formats import read_lineage
from llmkit.model.decoder import Decoder
from llmkit.model.generate import generate, sample
from llmkit.model.pretrained.checkpoint import load_model, load_tokenizer

PROMPTS = [[5, 7, 9], [11], [100, 3, 4, 5, 6, 7, 8, 20, 30], [5, 7, 9]]


@pytest.fixture(scope="module")
def directory(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Untied: a tied random model mostly repeats its last token.
    return make_model(tmp_path_factory.mktemp("generate") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load_model(directory)[0]


def test_greedy_equals_transformers(directory: Path, decoder: Decoder) -> None:
    """Parity with transformers' generate, prompt by prompt against our padded batch."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = generate(decoder, PROMPTS, max_new_tokens=20, temperature=0)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == out[0, len(prompt) :].tolist()
    assert len({*found[0]}) > 5, "the model repeats itself: nothing is compared"


@torch.no_grad()
def test_greedy_equals_recomputation(decoder: Decoder) -> None:
    """Property: the same tokens with and without a cache, up to a full context."""
    prompt = PROMPTS[2]
    tokens = generate(decoder, [prompt], max_new_tokens=1000, temperature=0)[0]
    assert len(prompt) + len(tokens) == decoder.config.max_position_embeddings
    ids = list(prompt)
    for token in tokens:
        assert decoder(torch.tensor([ids]))[0, -1].argmax().item() == token
        ids.append(token)


@settings(max_examples=10, deadline=None)
@given(chosen=st.permutations(range(4)), size=st.integers(1, 4), temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_a_completion_does_not_depend_on_its_batch(
    decoder: Decoder, chosen: list[int], size: int, temperature: float
) -> None:
    """Property: a completion depends only on its prompt and seed, alone or in a batch of any order."""
    some = chosen[:size]
    options = {"max_new_tokens": 12, "temperature": temperature, "top_p": 0.9, "stop_ids": [13, 250]}
    together = generate(decoder, [PROMPTS[i] for i in some], seeds=[i // 3 for i in some], **options)
    for i, tokens in zip(some, together, strict=True):
        assert tokens == generate(decoder, [PROMPTS[i]], seeds=[i // 3], **options)[0]


def test_seeds_determine_completions(decoder: Decoder) -> None:
    """Behaviour: equal seeds give equal completions, other seeds others."""
    a, b, c = generate(decoder, [PROMPTS[0]] * 3, max_new_tokens=20, temperature=1.5, seeds=[1, 2, 1])
    assert a == c and a != b


def test_stop_ids(decoder: Decoder) -> None:
    """Behaviour: a row ends before its stop token; the others continue."""
    free = generate(decoder, PROMPTS, max_new_tokens=20, temperature=0)
    stop = free[0][6]
    found = generate(decoder, PROMPTS, max_new_tokens=20, temperature=0, stop_ids=[stop, 299])
    for tokens, whole in zip(found, free, strict=True):
        end = min((whole.index(t) for t in (stop, 299) if t in whole), default=20)
        assert tokens == whole[:end]
    assert len(found[0]) <= 6 and max(map(len, found)) == 20
    ended = generate(decoder, PROMPTS[:1], max_new_tokens=20, temperature=0, ended=lambda tokens: len(tokens) == 3)
    assert ended[0] == free[0][:3]


@pytest.mark.parametrize("length", [0, 64, 65])
def test_prompt_that_does_not_fit(decoder: Decoder, length: int) -> None:
    """Behaviour: an error that names the prompt."""
    with pytest.raises(LlmkitError, match=f"prompt 2 has {length} tokens, the context is 64"):
        generate(decoder, [[1], [1] * length], max_new_tokens=1, temperature=0)


def test_a_diverged_model_says_so(directory: Path) -> None:
    """Behaviour: non-finite weights give one clear error, greedy or sampled."""
    model = load_model(directory)[0]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(LlmkitError, match="not finite"):
            generate(model, [[1]], max_new_tokens=1, temperature=temperature, seeds=[0])


def test_sampling_follows_the_distribution() -> None:
    """Property: evenly spaced draws give each token its probability, within the nucleus if top_p is below 1."""
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    n = 2000
    draws = (torch.arange(n) + 0.5).double() / n
    logits = probabilities.log().expand(n, 4)
    every = Counter(sample(logits, 1.0, 1.0, draws).tolist())
    assert {token: round(count / n, 2) for token, count in every.items()} == {0: 0.1, 1: 0.5, 2: 0.05, 3: 0.35}
    nucleus = Counter(sample(logits, 1.0, 0.8, draws).tolist())
    assert set(nucleus) == {1, 3} and abs(nucleus[1] / n - 0.5 / 0.85) < 0.01
    cold = Counter(sample(logits, 0.5, 1.0, draws).tolist())
    squares = (probabilities**2 / (probabilities**2).sum()).tolist()
    assert all(abs(cold[token] / n - share) < 0.01 for token, share in enumerate(squares))
    assert set(sample(logits, 1.0, 1e-9, draws).tolist()) == {1}


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.floats(0.01, 1), st.floats(0, 1, exclude_max=True))
def test_sampling_stays_in_the_nucleus(logits: list[float], top_p: float, draw: float) -> None:
    """Property: the sampled token is in the nucleus of top_p."""
    token = sample(torch.tensor([logits]), 1.0, top_p, torch.tensor([draw], dtype=torch.float64)).item()
    shares = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    before = math.fsum(share for share in shares.tolist() if share > shares[token])
    assert before < top_p + 1e-9 and shares[token] > 0


def test_stop_strings(small_tokenizer: dict[str, str]) -> None:
    """Behaviour: a stop string may end inside a token and begin several before."""
    codec = load_tokenizer(small_tokenizer, "here")
    complete = stop_test(["lazy d", "\n\n"], small_tokenizer)
    ids = codec.encode("over the lazy dog").ids
    ends = [complete(ids[:n]) for n in range(1, len(ids) + 1)]
    first = ends.index(True)
    assert "lazy d" in codec.decode(ids[: first + 1]) and "lazy d" not in codec.decode(ids[:first])
    assert cut_at_stop("over the lazy dog\n\n", ["lazy d", "\n\n", "unseen"]) == "over the "
    assert stop_test([], small_tokenizer) is None


@pytest.mark.parametrize(
    ("row", "content", "other_fields"),
    [
        ({"prompt": "a fox", "id": "7", "k": 1}, "a fox", {"id": "7", "k": 1}),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=", {"reference": "4"}),
        ({"text": "a fox", "source": "x"}, "a fox", {"source": "x"}),
        ({"prompt": [{"role": "user", "content": "hi"}]}, [{"role": "user", "content": "hi"}], {}),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            [{"role": "user", "content": "hi"}],
            {"reference": "yo"},
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}], "ground_truth": "yo"},
            [{"role": "user", "content": "hi"}],
            {"ground_truth": "yo"},
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            [{"role": "user", "content": "Add\n\n1 1"}],
            {"reference": "2"},
        ),
        (
            {"prompt": "2+2=", "output": "4", "input": "i", "system": "s"},
            "2+2=",
            {"reference": "4", "input": "i", "system": "s"},
        ),
    ],
)
def test_rows_become_prompts(small_tokenizer: dict[str, str], row: dict, content: object, other_fields: dict) -> None:
    """Behaviour: every schema, and the row that comes out again."""
    codec = load_tokenizer(small_tokenizer, "here")
    prompt = read_prompts(row, small_tokenizer)[0]
    assert prompt.content == content and prompt.other_fields == other_fields
    if isinstance(content, str):
        assert prompt.tokens == codec.encode(content).ids
    else:
        text = f"<|im_start|>user\n{content[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt.tokens == codec.encode(text).ids and 2 in prompt.tokens
    out = prompt.row(["one", "two"])
    assert out == {"prompt": content, "completion": "one", "completions": ["one", "two"]} | other_fields


def test_rows_that_are_no_prompts(small_tokenizer: dict[str, str]) -> None:
    """Behaviour: the error names the field."""
    for row, message in (
        ({"query": "why"}, r"fields: query"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no question"),
        ({"prompt": 5}, "not a list of messages"),
    ):
        with pytest.raises(RowError, match=message):
            read_prompts(row, small_tokenizer)[0]
    assert read_prompts({"prompt": "hi"}, small_tokenizer, chat=True)[0].content == [{"role": "user", "content": "hi"}]


def test_tools_reach_the_template(small_tokenizer: dict[str, str]) -> None:
    """Behaviour: tools of a row are rendered for `prompt` as for `messages`; a template that refuses a row is that row's fault."""
    files = small_tokenizer | {
        "chat_template.jinja": "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{{ tools[0].name }}"
    }
    asked = [{"role": "user", "content": "hi"}]
    rows = [{name: asked, "tools": [{"name": "search"}]} for name in ("messages", "prompt")]
    codec = load_tokenizer(small_tokenizer, "here")
    for row in rows:
        prompt = read_prompts(row, files)[0]
        assert prompt.tokens == codec.encode("search").ids and prompt.other_fields == {}
        with pytest.raises(RowError, match="no tools"):
            read_prompts({key: value for key, value in row.items() if key != "tools"}, files)[0]


def test_command(llmkit_here: Callable, directory: Path, tmp_path: Path) -> None:
    """Behaviour: rows in, rows out in order, the same for the same seed, with lineage; a second run has nothing to do."""
    rows = [{"id": str(i), "prompt": "the quick brown"[: 3 + i]} for i in range(5)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    call = ("generate", str(directory), "in.jsonl", "--max-tokens", "6", "--samples", "2")
    first = llmkit_here(*call, "--batch-size", "3", "--plain", "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr.decode()
    found = [json.loads(line) for line in first.stdout.splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(len(row["completions"]) == 2 and row["completion"] == row["completions"][0] for row in found)
    assert any(row["completions"][0] != row["completions"][1] for row in found)
    summary = json.loads(first.stderr.splitlines()[-1])
    assert summary["prompts"] == 5 and summary["completions"] == 10
    for _ in range(2):
        again = llmkit_here(*call, "-o", "out.jsonl.zst", cwd=tmp_path)
        assert again.returncode == 0, again.stderr.decode()
    assert b"nothing to do" in again.stderr
    piped = llmkit_here(
        "generate", str(directory), *call[3:], "--plain", stdin=(tmp_path / "in.jsonl").read_bytes(), cwd=tmp_path
    )
    assert [json.loads(line) for line in piped.stdout.splitlines()] == found
    record = read_lineage(tmp_path / "out.jsonl.zst")
    assert record is not None and [item["name"] for item in record["inputs"]] == ["model", "in.jsonl"]
    assert record["options"]["samples"] == 2 and "device" not in record["options"]


def test_command_for_reading(llmkit_here: Callable, directory: Path) -> None:
    """Behaviour: --text prints the prompt with what follows; without terminal control sequences."""
    done = llmkit_here(
        "generate",
        str(directory),
        "-p",
        "the fox",
        "-p",
        "\x1b[31m",
        "--max-tokens",
        "3",
        "--text",
        "--temperature",
        "0",
    )
    lines = done.stdout.decode()
    assert lines.startswith("the fox") and "\x1b" not in lines and "\ufffd[31m" in lines


def test_bad_prompts(llmkit_here: Callable, directory: Path, tmp_path: Path) -> None:
    """Behaviour: a prompt longer than the context is an error that names file and line, unless it may be cut; so is a row without one."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "fox " * 100}) + "\n")
    call = ("generate", str(directory), "in.jsonl", "--max-tokens", "4", "-o", "out.jsonl")
    done = llmkit_here(*call, cwd=tmp_path)
    assert done.returncode == 1 and "in.jsonl:2: prompt of " in done.stderr.decode()
    assert "--truncate-prompt" in done.stderr.decode() and not (tmp_path / "out.jsonl").exists()
    done = llmkit_here(*call, "--truncate-prompt", cwd=tmp_path)
    assert done.returncode == 0 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    (tmp_path / "in.jsonl").write_text('{"query": "a"}\n')
    done = llmkit_here(*call, "-f", cwd=tmp_path)
    assert done.returncode == 1 and "in.jsonl:1: no field 'messages'" in done.stderr.decode()
    for more in (
        ("in.jsonl", "--prompt", "a"),
        ("--prompt", "a", "--text", "-o", "x"),
        ("-p", "a", "--temperature", "nan"),
    ):
        assert llmkit_here("generate", str(directory), *more, cwd=tmp_path).returncode == 2
    done = llmkit_here("generate", str(tmp_path), "--prompt", "a")
    assert done.returncode == 1 and "not a model directory" in done.stderr.decode()
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 1000)
    done = llmkit_here("generate", str(damaged), "--prompt", "a")
    assert done.returncode == 1 and not done.stdout  # not even the header of a stream
