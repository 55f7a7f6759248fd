"""Scores: parity with lm-eval's own Hugging Face model class and with transformers; windows; the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.evaluation.perplexity import perplexity, windows
from llmkit.evaluation.scoring import score
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import load_model, load_tokenizer, save_model

WORDS = "the quick brown fox jumps over the lazy dog while many others sit and watch what happens next in this long story".split()
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""


def text(n: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(n))


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    """A random qwen3 model of 60k parameters with its own tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(500)], trainer)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        ),
        "chat_template.jinja": template,
    }
    config = ModelConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=64, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = Decoder(config)
    model.initialize(3)
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, model.state_dict(), config, files)
    return directory


def make_task(directory: Path, name: str, kind: str, rows: list[dict[str, object]], rest: str) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data, rest=rest))


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory) -> Path:
    """A multiple-choice task (short and long choices, long contexts, trailing spaces) and a generative one."""
    directory = tmp_path_factory.mktemp("tasks")
    choices = [
        {
            "question": text(3 + 7 * i, i) + (" " if i % 3 == 0 else ""),
            "choices": [text(1 + (i + k) % 5, k) for k in range(4)],
            "label": i % 4,
        }
        for i in range(12)
    ]
    rest = "doc_to_choice: choices\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n  - metric: acc_mutual_info"
    make_task(directory, "pick", "multiple_choice", choices, rest)
    rest = 'doc_to_target: answer\ngeneration_kwargs:\n  until: ["zz"]\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match'
    make_task(directory, "say", "generate_until", [{"question": text(5, i), "answer": "x"} for i in range(4)], rest)
    return directory


@pytest.fixture(scope="module")
def with_bos(model_directory: Path, tmp_path_factory) -> Path:
    """The same model with a tokenizer that prepends a token to every text, like Llama's."""
    directory = shutil.copytree(model_directory, tmp_path_factory.mktemp("bos") / "model")
    for name, changes in (
        ("tokenizer.json", {"post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>"}),
        ("config.json", {"bos_token_id": 1}),
    ):  # fmt: skip
        content = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("fixture", ["model_directory", "with_bos"])
def test_parity_with_lm_evals_own_model_class(fixture: str, request: pytest.FixtureRequest) -> None:
    """Parity with lm_eval.models.huggingface.HFLM over transformers: log-likelihoods within 1e-4, the same greedy flags."""
    model_directory = request.getfixturevalue(fixture)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.harness import DecoderLM

    model, info = load_model(model_directory)
    ours = DecoderLM(model, info, batch_tokens=200)
    ours.chat = True  # HFLM takes the names of control tokens for these in every text
    theirs = HFLM(pretrained=str(model_directory), batch_size=1, device="cpu", dtype="float32")
    pairs = [(text(n, n), " " + text(m, n + m)) for n in (1, 4, 30, 90) for m in (1, 3, 9)] + [
        ("", text(4)),
        ("end ", "of"),
        ("<|im_start|>user\n" + text(3), text(2)),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (mine, greedy), (reference, their_greedy) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert mine == pytest.approx(reference, abs=1e-4)
        assert greedy == their_greedy
    rolling = [Instance("loglikelihood_rolling", {}, (text(n),), i) for i, n in enumerate((1, 20, 200))]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)


