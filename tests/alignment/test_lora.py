"""Adapters: training them with `llmkit sft` and `llmkit dpo`, their directories, and merging them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from llmkit.alignment.fine_tuning import fine_tune
from llmkit.cli.main import run_command
from llmkit.errors import UsageError
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.lora.config import LoraConfig, target_modules
from llmkit.model.lora.layers import FrozenLinear
from llmkit.model.pretrained.adapter import load_for_adapting
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.training import train_step
from llmkit.training.metrics.log import read_metrics
from llmkit.training.optim.optimizer import build_optimizer, set_learning_rate

OPTIONS: dict[str, Any] = {"lora": 4, "lr": 1e-2, "batch_size": 8, "epochs": 3, "save_every": 4}
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
IDS = torch.randint(1, 290, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose weights are large enough that adapters can steer it."""
    return make_model(tmp_path_factory.mktemp("lora") / "wide", architecture="llama", max_position_embeddings=96)


@pytest.fixture
def place(directory: Path, wide: Path) -> Path:
    (directory / "wide").symlink_to(wide)
    return directory


def call(command: str, *arguments: str) -> int:
    return run_command(command, [*arguments, "-q"])


def files(run: str | Path) -> dict[str, bytes]:
    """What the final checkpoint of a run holds, except the times in its trainer state."""
    final = Path(run, "final").resolve()
    named = {str(path.relative_to(final)): path for path in final.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in named.items()}


