"""A step of fine-tuning against TRL's trainer on the same rows and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from test_equal_steps import CONTEXT, micro_batches, step

from llmkit.chat.encode import encode_conversations
from llmkit.chat.templates import CHATML, with_template
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.training.data import PackedSource

TALK = [
    {"messages": [{"role": "system", "content": "be dry"}, {"role": "user", "content": "what is it like"}, {"role": "assistant", "content": "it is sunny"}]},
    {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the weather"}, {"role": "user", "content": "today"}, {"role": "assistant", "content": "is sunny"}]},
]  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_equals_trl(directory: Path, packing: bool) -> None:
    """Parity with TRL's SFTTrainer, its collator and loss: the loss within 1e-5 and the gradients within 1e-5 of their
    norm, with its padding and its packing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    (directory / "talk.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in TALK))
    files = with_template(load_info("base").tokenizer_files, CHATML)
    with DocumentReader(["chat.jsonl", "talk.jsonl"], ReadOptions(text_key=None)) as reader:
        rows = encode_conversations(reader, files, CONTEXT).rows[-8:]
    columns = [
        {"input_ids": row.tokens.tolist(), "completion_mask": (row.weights > 0).astype(int).tolist()} for row in rows
    ]
    settings = SFTConfig(
        "trl", per_device_train_batch_size=len(rows), packing=packing, max_length=CONTEXT, bf16=False, use_cpu=True,
        gradient_checkpointing=False, completion_only_loss=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32, use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.pad_token = tokenizer.eos_token
    trainer: Any = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(columns), processing_class=tokenizer
    )
    (batch,) = trainer.get_train_dataloader()
    their_loss = trainer.compute_loss(model.train(), batch)
    their_loss.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    source = PackedSource([(row.tokens, row.weights) for row in rows], CONTEXT, 100)
    ours = load_model("base", torch.float32)[0].train()
    loss, _ = step(ours, micro_batches(source, 2), source.weight(0))
    assert int((batch["labels"][..., 1:] != -100).sum()) == source.weight(0)
    assert abs(loss - float(their_loss.detach())) <= 1e-5
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == theirs.keys()
    total = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    assert all((gradients[name] - theirs[name]).norm() <= 1e-5 * total for name in theirs)