def test_generation_agrees_with_lm_evals_own_model_class(model_directory: Path) -> None:
    """Parity with HFLM: greedy continuations, cut at the stop string."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.harness import DecoderLM

    model, info = load_model(model_directory)
    theirs = HFLM(pretrained=str(model_directory), batch_size=1, device="cpu", dtype="float32")
    arguments = {"until": ["zz"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (text(n, n), dict(arguments)), n) for n in (2, 10, 40)]
    assert DecoderLM(model, info).generate_until(requests) == theirs.generate_until(requests)


def test_new_tokens_have_their_bounds(model_directory: Path) -> None:
    """Behaviour: every name for the number of new tokens works; one that leaves no room for the prompt is refused; default: half the context."""
    from lm_eval.api.instance import Instance

    from llmkit.evaluation.harness import DecoderLM

    model, info = load_model(model_directory)
    lm = DecoderLM(model, info)

    def say(**arguments: object) -> str:
        request = Instance("generate_until", {}, (text(40), {"until": [], **arguments}), 0)
        return lm.generate_until([request])[0]

    assert 0 < len(say(max_gen_toks=2)) < len(say(max_gen_toks=5))
    assert say(max_new_tokens=5) == say(max_tokens=5) == say(max_gen_toks=5)
    assert say() == say(max_gen_toks=32)
    with pytest.raises(LlmkitError, match="a task asks for 64 new tokens, the model's context is 64"):
        say(max_gen_toks=64)


def test_a_diverged_model_has_no_scores(model_directory: Path) -> None:
    """Behaviour: non-finite weights are an error instead of a meaningless score."""
    model, _ = load_model(model_directory)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LlmkitError, match="not finite"):
        score(model, [([1, 2, 3], 1)])


def test_scores_do_not_depend_on_the_batch(model_directory: Path) -> None:
    """Property: a request has the same log-probability alone and in a batch, within 1e-5."""
    model, info = load_model(model_directory)
    codec = load_tokenizer(info.tokenizer_files, info.path)
    requests = [(list(codec.encode(text(2 + 5 * i, i)).ids), 1 + i % 2) for i in range(9)]
    together = score(model, requests, batch_tokens=150)
    for request, item in zip(requests, together, strict=True):
        assert score(model, [request])[0].logprob == pytest.approx(item.logprob, abs=1e-5)


def test_perplexity_agrees_with_transformers(model_directory: Path) -> None:
    """Parity with transformers' loss on documents that fit the context; bits per byte from the definition."""
    from transformers import AutoModelForCausalLM

    model, info = load_model(model_directory)
    reference = AutoModelForCausalLM.from_pretrained(model_directory)
    codec = load_tokenizer(info.tokenizer_files, info.path)
    texts = [text(n, n) for n in (3, 12, 25)]
    nats, tokens = 0.0, 0
    for one in texts:
        ids = torch.tensor([[0, *codec.encode(one).ids]])
        with torch.no_grad():
            nats += float(reference(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    found = perplexity(model, lambda one: list(codec.encode(one).ids), texts, 0).figures()
    assert found["tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(one) for one in texts), abs=1e-5)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_predict_every_token_once(n: int, context: int, stride: int) -> None:
    """Property: the scored parts of the windows are the document, and no window exceeds the context."""
    stride = min(stride, context)
    tokens = list(range(1, n + 1))
    scored = []
    for row, wanted in windows(tokens, 0, context, stride):
        assert 1 < len(row) <= context + 1 and wanted < len(row)
        scored += row[len(row) - wanted :]
        if row[0] != 0:
            assert len(row) - wanted >= context + 1 - stride
    assert scored == tokens


def test_command_scores_several_models(
    llmkit_anew, model_directory: Path, task_directory: Path, tmp_path: Path
) -> None:
    """Behaviour: JSON on stdout, table on stderr, chance-level accuracy on a random model, standard errors beside."""
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": text(100)}) + "\n")
    done = llmkit_anew(
        "eval", str(model_directory), str(model_directory), "--tasks", "pick,say", "--include-path", str(task_directory),
        "--perplexity", "docs.jsonl", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    scores = json.loads(done.stdout)["models"][str(model_directory)]
    assert scores["tasks"]["pick"]["items"] == 12
    assert 0 <= scores["tasks"]["pick"]["acc_mutual_info"] <= 1 and "acc_stderr" in scores["tasks"]["pick"]
    assert scores["tasks"]["say"]["exact_match"] == 0
    assert scores["perplexity"]["docs.jsonl"]["documents"] == 1
    assert b"pick acc" in done.stderr


def test_formats(llmkit, model_directory: Path, tmp_path: Path) -> None:
    """Behaviour: --format table writes the table to stdout or -o; JSON is the default off the terminal; --json is the summary on stderr alone."""
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": text(60)}) + "\n")
    call = ("eval", str(model_directory), "--perplexity", "docs.jsonl")
    default = llmkit(*call, "--json", cwd=tmp_path)
    assert default.returncode == 0, default.stderr.decode()
    assert json.loads(default.stderr) == {"command": "eval", "models": 1, "tasks": 0}
    scores = json.loads(default.stdout)["models"][str(model_directory)]["perplexity"]["docs.jsonl"]
    assert llmkit(*call, "--format", "json", "-q", cwd=tmp_path).stdout == default.stdout
    table = llmkit(*call, "--format", "table", "--json", cwd=tmp_path)
    assert json.loads(table.stderr)["models"] == 1
    lines = table.stdout.decode().splitlines()
    assert lines[0].split() == [str(model_directory)] and len({*map(len, lines)}) == 1
    assert lines[2].split() == ["docs.jsonl", "bits_per_byte", f"{scores['bits_per_byte']:.4f}"]
    for arguments, expected in (((), default.stdout), (("--format", "table"), table.stdout)):
        assert llmkit(*call, *arguments, "-q", "-f", "-o", "scores", cwd=tmp_path).returncode == 0
        assert (tmp_path / "scores").read_bytes() == expected


def test_every_model_reads_stdin(llmkit, model_directory: Path, tmp_path: Path) -> None:
    """Behaviour: documents from a pipe are scored by all models."""
    documents = json.dumps({"text": text(60)}).encode() + b"\n"
    done = llmkit(
        "eval", str(model_directory), f"{model_directory}/", "--perplexity", "-", stdin=documents, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    scores = [scores["perplexity"]["-"] for scores in json.loads(done.stdout)["models"].values()]
    assert len(scores) == 2 and scores[0] == scores[1] and scores[0]["documents"] == 1


def test_bad_calls(llmkit, model_directory: Path, task_directory: Path, tmp_path: Path) -> None:
    """Behaviour: unknown task, unknown model, nothing to do: one line each, before any model is scored."""
    for arguments, code, message in [
        ([str(model_directory)], 2, "nothing to do"),
        ([str(model_directory), "--tasks", "pick", "--format", "xml"], 2, "--format 'xml'"),
        (["nowhere", "--tasks", "pick"], 1, "no such file"),
        ([str(model_directory), "--tasks", "pikc", "--include-path", str(task_directory)], 2, "did you mean 'pick'"),
        ([str(model_directory), "--tasks", "pick", "--include-path", "nodir"], 1, "no such directory"),
    ]:
        done = llmkit("eval", *arguments, cwd=tmp_path)
        assert done.returncode == code and message in done.stderr.decode(), done.stderr.decode()
        assert b"Traceback" not in done.stderr


def test_scripts_of_datasets_do_not_run(llmkit_here, model_directory: Path, tmp_path: Path) -> None:
    """Behaviour: a script in a folder that has the name of a task's data is refused in one line, and does not run."""
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "facts.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "tasks").mkdir()
    task = TASK.format(
        name="facts", data="none.json", kind="multiple_choice", rest='doc_to_choice: ["a", "b"]\ndoc_to_target: 0'
    )
    (tmp_path / "tasks" / "facts.yaml").write_text(task.replace("dataset_path: json", "dataset_path: facts"))
    arguments = [str(model_directory), "--tasks", "facts", "--include-path", "tasks", "-o", "scores.json"]
    done = llmkit_here("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and b"error: a task among facts fails: ValueError: " in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "scores.json").exists()


def test_names_of_control_tokens_in_tasks_are_text(model_directory: Path) -> None:
    """Behaviour: in contexts, choices and messages, with and without the chat template, which has the only real ones."""
    from llmkit.chat.templates import render
    from llmkit.evaluation.harness import DecoderLM

    lm = DecoderLM(*load_model(model_directory))
    end = 2  # <|im_end|>
    assert (
        end not in lm.tok_encode("the <|im_end|>quick")
        and lm.tok_encode("the quick") == lm.codec.encode("the quick").ids
    )
    whole = lm._encode_pair("the quick", " <|im_end|>brown")
    assert end not in whole[0] + whole[1] and lm.codec.decode(whole[1]) == " <|im_end|>brown"
    files = lm.info.tokenizer_files
    lm = DecoderLM(*load_model(model_directory), lambda messages, prompt: render(messages, files, prompt))
    lm.chat = True
    context = lm.apply_chat_template([{"role": "user", "content": "the <|im_end|>quick"}])
    assert lm.tok_encode(context).count(end) == lm.tok_encode(context, add_special_tokens=False).count(end) == 1
    assert end not in lm._encode_pair(context, "<|im_end|>brown")[1]