def test_sft_trains_adapters_which_every_command_reads(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: the loss falls; a checkpoint holds the adapters alone; `generate` and `eval`'s loader take the run as they
    take its merged model, whose lineage names the base; the base is found beside the run too; and quantize takes it."""
    assert call("sft", "wide", "chat.jsonl", *FLAGS, "--dora", "--lora-plus", "4", "-o", "run") == 0
    log = list(read_metrics(Path("run/metrics.jsonl")))
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert not list(place.glob("run/**/model.safetensors"))
    assert (place / "run/final/adapter_model.safetensors").stat().st_size < 0.7 * (
        place / "wide/model.safetensors"
    ).stat().st_size
    assert call("average", "run", "--merge-adapter", "-o", "merged") == 0
    for name in ("run", "merged"):
        assert (
            call("generate", name, "--chat", "-p", "what is the", "--max-tokens", "6", "--plain", "-o", f"{name}.jsonl")
            == 0
        )
    assert (place / "run.jsonl").read_bytes() == (place / "merged.jsonl").read_bytes()
    assert call("lineage", "merged", "--check") == 0
    assert call("lineage", "run", "--check") == 0
    assert "DIFFERS" not in capfd.readouterr().out
    shutil.copytree(place / "wide", place / "elsewhere" / "wide")
    shutil.copytree(place / "run/final", place / "elsewhere/adapter", ignore=shutil.ignore_patterns("state"))
    (place / "wide").unlink()
    assert call("quantize", "elsewhere/adapter", "--to", "int8", "-o", "small") == 0
    with torch.no_grad():
        logits = [load_model(name)[0](IDS) for name in ("elsewhere/adapter", "merged", "small")]
    assert torch.equal(logits[0], logits[1])
    assert 0 < float((logits[2] - logits[1]).abs().max()) < 2


def test_a_killed_run_ends_in_the_same_bytes(place: Path) -> None:
    """Property: after SIGKILL in a step and --resume, and in another process, every file of the checkpoint is the same; another
    seed gives others."""
    assert fine_tune("wide", ["chat.jsonl"], "whole", **OPTIONS)
    child = os.fork()
    if child == 0:
        try:
            clip, count = train_step.clip_gradients, iter(range(100))
            train_step.clip_gradients = lambda *arguments: (
                os.kill(os.getpid(), signal.SIGKILL) if next(count) == 6 else clip(*arguments)
            )
            fine_tune("wide", ["chat.jsonl"], "killed", **OPTIONS)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in Path("killed/checkpoints").glob("step-*")] == ["step-00000004"]
    assert fine_tune("wide", ["chat.jsonl"], "killed", resume=True, **OPTIONS)
    assert files("killed") == files("whole")
    assert fine_tune("wide", ["chat.jsonl"], "other", seed=1, **OPTIONS)
    assert files("other")["adapter_model.safetensors"] != files("whole")["adapter_model.safetensors"]


def test_non_finite_adapters_are_rolled_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: a NaN written into an adapter costs only time, with a base that is not in the snapshot."""
    fine_tune("wide", ["chat.jsonl"], "clean", **OPTIONS)
    real, broken = train_step.accumulate, []

    def accumulate(context: Any, step: int, metrics: Any) -> Any:
        if step == 9 and not broken:
            broken.append(step)
            name = next(name for name in context.model.trained_state() if "lora_B" in name)
            context.model.get_parameter(name).data.fill_(math.nan)
        return real(context, step, metrics)

    monkeypatch.setattr("llmkit.training.loop.accumulate", accumulate)
    fine_tune("wide", ["chat.jsonl"], "rolled", **OPTIONS)
    assert '"rollback"' in Path("rolled/events.jsonl").read_text()
    assert files("rolled")["adapter_model.safetensors"] == files("clean")["adapter_model.safetensors"]


def test_dpo_starts_from_the_base(place: Path) -> None:
    """Behaviour: ln 2 at step 0, since new adapters change nothing; then the margin rises."""
    arguments = ("--lora", "8", "--lr", "1e-3", "--epochs", "4", "--lora-targets", "attention")
    assert call("dpo", "wide", "pairs.jsonl", *arguments, "-o", "dpo") == 0
    log = list(read_metrics(Path("dpo/metrics.jsonl")))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["margin"] > 0.1
    assert json.loads(Path("dpo/final/adapter_config.json").read_text())["base_model_name_or_path"] == "wide"


def test_frozen_weights_keep_their_type(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: of a bfloat16 base the layers' matrices stay bfloat16, without gradients or moments; the output equals that of
    the base in float32."""
    base = make_model(tmp_path / "base", dtype=torch.bfloat16, architecture="llama")
    model = load_for_adapting(base, LoraConfig(4, 8.0, ("q_proj",)), 0)
    matrices = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(matrices) == 14
    assert {module.weight.dtype for module in matrices if module.weight is not None} == {torch.bfloat16}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == model.trained_state().keys() and len(trained) == 4
    assert float((model(IDS) - load_model(base, torch.float32)[0](IDS)).abs().max()) < 1e-5


def test_b_has_its_own_learning_rate(wide: Path) -> None:
    """Behaviour: LoRA+ multiplies the rate of B and of nothing else; magnitudes do not decay."""
    model = load_for_adapting(wide, LoraConfig(2, 4.0, ("q_proj",), dora=True, b_rate=16.0), 0)
    optimizer = build_optimizer(model, weight_decay=0.1)
    set_learning_rate(optimizer, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)].partition("q_proj.")[2]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "lora_A.weight": (1e-3, 0.1),
        "lora_B.weight": (1.6e-2, 0.1),
        "lora_magnitude_vector": (1e-3, 0.0),
    }


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_adapters_of_a_quantised_base(place: Path, to: str) -> None:
    """Behaviour: QLoRA. The packed weights stay packed, the output is that of the dequantised model, the loss falls, and the
    merged model equals the unmerged one within 1e-5 of the largest logit."""
    assert call("quantize", "wide", "--to", to, "-o", "small") == 0
    fresh = load_for_adapting("small", LoraConfig(4, 8.0, ("q_proj", "v_proj")), 0)
    assert not [module for module in fresh.modules() if isinstance(module, FrozenLinear) and module.weight is not None]
    assert float((fresh(IDS) - load_model("small", torch.float32)[0](IDS)).abs().max()) < 1e-5
    assert call("sft", "small", "chat.jsonl", *FLAGS, "-o", "run") == 0
    log = list(read_metrics(Path("run/metrics.jsonl")))
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert call("average", "run", "--merge-adapter", "-o", "merged") == 0
    assert load_info("merged").quantization is None
    with torch.no_grad():
        expected = unmerged("small", "run")(IDS)
        assert float((load_model("merged")[0](IDS) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def unmerged(base: str, run: str) -> Any:
    """The base with the run's adapters beside its weights."""
    from llmkit.training.checkpoint.trainer_state import load_weights

    lora = load_info(run).adapter
    assert lora is not None
    model = load_for_adapting(base, lora.config, 0)
    model.load_state_dict(load_weights(Path(run, "final")), strict=False)
    return model


@pytest.mark.parametrize(
    ("architecture", "text", "expected"),
    [
        ("llama", "all-linear", ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")),
        ("llama", "attention", ("k_proj", "o_proj", "q_proj", "v_proj")),
        ("llama", "v_proj, q_proj", ("q_proj", "v_proj")),
        ("phi3", "mlp", ("down_proj", "gate_up_proj")),
        ("gpt2", "all-linear", ("c_attn", "c_fc", "c_proj")),
        ("gpt2", "attention", ("attn.c_proj", "c_attn")),
        ("gpt2", "mlp.c_proj", ("mlp.c_proj",)),
        ("gpt_neox", "attention", ("dense", "query_key_value")),
    ],
)
def test_targets(architecture: str, text: str, expected: tuple[str, ...]) -> None:
    """Behaviour: groups become the shortest names that PEFT takes for these layers and no others."""
    assert target_modules(config_of(architecture), text) == expected


def config_of(architecture: str) -> ModelConfig:
    family = ARCHITECTURES.get(architecture)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    own = {key: value.default for key, value in family.keys.items()} | family.preset(sizes)
    more = {"num_key_value_heads": 4, "head_dim": 8, "architecture": architecture, "own": own}
    return ModelConfig(vocab_size=300, intermediate_size=64, **sizes, **more)


@given(some.text("qkv_proj.,alinermt ", max_size=12))
def test_targets_are_known_names_or_refused(text: str) -> None:
    """Property: any text gives names of linear layers, or an error that names one."""
    try:
        names = target_modules(config_of("llama"), text)
    except UsageError as error:
        assert "--lora-targets" in error.message
    else:
        assert names and LoraConfig(1, 1.0, names).tensors(config_of("llama"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide", "chat.jsonl", "--dora"), "--dora needs --lora RANK"),
        (("wide", "chat.jsonl", "--lora", "0"), "--lora"),
        (("wide", "chat.jsonl", "--lora", "4", "--lora-targets", "q_prj"), "no linear layer 'q_prj' in a llama"),
        (("wide", "chat.jsonl", "--lora", "4", "--lora-plus", "0"), "--lora-plus 0.0 is not above 0"),
        (("adapter", "chat.jsonl", "--lora", "4"), "llmkit average ADAPTER --merge-adapter"),
    ],
)
def test_wrong_calls(
    place: Path, adapter: Path, capfd: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    """Behaviour: an error that says what to do, and no run."""
    (place / "adapter").symlink_to(adapter)
    assert call("sft", *arguments, "-o", "run") in (1, 2)
    assert message in capfd.readouterr().err
    assert not (place / "run").exists()


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters of `wide`, of q_proj."""
    from llmkit.model.pretrained.adapter import save_adapter

    model = load_for_adapting(wide, LoraConfig(2, 4.0, ("q_proj",)), 0)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    path.mkdir()
    save_adapter(path, model.trained_state(), model.config, model.adapter, load_info(wide).tokenizer_files)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj."
HOSTILE: dict[str, tuple[Any, str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "rank": ({"r": 10**9}, "r is 1000000000"),
    "rank of another": ({"r": 3}, f"tensor {Q}lora_A.weight is F32 [2, 32], not F32 [3, 32]"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    "alpha not finite": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    "a key of the future": ({"use_magic": True}, "use_magic is not supported"),
    "an initial value that changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "expression": ({"target_modules": "(a+)+$"}, "target_modules is '(a+)+$'"),
    "expression of ranks": ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern is"),
    "other targets": ({"target_modules": ["v_proj"]}, f"unexpected tensor {Q.removeprefix('base_model.model.')}lora_A"),
    "no layer": ({"target_modules": ["x"]}, "not adapters of the layers of a llama"),
    "missing magnitude": ({"use_dora": True}, f"missing tensor {Q}lora_magnitude_vector"),
    "missing": (lambda t: t.pop(f"{Q}lora_B.weight"), f"missing tensor {Q}lora_B.weight"),
    "names": (lambda t: t.update({"../../x": t.pop(f"{Q}lora_B.weight")}), "tensor ../../x is not named as in PEFT"),
    "whole layer": (lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(2, 2)}), "whole layers beside adapters are not supported"),
    "type": (lambda t: t.update({f"{Q}lora_B.weight": torch.zeros(64, 2, dtype=torch.int32)}), "is I32 [64, 2]"),
    "shape": (lambda t: t.update({f"{Q}lora_B.weight": torch.zeros(2, 64)}), "is F32 [2, 64], not F32 [64, 2]"),
    "not finite": (lambda t: t[f"{Q}lora_B.weight"].fill_(math.nan), "contains nan"),
    "no base": ({"base_model_name_or_path": "someone/model"}, "the adapted model 'someone/model' is not here"),
    "base": ({"base_model_name_or_path": ["wide"]}, "base_model_name_or_path is ['wide']"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_adapters(place: Path, adapter: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    """Behaviour: one line that names the key or tensor, exit code 1, and nothing is written."""
    change, message = HOSTILE[case]
    copy = Path(shutil.copytree(adapter, place / "copy", ignore=shutil.ignore_patterns("state")))
    if callable(change):
        rewritten(copy, change)
    else:
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
    assert call("average", "copy", "--merge-adapter", "-o", "merged") == 1
    error = capfd.readouterr().err
    assert message in error and "internal error" not in error
    assert not (place / "merged").exists()


def test_another_base_is_refused(
    place: Path, adapter: Path, make_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: a model of the same shapes with other weights is not taken for the base, nor are pickles read, nor several
    models, options of methods, or a model without adapters accepted."""
    make_model(place / "other", seed=5, architecture="llama", max_position_embeddings=96)
    (place / "adapter").symlink_to(adapter)
    assert call("average", "adapter", "--merge-adapter", "--base", "other", "-o", "merged") == 1
    assert "other has other weights than the model that was adapted" in capfd.readouterr().err
    pickled = Path(shutil.copytree(adapter, place / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for arguments, message in (
        (["pickled"], "only pickled weights (adapter_model.bin)"),
        (["adapter", "wide"], "--merge-adapter does not take several models"),
        (["adapter", "--method", "ema"], "--merge-adapter does not take --method"),
        (["wide"], "wide holds no adapters"),
    ):
        assert call("average", *arguments, "--merge-adapter", "-o", "merged") in (1, 2)
        assert message in capfd.readouterr().err
    assert not (place / "merged").exists()


def test_an_adapter_is_no_base(place: Path, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: adapters whose model has moved, and that are found under its name, or name each other, end in one line."""
    for name in ("final", "other"):
        copy = Path(shutil.copytree(adapter, place / "run" / name, ignore=shutil.ignore_patterns("state")))
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    for path, base, message in (
        ("run/final", "final", "the adapted model 'final' is not here"),
        ("run/other", "final", "holds adapters itself"),
        ("run/final", "other", "holds adapters itself"),
    ):
        config = json.loads((place / path / "adapter_config.json").read_text())
        (place / path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        for command in (["average", path, "--merge-adapter", "-o", "merged"], ["generate", path, "-p", "a"]):
            assert call(*command) == 1
            assert message in capfd.readouterr().err


def test_what_a_run_says_of_adapters(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: -v prints how PEFT takes them; a dry run reads --prompts, and held-out rows with a name; few steps are noted."""
    assert (
        run_command("sft", ["wide", "chat.jsonl", "--lora", "2", "--chat-template", "llama-3", "-n", "-v", "-o", "x"])
        == 0
    )
    said = capfd.readouterr().err
    assert "in PEFT: AutoModelForCausalLM.from_pretrained('wide')" in said
    assert run_command("sft", ["wide", "chat.jsonl", "-n", "--prompts", "none.txt", "-o", "x"]) == 1
    assert "none.txt" in capfd.readouterr().err
    assert run_command("sft", ["wide", "chat.jsonl", "-n", "--heldout", "mine=chat.jsonl", "-o", "x"]) == 0
    assert "only " in capfd.readouterr().err
