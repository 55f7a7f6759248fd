"""Chat templates and loss masks: rendering, spans, stop tokens."""

from __future__ import annotations

import pytest

from llmkit.chat.encode import trained_parts
from llmkit.chat.masks import assistant_spans, encode_chat, stop_token_ids
from llmkit.chat.rows import Conversation
from llmkit.chat.templates import (
    CHATML,
    TULU,
    default_template,
    render,
    special_contents,
    tokenizer_of,
    with_template,
)
from llmkit.errors import LlmkitError

Templates = dict[str, dict[str, str]]
STOP = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "tulu": "<|endoftext|>", "qwen3": "<|im_end|>"}
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is the weather?"},
    {"role": "assistant", "content": "it is sunny"},
    {"role": "user", "content": "it is sunny?"},  # the same words in another role
    {"role": "assistant", "content": "it is sunny today"},
]


def learned(files: dict[str, str], messages: list[dict[str, object]], **more: object) -> list[str]:
    """The pieces of text on which the loss counts, decoded from the tokens."""
    row = encode_chat(messages, files, **more)  # type: ignore[arg-type]
    tokenizer, pieces, current = tokenizer_of(files), [], []
    for token, weight in zip([*row.tokens.tolist(), -1], [*row.weights.tolist(), 0.0], strict=True):
        if weight:
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current, skip_special_tokens=False))
            current = []
    return pieces


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu"])
def test_loss_counts_content_and_stop_token_only(templates: Templates, name: str) -> None:
    """Behaviour: assistant content and end of turn, in every turn; not the header, the newline behind, or other roles."""
    stop = STOP[name]
    assert learned(templates[name], CONVERSATION) == [f"it is sunny{stop}", f"it is sunny today{stop}"]


def test_content_that_the_template_trims(templates: Templates) -> None:
    """Behaviour: where a template changes the content, the span is what it made of it."""
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "\n it is \n"}]
    assert learned(templates["llama3"], messages) == ["it is<|eot_id|>"]
    assert learned(templates["chatml"], messages) == ["\n it is \n<|im_end|>"]


def test_thoughts_are_learned_where_they_are_shown(templates: Templates) -> None:
    """Behaviour: a template that drops earlier thoughts and adds empty ones: the span starts where generation would."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nfirst"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "<think>\nnew\n</think>\n\nsecond"},
    ]
    assert learned(templates["qwen3"], messages) == [
        "first<|im_end|>",
        "<think>\nnew\n</think>\n\nsecond<|im_end|>",
    ]
    plain = [*messages[:3], {"role": "assistant", "content": "second"}]
    assert learned(templates["qwen3"], plain)[-1] == "<think>\n\n</think>\n\nsecond<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_tool_calls_are_learned_and_answers_are_not(templates: Templates, name: str) -> None:
    """Behaviour: a call is what the assistant says; the tool's answer is not."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "it is sunny"},
    ]
    found = learned(templates[name], messages)
    assert found[0].startswith("\n<tool_call>\n{")
    assert found[0].endswith("</tool_call><|im_end|>")
    assert "Paris" in found[0]
    assert found[1].endswith("it is sunny<|im_end|>")
    assert len(found) == 2


