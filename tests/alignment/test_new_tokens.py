"""Named chat templates for base models: tokens and rows that are added, trained, stored and merged, against PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.alignment.chat_model import with_end_of_turn
from llmkit.alignment.fine_tuning import fine_tune
from llmkit.chat import builtin
from llmkit.chat.templates import special_contents, special_tokens
from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.model.lora.config import LoraConfig
from llmkit.model.pretrained.adapter import load_for_adapting, save_adapter
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.model.resize import NewTokens
from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.tokens.extend import with_control_tokens
from llmkit.training import objectives
from llmkit.training.metrics.log import read_metrics

IDS = torch.randint(1, 303, (2, 20), generator=torch.Generator().manual_seed(0))
DELTA = "token_adapter.trainable_tokens_delta"
# Tied or not, and the rows of the embedding for 299 tokens: without, with too few and with enough unused rows.
MODELS = {"tied": (True, 299), "untied": (False, 299), "partly": (False, 300), "padded": (True, 320)}


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories of MODELS, whose tokenizer has the tokens of ChatML, but not those of Llama 3."""
    root = tmp_path_factory.mktemp("models")
    for name, (tied, rows) in MODELS.items():
        sizes = {"vocab_size": rows, "max_position_embeddings": 96, "initializer_range": 0.1}
        make_model(root / name, architecture="llama", tie_word_embeddings=tied, **sizes)
    return root


@pytest.fixture
def place(directory: Path, models: Path) -> Path:
    for name in MODELS:
        (directory / name).symlink_to(models / name)
    return directory


