"""The chat templates that TRL collects from model repositories, and what each of them should train on.

The tokenizer of each has the control tokens that its template names.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

from llmkit.chat.masks import encode_chat
from llmkit.chat.templates import tokenizer_of, with_template
from llmkit.errors import LlmkitError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "looks a word up",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "the word"}},
                "required": ["word"],
            },
        },
    }
]
CALL = {"type": "function", "id": "call12345", "function": {"name": "look_up", "arguments": {"word": "owl"}}}
QUESTIONS = [{"role": "user", "content": "first question"}, {"role": "user", "content": "second question"}]
TEXT = [
    QUESTIONS[0],
    {"role": "assistant", "content": "first answer"},
    QUESTIONS[1],
    {"role": "assistant", "content": "second answer"},
]
SYSTEM = [{"role": "system", "content": "an instruction"}, *TEXT]
TOOL = [
    QUESTIONS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look_up", "tool_call_id": "call12345", "content": "a bird"},
    {"role": "assistant", "content": "second answer"},
]
REASONING = [QUESTIONS[0], {"role": "assistant", "content": "first answer", "reasoning_content": "a thought"}]

JSON_CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "owl"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=look_up>\n<parameter=word>\nowl\n</parameter>\n</function>\n</tool_call>"
GEMMA_CALL = '<|tool_call>call:look_up{word:<|"|>owl<|"|>}<tool_call|>'
LLAMA_CALL = '{"name": "look_up", "parameters": {"word": "owl"}}'
LFM_CALL = "<|tool_call_start|>[look_up(word='owl')]<|tool_call_end|>"
DEEPSEEK_CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n{"word": "owl"}\n```<｜tool▁call▁end｜>'
MUSE_CALL = (
    ' to=look_up<|message|><atem:function_calls>\n<atem:invoke name="look_up">\n<atem:parameter name="word">owl'
    "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>"
)
GLM_CALL = "<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>owl</arg_value>\n</tool_call>"
CHATML, THINK = "<|im_end|>", "</think>\n\n"
NOT_SHOWN = "!the chat template does not show"
ALTERNATE, TWO_ROLES = (
    "!{}: the chat template fails: Conversation roles must alternate",
    "!{}: the chat template fails: Only user and",
)
NO_STOP = "!the chat template puts no stop token after tool calls"


class Stock(NamedTuple):
    """What is trained of answers ({} is the content; "first" of earlier ones), of a call, and of an answer with reasoning,
    or with "!" the beginning of the error. `system`: the error where a system message is refused."""

    eos: str
    answer: str
    call: str = NOT_SHOWN + " tools, tool_calls of message 2"
    reasoning: str = NOT_SHOWN + " reasoning_content of message 2"
    first: str = ""
    system: str = ""


_PHI = Stock("<|endoftext|>", "{}<|end|>", NOT_SHOWN + " tools, tool_calls of message 2, content of message 3")
_GEMMA4 = Stock("<eos>", "{}<turn|>", GEMMA_CALL + "<|tool_response>")
_THOUGHT = "<|channel>thought\na thought\n<channel|>first answer<turn|>"
_LFM = Stock(CHATML, "{}" + CHATML, LFM_CALL + CHATML, "<think>a thought</think>first answer" + CHATML)
_LLAMA = Stock("<|eot_id|>", "{}<|eot_id|>", LLAMA_CALL + "<|eot_id|>")
_QWEN = Stock(CHATML, "{}" + CHATML, JSON_CALL + CHATML)
_NEMOTRON = Stock(CHATML, "{}" + CHATML, f"\n{XML_CALL}\n{CHATML}", "a thought\n</think>\nfirst answer" + CHATML)
_TERSE = _NEMOTRON._replace(reasoning="a thought</think>first answer" + CHATML)
_QWEN35 = Stock(
    CHATML,
    "\n" + THINK + "{}" + CHATML,
    "\n" + THINK + XML_CALL + CHATML,
    "a thought\n" + THINK + "first answer" + CHATML,
)
_COHERE = Stock("<|END_OF_TURN_TOKEN|>", "{}<|END_OF_TURN_TOKEN|>", ALTERNATE.format("chat_template.jinja:1"))
_DEEPSEEK = Stock("<｜end▁of▁sentence｜>", "{}<｜end▁of▁sentence｜>", NO_STOP)
STOCK = {
    "cohere": _COHERE,
    "cohere2": _COHERE._replace(
        answer="{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", call=ALTERNATE.format("chat_template.jinja:20")
    ),
    "deepseek_r1_distill": _DEEPSEEK,  # it forgets what ends a single call
    "deepseekv3": _DEEPSEEK._replace(call=DEEPSEEK_CALL + "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"),
    "diffusion_gemma": _GEMMA4._replace(reasoning=_THOUGHT),
    "gemma": Stock(
        "<eos>", "{}<end_of_turn>", ALTERNATE.format("chat_template.jinja:1"), system="System role not supported"
    ),
    "gemma3": Stock("<eos>", "{}<end_of_turn>", ALTERNATE.format("chat_template.jinja:19")),
    "gemma4": _GEMMA4,
    "gemma4_v2": _GEMMA4._replace(call=GEMMA_CALL + "<turn|>"),
    "gemma4_v3": _GEMMA4,
    "gemma4_v4": _GEMMA4,
    "gemma4_v5": _GEMMA4._replace(reasoning=_THOUGHT),
    "glm4moe": Stock(
        "<|endoftext|>",
        "\n<think></think>\n{}<|user|>",
        f"\n<think></think>\n{GLM_CALL}<|observation|>",
        "\n<think>a thought</think>\nfirst answer<|user|>",
    ),
    "gptoss": Stock(
        "<|return|>",
        "<|channel|>final<|message|>{}<|return|>",
        ' to=functions.look_up<|channel|>commentary json<|message|>{"word": "owl"}<|call|>',
        "<|channel|>analysis<|message|>a thought<|end|><|start|>assistant<|channel|>final<|message|>first answer<|return|>",
        first="<|channel|>final<|message|>{}",  # what ends it there would not end it as an answer
    ),
    "idefics3": Stock("<end_of_utterance>", " {}<end_of_utterance>"),
    "lfm2": Stock(CHATML, "{}" + CHATML, NOT_SHOWN + " tool_calls of message 2"),
    "lfm2_2_5": _LFM,
    "lfm2_2_5_v2": _LFM,
    "lfm2_2_5_vl": _LFM,
    "lfm2_v2": _LFM._replace(reasoning=NOT_SHOWN + " reasoning_content of message 2"),
    "llama3": Stock("<|eot_id|>", "{}<|eot_id|>"),
    "llama3_1": _LLAMA,
    "llama3_2": _LLAMA,
    "llava_next": Stock("</s>", " {}</s>", TWO_ROLES.format("chat_template.jinja:6")),
    "muse_glimmer": Stock(
        "<|eot|>",
        " to=user<|message|>{}<|eot|>",
        MUSE_CALL + "<|eot|>",
        " to=self<|message|>a thought<|eom|><|start|>assistant to=user<|message|>first answer<|eot|>",
    ),
    "nemotron_3_5_lightning": _TERSE,
    "nemotron_3_nano": _NEMOTRON,
    "nemotron_3_super": _NEMOTRON,
    "nemotron_3_ultra": _TERSE,
    "phi3": _PHI,
    "phi3_5": _PHI,
    "qwen2_5": _QWEN,
    "qwen2_5_vl": Stock(CHATML, "{}" + CHATML),
    "qwen3": _QWEN._replace(
        answer="<think>\n\n" + THINK + "{}" + CHATML,
        reasoning="<think>\na thought\n" + THINK + "first answer" + CHATML,
        first="{}" + CHATML,
    ),
    "qwen3_5_nothink": _QWEN35._replace(answer="{}" + CHATML, call=XML_CALL + CHATML),
    "qwen3_5_think": _QWEN35._replace(first="{}" + CHATML),
    "qwen3_6": _QWEN35._replace(first="{}" + CHATML),
    "qwen3_8": _QWEN35,
    "qwen3_instruct_2507": _QWEN,
    "qwen3_vl": _QWEN,
    "smolvlm": Stock("<end_of_utterance>", " {}<end_of_utterance>"),
}
PATTERN = re.compile(
    r"<\|?[A-Za-z_/][A-Za-z0-9_/:.-]*\|?>|<｜[^｜]*｜>|\[/?[A-Z_]+\]|<\|[^|>]*\|>|<\|[a-z_]+>|<[a-z_]+\|>"
)
TEXTUAL = re.compile(
    r"</?(function|parameter|tools|IMPORTANT|tool_call>|tool_response>|tool_output|think|name|description|arg_|required|atem)"
)


def names() -> list[str]:
    """The stock templates: those that TRL has not changed for training."""
    return sorted(path.stem for path in _directory().glob("*.jinja") if not path.stem.endswith("_training"))


def training_names() -> list[str]:
    """Those that TRL has marked for training."""
    return sorted(path.stem for path in _directory().glob("*_training.jinja"))


def files_of(name: str) -> dict[str, str]:
    """The files of a tokenizer with every byte as a token, and this template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    template, eos = (
        (_directory() / f"{name}.jinja").read_text(encoding="utf-8"),
        STOCK[name.removesuffix("_training")].eos,
    )
    found = {token for token in PATTERN.findall(template) if not TEXTUAL.match(token)}
    controls = sorted(found | {eos, "<bos>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(controls)
    config = {"eos_token": eos, "bos_token": "<bos>", "pad_token": "<pad>"}
    return with_template({"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}, template)


def learnt(messages: list[dict], files: dict[str, str], tools: list[dict] | None = None) -> list[str] | str:
    """The texts of the tokens with a loss, or "!" and the error."""
    try:
        row = encode_chat(messages, files, tools)
    except LlmkitError as error:
        assert error.hint
        return "!" + error.message
    pieces: list[list[int]] = [[]]
    for token, weight in zip(row.tokens.tolist(), row.weights.tolist(), strict=True):
        if weight:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    decode = tokenizer_of(files).decode
    return [decode(piece, skip_special_tokens=False) for piece in pieces if piece]


def _directory() -> Path:
    found = importlib.util.find_spec("trl")  # without importing it
    assert found and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "chat_templates"