def test_weights_of_messages(templates: Templates) -> None:
    """Behaviour: `train: false` and `weight: 0` leave a turn out, other weights are kept."""
    messages = [dict(m) for m in CONVERSATION]
    messages[2]["train"] = False
    assert learned(templates["chatml"], messages) == ["it is sunny today<|im_end|>"]
    messages[4]["weight"] = 0.25
    row = encode_chat(messages, templates["chatml"])
    assert set(row.weights.tolist()) == {0.0, 0.25}
    shown = render(messages, templates["chatml"], False)
    assert "0.25" not in shown


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu", "qwen3"])
def test_span_starts_where_generation_does(templates: Templates, name: str) -> None:
    """Property: tokens before the first learned one are exactly the prompt that `generate` would encode."""
    messages = CONVERSATION[1:3]
    row = encode_chat(messages, templates[name])
    first = int(row.weights.nonzero()[0][0])
    prompt = render(messages[:1], templates[name], True)
    assert row.tokens[:first].tolist() == tokenizer_of(templates[name]).encode(prompt, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu", "qwen3"])
def test_rendering_is_that_of_transformers(templates: Templates, name: str, tmp_path: object) -> None:
    """Parity: transformers' apply_chat_template, with and without generation prompt, text and ids."""
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    for file, text in templates[name].items():
        (Path(str(tmp_path)) / file).write_text(text)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for prompt in (False, True):
        expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
        assert render(CONVERSATION, templates[name], prompt) == expected
    ids = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert encode_chat(CONVERSATION, templates[name]).tokens.tolist() == ids


def test_generation_tag_filters_and_functions(files: dict[str, str]) -> None:
    """Behaviour: what templates in the wild use: generation tag, tojson without HTML escapes, loop controls, namespace, dates."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    from datetime import datetime

    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "<é>"}]
    assert render(messages, with_template(files, template), False, now=datetime(2001, 1, 1)) == '"<é>"2001'


def test_training_does_not_depend_on_the_day(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: a template that prints the date gives the same row whenever it is rendered."""
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    row = encode_chat(CONVERSATION, with_template(files, template))
    text = tokenizer_of(files).decode(row.tokens.tolist(), skip_special_tokens=False)
    assert text.startswith("26 Jul 2024")


def test_template_without_stop_token_is_refused(files: dict[str, str]) -> None:
    """Behaviour: a model trained on it would never stop."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(LlmkitError, match="no stop token after the assistant's content"):
        assistant_spans(CONVERSATION, with_template(files, template))
    inside = "{% for m in messages %}{{ m.content + ' (said ' + m.role + ')<|im_end|>' }}{% endfor %}"
    with pytest.raises(LlmkitError, match="no stop token"):
        assistant_spans(CONVERSATION, with_template(files, inside))


def test_template_that_hides_the_content_is_refused(files: dict[str, str]) -> None:
    """Behaviour: content shown twice, or not at all, cannot be masked."""
    for body, times in (("{{ m.content + m.content }}<|im_end|>", 2), ("<|im_end|>", 0)):
        with pytest.raises(LlmkitError, match=f"content {times} times"):
            assistant_spans(CONVERSATION, with_template(files, "{% for m in messages %}" + body + "{% endfor %}"))


def test_hostile_templates_stay_in_the_sandbox(files: dict[str, str]) -> None:
    """Behaviour: a template can neither reach Python's internals nor change what it is given."""
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('only user') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ undefined.field }}",
        "{% broken",
    ):
        with pytest.raises(LlmkitError, match="chat template fails"):
            render(CONVERSATION, with_template(files, template), False)


def test_stop_ids_and_default_template(templates: Templates, files: dict[str, str]) -> None:
    """Behaviour: end of turn first, then end of text; ChatML where the vocabulary has its tokens, else Tulu's."""
    ids = special_contents(files)
    assert stop_token_ids(templates["chatml"]) == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert stop_token_ids(templates["llama3"]) == [ids["<|eot_id|>"], ids["<|endoftext|>"]]
    assert stop_token_ids(templates["tulu"]) == stop_token_ids(files) == [ids["<|endoftext|>"]]
    assert default_template(files).name == "chatml"
    without = files | {"tokenizer.json": files["tokenizer.json"].replace("<|im_start|>", "<|other|>")}
    assert default_template(without).name == "tulu"
    assert learned(with_template(without, TULU), CONVERSATION[1:3]) == ["it is sunny<|endoftext|>"]
    with pytest.raises(LlmkitError, match="no chat template"):
        render(CONVERSATION, files, True)


def test_named_templates_in_tokenizer_config(files: dict[str, str]) -> None:
    """Behaviour: a list of templates by name; `tool_use` where there are tools."""
    import json

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    config = json.dumps(json.loads(files["tokenizer_config.json"]) | {"chat_template": named})
    both = files | {"tokenizer_config.json": config}
    assert render(CONVERSATION, both, False) == "plain"
    assert render(CONVERSATION, both, False, tools=[{}, {}]) == "tools 2"


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "another template"),
        ("{{ messages[0].a.b }}", "messages"),
        ("{{ raise_exception('no') }}", "messages"),
    ],
)
def test_hints_name_what_is_to_blame(template: str, hint: str) -> None:
    """Behaviour: a template that does what none needs is to blame itself, one that lacks a field is not."""
    with pytest.raises(LlmkitError) as error:
        render([{"role": "user", "content": "x"}], {"chat_template.jinja": template}, add_generation_prompt=False)
    assert hint in error.value.hint


CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "owl"}}}],
}
KINDS = {
    "content": ({"role": "system", "content": "be brief"}, "content of message 1"),
    "tool_calls": (CALLED, "tool_calls of message 1"),
    "reasoning_content": (
        {"role": "assistant", "content": "yes", "reasoning_content": "it is so"},
        "reasoning_content of message 1",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_template_does_not_show(files: dict[str, str], kind: str) -> None:
    """Behaviour: a field that the template leaves out is named with its message; with `lossy` the rest is trained."""
    shown, only = (
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}",
        "{% if m.role != 'system' %}" if kind == "content" else "{% if 1 %}",
    )
    partial = with_template(files, f"{{% for m in messages %}}{only}{shown}{{% endif %}}{{% endfor %}}")
    message, named = KINDS[kind]
    messages = [message, *CONVERSATION[1:3]]
    with pytest.raises(LlmkitError, match=f"does not show {named}\n") as error:
        encode_chat(messages, partial)
    assert "--lossy" in error.value.hint
    row = encode_chat(messages, partial, lossy=True)
    assert row.lost == (kind,) and row.trained
    assert encode_chat(CONVERSATION[1:], partial).lost == ()


def test_a_second_call_that_is_dropped(files: dict[str, str]) -> None:
    """Behaviour: a template that shows the first call of several loses the others."""
    one = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    first = with_template(
        files, "{% for m in messages %}{{ m.role + m.content }}" + one + "{{ '<|im_end|>' }}{% endfor %}"
    )
    function = {"name": "smell", "arguments": {"at": "rose"}}
    twice = CALLED | {"tool_calls": [*CALLED["tool_calls"], {"type": "function", "function": function}]}  # type: ignore[misc]
    assert encode_chat([CONVERSATION[1], CALLED], first).lost == ()
    with pytest.raises(LlmkitError, match="tool_calls of message 2"):
        encode_chat([CONVERSATION[1], twice], first)


@pytest.mark.parametrize("template", [CHATML, TULU])
def test_tools_in_the_templates_of_llmkit(files: dict[str, str], template: str) -> None:
    """Behaviour: the schemas follow the conversation's instruction, or stand alone; calls are trained, results are not."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    ours, result = with_template(files, template), {"role": "tool", "content": "a bird"}
    messages = [*CONVERSATION[:2], CALLED, result, CONVERSATION[2]]
    stop = "<|im_end|>" if template == CHATML else "<|endoftext|>"
    call = '\n<tool_call>\n{"name": "look", "arguments": {"at": "owl"}}\n</tool_call>'
    assert learned(ours, messages, tools=tools) == [call + stop, "it is sunny" + stop]
    shown = [render(messages[start:], ours, False, tools) for start in (0, 1)]
    assert shown[0].count("be brief") == 1 and shown[0].index("be brief") < shown[0].index("<tools>")
    assert shown[0].replace("be brief\n\n", "") == shown[1]


def test_tools_that_are_not_shown(templates: Templates) -> None:
    """Behaviour: schemas of tools that the template does not mention are named."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    with pytest.raises(LlmkitError, match="does not show tools\n"):
        encode_chat(CONVERSATION, templates["llama3"], tools)


def test_parts_and_json_arguments(files: dict[str, str]) -> None:
    """Behaviour: templates that take content in parts, or arguments as a string, get them so, in prompts too."""
    parts = "{% for m in messages %}{{ m.role + ': ' }}{% for p in m.content %}{{ p['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    assert learned(with_template(files, parts), CONVERSATION[1:3]) == ["it is sunny<|im_end|>"]
    assert render(CONVERSATION[1:2], with_template(files, parts), True) == "user: what is the weather?<|im_end|>"
    text = "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    joined = with_template(
        files, "{% for m in messages %}{{ m.role + m.content }}" + text + "{{ '<|im_end|>' }}{% endfor %}"
    )
    assert learned(joined, [CONVERSATION[1], CALLED]) == ['look{"at": "owl"}<|im_end|>']


def test_which_turns_are_trained(templates: Templates) -> None:
    """Behaviour: all turns in one row, the last one, or each as the last of its own row, as it is generated."""
    conversation = Conversation(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<think>\nold\n</think>\n\nfirst"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "<think>\nnew\n</think>\n\nsecond"},
        ]
    )

    def trained(which: str) -> list[list[str]]:
        return [learned(templates["qwen3"], part.messages) for part in trained_parts(conversation, which)]

    first, old, second = (
        "first<|im_end|>",
        "<think>\nold\n</think>\n\nfirst<|im_end|>",
        "<think>\nnew\n</think>\n\nsecond<|im_end|>",
    )
    assert trained("all") == [[first, second]]
    assert trained("last") == [[second]]
    assert trained("turns") == [[old], [second]]
    conversation.messages[3]["train"] = False
    assert trained("turns") == [[old]] and trained("last") == [[]]


def test_short_content_that_stands_elsewhere(files: dict[str, str]) -> None:
    """Behaviour: a message is not taken as shown because its few letters are in another one."""
    partial = with_template(
        files,
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
    )
    with pytest.raises(LlmkitError, match="content of message 1"):
        encode_chat([{"role": "system", "content": "is"}, *CONVERSATION[1:3]], partial)