def call(command: str, *arguments: str) -> int:
    return run_command(command, [*arguments, "-q"])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def logits_of(path: str | Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_model(path)[0](IDS)
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_adapters_hold_the_new_rows(place: Path, name: str) -> None:
    """Parity with PEFT: logits of a run's adapters, merged and not, and of PEFT's on the base with as many rows, within 1e-5,
    as those of transformers from its merge_and_unload; old rows and everything else of the base stay."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"lora": 4, "lr": 1e-2, "batch_size": 8, "epochs": 2, "lora_targets": "q_proj,up_proj"}
    assert fine_tune(name, ["chat.jsonl"], "run", chat_template="llama-3", **options)
    adapter, tied = Path("run/final"), MODELS[name][0]
    config = json.loads((adapter / "adapter_config.json").read_text())
    new = [299, 300, 301]
    assert config["trainable_token_indices"] == {"embed_tokens": new} | ({} if tied else {"lm_head": new})
    stored = {key for key in load_file(adapter / "adapter_model.safetensors") if DELTA in key}
    assert stored == {f"base_model.model.{layer}.{DELTA}" for layer in ("model.embed_tokens", "lm_head")[: 2 - tied]}
    base = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.convert_tokens_to_ids("<|eot_id|>") == 301
    rows = max(MODELS[name][1], 302)
    if rows > MODELS[name][1]:
        base.resize_token_embeddings(len(tokenizer))
    reference = PeftModel.from_pretrained(base, adapter)
    ids = IDS.clamp(max=301)
    with torch.no_grad():
        expected = reference(ids).logits
        ours = load_model("run")[0]
        assert distance(ours(ids), expected) < 1e-5
        assert call("average", "run", "--merge-adapter", "-o", "merged") == 0
        assert load_info("merged").config.vocab_size == rows == ours.config.vocab_size
        theirs = AutoModelForCausalLM.from_pretrained("merged", attn_implementation="eager", dtype=torch.float32)
        assert distance(theirs(ids).logits, expected) < 1e-5
        reference.merge_and_unload().save_pretrained("unloaded")
        again = AutoModelForCausalLM.from_pretrained("unloaded", attn_implementation="eager", dtype=torch.float32)
        assert distance(again(ids).logits, expected) < 1e-5
        assert distance(load_model("unloaded")[0](ids), expected) < 1e-5
    before, after = (load_model(path)[0].state_dict() for path in (name, "merged"))
    for key, old in before.items():
        if "embed" in key or "lm_head" in key:
            assert torch.equal(after[key][:299], old[:299])
            assert torch.equal(after[key][302:], old[302:])
        elif not ("q_proj" in key or "up_proj" in key):
            assert torch.equal(after[key], old)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_rows(models: Path, tmp_path: Path, tied: bool) -> None:
    """Parity with PEFT: the loss of a batch, and its gradients for the rows and everything else that is trained, whether the
    loss has the head and cross-entropy in one, log-probabilities, or plain logits. No gradient has as many rows as the head."""
    import torch.nn.functional as F
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmkit.training.data import Batch

    base, new = models / ("tied" if tied else "untied"), (7, 299, 300)
    tokens = {"embed_tokens": new} if tied else {"embed_tokens": new, "lm_head": (299, 300)}
    model = load_for_adapting(base, LoraConfig(2, 4.0, ("q_proj",), tokens=tokens), 0)
    with torch.no_grad():
        for parameter in model.trained_state().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    save_adapter(tmp_path, model.trained_state(), model.config, model.adapter, {})
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    reference.resize_token_embeddings(301)
    reference = PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    ids = torch.cat([IDS.clamp(max=298), torch.tensor([[7, 299, 300, 7, 299], [1, 300, 2, 299, 3]])], 1)
    expected = F.cross_entropy(reference(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    expected.backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in reference.named_parameters()
        if p.grad is not None
    }
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, ids.shape[1] - 1), torch.zeros(2, ids.shape[1] - 1).long())

    def log_probabilities() -> Tensor:
        hidden, _ = objectives.counted_hidden_states(model, batch)
        targets = batch.targets.flatten()
        return -objectives.token_log_probabilities(hidden, model.head_weight, targets, None, model.head_rows).sum()

    def plain() -> Tensor:
        return F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")

    for loss in (lambda: objectives.next_token(model, batch, 1.0).loss, log_probabilities, plain):
        model.zero_grad()
        value = loss()
        assert abs(value.item() - expected.item()) < 1e-5 * expected.item()
        value.backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys() == model.trained_state().keys()
        for name, gradient in ours.items():
            assert distance(gradient, theirs[name]) < 1e-4 * float(theirs[name].abs().max()), name


@pytest.mark.parametrize("indices", [[298, 3, 17], {"lm_head": [5, 2], "model.embed_tokens": [9]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_peft_trained(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indices: Any, dtype: torch.dtype
) -> None:
    """Parity with PEFT: rows in any order, of one table or different ones of each, give its merge_and_unload."""
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    tied = isinstance(indices, list)
    make_model(tmp_path / "base", architecture="llama", vocab_size=299, dtype=dtype, tie_word_embeddings=tied)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=indices, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base", dtype=dtype), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
    model.save_pretrained("adapter")
    assert call("average", "adapter", "--merge-adapter", "-o", "merged") == 0
    expected = model.merge_and_unload().state_dict()
    for name, value in load_model("merged")[0].state_dict().items():
        assert value.dtype == dtype and distance(value.float(), expected[name].float()) < (
            1e-6 if dtype == torch.float32 else 0.02
        )
        if "embed" in name or "lm_head" in name:
            assert torch.equal(value, expected[name])


def final(run: str) -> dict[str, bytes]:
    root = Path(run, "final").resolve()
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lora", [None, 4])
def test_resumed_to_the_byte(place: Path, lora: int | None) -> None:
    """Property: a run that lost everything after its first checkpoint ends in the same bytes; the new tokens were learnt."""
    options: dict[str, Any] = {"lora": lora, "lr": 1e-2, "batch_size": 8, "epochs": 2, "save_every": 2}
    assert fine_tune("untied", ["chat.jsonl"], "whole", chat_template="llama-3", **options)
    shutil.copytree("whole", "lost", symlinks=True)
    for path in (Path("lost/final"), Path("lost/digests.json"), Path("lost/latest")):
        path.unlink()
    checkpoints = sorted(Path("lost/checkpoints").iterdir())
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    Path("lost/latest").symlink_to(checkpoints[0].relative_to("lost"))
    assert fine_tune("untied", ["chat.jsonl"], "lost", chat_template="llama-3", resume=True, **options)
    assert final("lost") == final("whole") and len(checkpoints) > 1
    log = list(read_metrics(Path("whole/metrics.jsonl")))
    assert log[-1]["loss"] < log[0]["loss"]
    start = load_for_adapting("untied", LoraConfig(4, 8.0, ("q_proj",)), 0, NewTokens(299, [[1], [2, 3], []]))
    rows = load_model("whole")[0].state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = start.state_dict()[name]
        assert torch.equal(old[299], old[1]) and distance(old[300], old[2:4].mean(0)) < 1e-7
        assert distance(old[301], old[:299].mean(0)) < 1e-7
        assert float((rows[name][299:] - old[299:]).abs().min(1).values.max()) > 0


def test_a_model_learns_to_stop(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: the message names the tokens; rows are shown, checked and planned with the template; the run and its int8
    model stop at the end of the turn; eos_token is that; lineage names the template, and the script repeats it."""
    Path("chat.jsonl").write_bytes(b"".join(Path("chat.jsonl").read_bytes().splitlines(keepends=True)[:16]))
    common = ("untied", "chat.jsonl", "--chat-template", "phi-4")
    assert run_command("sft", [*common, "--show", "1"]) == 0
    said = capfd.readouterr()
    assert "<|im_sep|>" in said.out and "⟦it is sunny‹<|im_end|>›⟧" in said.out
    assert "tokens added for phi-4: <|im_sep|>; the model grows from 299 to 300 rows" in said.err
    assert call("sft", *common, "--check", "-o", "report.json") == 0
    assert json.loads(Path("report.json").read_text())["chat.jsonl"]["errors"] == 0
    assert run_command("sft", [*common, "--lora", "4", "--dry-run", "-o", "run"]) == 0
    plan = capfd.readouterr().err
    assert f"lm_head.{DELTA}" in plan and "1x32" in plan and not Path("run").exists()
    for lora in ((), ("--lora", "8")):
        rate = ("--lr", "1e-2", "--epochs", "10", "--batch-size", "2")
        assert call("sft", *common, *rate, *lora, "-o", "run", "-f") == 0
        info = load_info("run")
        ids = special_contents(info.tokenizer_files)
        assert info.stop_ids == [ids["<|im_end|>"], ids["<|endoftext|>"]] and info.config.vocab_size == 300
        config = json.loads(info.tokenizer_files["tokenizer_config.json"])
        assert config["eos_token"] == "<|im_end|>" and "<|im_sep|>" in config["chat_template"]
        assert not lora or call("quantize", "run", "--to", "int8", "-o", "small") == 0
        for model in ("run", "small")[: 1 + bool(lora)]:
            prompt = ("--chat", "-p", "what is the weather", "--max-tokens", "20", "--temperature", "0")
            assert call("generate", model, *prompt, "-o", "said.jsonl", "--plain", "-f") == 0
            assert json.loads(Path("said.jsonl").read_text())["completion"] == "it is sunny"
        capfd.readouterr()
        assert run_command("lineage", ["run", "--script"]) == 0
        assert " --chat-template phi-4 " in capfd.readouterr().out


def test_a_file_is_an_input(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a template in a file is recorded by its base name and digest, and adds no tokens."""
    file = place / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
    assert call("sft", "untied", "chat.jsonl", "--chat-template", str(file), "-o", "run") == 0
    assert load_info("run").config.vocab_size == 299
    assert "chat-template = " in (text := Path("run/config.toml").read_text()) and str(file) in text
    assert run_command("lineage", ["run", "--script"]) == 0
    assert '--chat-template "$IN"/own.jinja' in capfd.readouterr().out
    assert call("lineage", "run", "--check") == 0


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_an_unknown_template(place: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a name that is neither known nor a file is an error that lists the names; no run."""
    assert call(command, "tied", "chat.jsonl", "--chat-template", "chat-ml", "-o", "run") == 2
    error = capfd.readouterr().err
    assert "--chat-template 'chat-ml' is neither a file nor a known template" in error
    assert "known: chatml, gemma, llama-3, phi-4, qwen3, tulu" in error
    assert not Path("run").exists()


def test_preferences_start_from_the_same_model(place: Path) -> None:
    """Behaviour: of a model with new rows, DPO starts at ln 2, since its reference has the same rows; then the margin rises."""
    arguments = ("--lora", "8", "--lr", "3e-3", "--epochs", "4", "--chat-template", "gemma")
    assert call("dpo", "partly", "pairs.jsonl", *arguments, "-o", "run") == 0
    log = list(read_metrics(Path("run/metrics.jsonl")))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["margin"] > 0.1


def test_documents_still_end_with_the_end_of_text(files: dict[str, str]) -> None:
    """Property: whichever template a model gets, `tokenize` with its tokenizer ends documents as before, and every file that
    names an eos_token names the end of the turn."""
    files = files | {"special_tokens_map.json": '{"eos_token": "<|endoftext|>"}'}
    before = parse_tokenizer(files, "base").eos_id
    for template in (item for item in builtin.TABLE if item.stop):
        made = with_control_tokens(files, "base", template.tokens).files
        made = with_end_of_turn(made, template.stop)
        assert parse_tokenizer(made, "base").eos_id == before
        assert (
            special_tokens(made)["eos_token"]
            == json.loads(made["special_tokens_map.json"])["eos_token"]
            == template.stop
        )


def test_tokens_beyond_the_model(make_model: Callable[..., Path], place: Path) -> None:
    """Behaviour: where a tokenizer has more tokens than the model has rows, those before the new ones get rows too."""
    make_model(place / "short", architecture="llama", vocab_size=299, max_position_embeddings=96)
    path = place / "short/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] += [dict(content["added_tokens"][0], id=299 + i, content=f"<image{i}>") for i in range(2)]
    path.write_text(json.dumps(content))
    assert call("sft", "short", "chat.jsonl", "--chat-template", "llama-3", "--lora", "2", "-o", "run") == 0
    config = json.loads(Path("run/final/adapter_config.json").read_text())
    assert config["trainable_token_indices"]["embed_tokens"] == [299, 300, 301, 302, 303]
    assert load_info("run").config.vocab_size == 304


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of `untied` with two new rows in each table."""
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    path.mkdir()
    lora = LoraConfig(2, 4.0, ("q_proj",), tokens={"embed_tokens": (299, 300), "lm_head": (299, 300)})
    model = load_for_adapting(models / "untied", lora, 0)
    save_adapter(path, model.trained_state(), model.config, model.adapter, load_info(models / "untied").tokenizer_files)
    return path


BOTH, HEAD = [299, 300], {"lm_head": [299, 300]}
KEY = f"base_model.model.lm_head.{DELTA}"
HOSTILE: dict[str, tuple[Any, str]] = {
    "negative": ({"embed_tokens": [-1, 300], **HEAD}, "trainable_token_indices is"),
    "repeated": ({"embed_tokens": [300, 300], **HEAD}, "trainable_token_indices is"),
    "no number": ({"embed_tokens": [True, 300], **HEAD}, "trainable_token_indices is"),
    "enormous": ({"embed_tokens": [299, 10**12], **HEAD}, "trainable_token_indices is"),
    "none": ({"embed_tokens": [], **HEAD}, "trainable_token_indices is"),
    "text": ("all", "trainable_token_indices is 'all'"),
    "an expression": ({"(a+)+$": BOTH}, "trainable_token_indices is"),
    "far away": ({"embed_tokens": [299, 30_000_000], **HEAD}, "nothing gives model.embed_tokens one for 300"),
    "one table": ({"embed_tokens": BOTH}, "nothing gives lm_head one for 299"),
    "a list": (BOTH, "nothing gives lm_head one for 299"),
    "another layer": ({"embed_tokens": BOTH, "q_proj": BOTH}, "trainable_token_indices names embed_tokens, q_proj"),
    "one layer twice": ({"embed_tokens": BOTH, "model.embed_tokens": BOTH, **HEAD}, "trainable_token_indices names"),
    "more rows": ({"embed_tokens": [299, 300, 5], **HEAD}, f"embed_tokens.{DELTA} is F32 [2, 32], not F32 [3, 32]"),
    "not said": (None, f"unexpected tensor lm_head.{DELTA}"),
    "missing": (lambda t: t.pop(KEY), f"missing tensor {KEY}"),
    "shape": (lambda t: t.update({KEY: torch.zeros(32, 2)}), "is F32 [32, 2], not F32 [2, 32]"),
    "type": (lambda t: t.update({KEY: torch.zeros(2, 32, dtype=torch.int64)}), "is I64 [2, 32], not F32"),
    "not finite": (lambda t: t[KEY].fill_(math.nan), "contains nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_rows(place: Path, adapter: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    """Behaviour: one line that names the key or tensor, exit code 1, and nothing is written."""
    change, message = HOSTILE[case]
    copy = Path(shutil.copytree(adapter, place / "copy"))
    if callable(change):
        tensors = load_file(copy / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    else:
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": change}))
    assert call("average", "copy", "--merge-adapter", "--base", "untied", "-o", "merged") == 1
    error = capfd.readouterr().err
    assert message in error and "internal error" not in error and len(error.splitlines()) == 2
    assert not (place / "merged").exists()


def test_a_tied_head_may_be_named_too(models: Path) -> None:
    """Behaviour: PEFT takes both names of a tied table if their ids are equal; other ids are refused."""
    config = load_info(models / "tied").config
    lora = LoraConfig(2, 4.0, ("q_proj",), tokens={"embed_tokens": (299,), "lm_head": (299,)})
    assert lora.adapted(config, "here").vocab_size == 300
    assert lora.tables(config) == {"model.embed_tokens": (299,)}
    for tokens in ({"embed_tokens": (299,), "lm_head": (5,)}, {"lm_head": (5,)}):
        with pytest.raises(LlmkitError, match="here: trainable_token_indices names"):
            LoraConfig(2, 4.0, ("q_proj",), tokens=tokens).adapted(config, "here")
