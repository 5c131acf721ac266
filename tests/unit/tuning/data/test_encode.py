"""Examples have the tokens that serving makes of the same input, and what is to be learnt of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.tokenizer import Tokenizer
from server.errors import DatasetInvalid
from server.tuning.spec import Example
from server.types import TextPiece
from tests.unit.tuning.data.preparing import Job

# Like Qwen3's: of earlier answers the template drops what it writes before the last one.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thought)\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def shown(job: Job, example: Example) -> tuple[str, list[str]]:
    """An example's text, and the parts that are learnt."""
    decode = job.tokenizer.decode
    parts = [decode(example.tokens[start:end], False) for start, end in example.learn]
    return decode(example.tokens, False), parts


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_prompt_and_completion(decoder: Job) -> None:
    found = decoder.prepare("generate", [{"prompt": "ab", "completion": " cd"}])
    (example,) = decoder.examples()
    tokenizer = decoder.tokenizer
    assert example.tokens[:2] == tokenizer.encode("ab")
    assert shown(decoder, example) == ("ab cd<|end|>", [" cd<|end|>"])
    assert (found.training.learnt, found.training.tokens) == (4, 6)


def test_control_tokens_of_completions_are_text(decoder: Job) -> None:
    decoder.prepare("generate", [{"prompt": "<|start|>a", "completion": "<|end|>"}])
    (example,) = decoder.examples()
    (start, end), prompt = example.learn[0], decoder.tokenizer.encode("<|start|>a")
    assert example.tokens[:start] == prompt
    assert len(prompt) == 2
    assert example.tokens[start:end].count(0) == 1
    assert end - start == len("<|end|>") + 1


@pytest.mark.parametrize(
    ("template", "text", "learnt"),
    [
        (None, "ab cd<|end|>", " cd<|end|>"),
        ("Q: {text}\nA:", "Q: ab\nA: cd<|end|>", " cd<|end|>"),
        ("{text}\n", "ab\ncd<|end|>", "cd<|end|>"),
        (
            [say("developer", "Name it."), say("user", "{text}")],
            "<|start|>system\nName it.<|end|>\n<|start|>user\nab<|end|>\n<|start|>assistant\ncd<|end|>",
            "cd<|end|>",
        ),
    ],
)
def test_labels_as_texts(decoder: Job, template: Any, text: str, learnt: str) -> None:
    decoder.prepare("generate", [{"text": "ab", "label": "cd"}], template=template, max_length=100)
    assert [shown(decoder, example) for example in decoder.examples()] == [(text, [learnt])]


def test_conversations(decoder: Job) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [
        say("system", "s"),
        say("user", parts),
        say("assistant", "one"),
        say("user", "x"),
        say("assistant", "two", weight=0),
        say("user", "y"),
        say("assistant", "three", weight=1),
    ]
    decoder.prepare("generate", [{"messages": messages}], max_length=200)
    (example,) = decoder.examples()
    text, learnt = shown(decoder, example)
    assert learnt == ["one<|end|>", "three<|end|>"]
    assert text.startswith(
        "<|start|>system\ns<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\none<|end|>\n"
    )
    plain = [
        {"role": m["role"], "content": "hi" if m["content"] is parts else m["content"]} for m in messages
    ]
    for place, (start, _) in zip((2, 6), example.learn, strict=True):
        assert example.tokens[:start] == decoder.tokenizer.render(plain[:place])


def test_a_template_that_forgets_makes_an_example_of_each_turn(
    decoder: Job, tmp_path: Path, llama: Tokenizer
) -> None:
    llama._chat.save_pretrained(tmp_path / "forgetful")
    (tmp_path / "forgetful" / "chat_template.jinja").write_text(FORGETFUL)
    job = Job(tmp_path, Tokenizer(tmp_path / "forgetful"), "decoder")
    messages = [say("user", "x"), say("assistant", "one"), say("user", "y"), say("assistant", "two")]
    found = job.prepare("generate", [{"messages": messages}], max_length=200)
    assert [shown(job, example)[1] for example in job.examples()] == [
        ["(thought)\none<|end|>"],
        ["(thought)\ntwo<|end|>"],
    ]
    assert [warning.code for warning in found.warnings] == ["split"]
    assert (found.training.rows, found.training.examples) == (1, 2)


@pytest.mark.parametrize(
    ("messages", "field", "code"),
    [
        ([], "messages", "wrong_type"),
        ("hi", "messages", "wrong_type"),
        (["hi"], "messages[0]", "wrong_type"),
        ([say("user", "x")], "messages[0].role", "last_message"),
        ([say("tool", "x")], "messages[0].role", "invalid_role"),
        ([say("user", None), say("assistant", "x")], "messages[0].content", "missing_field"),
        ([say("user", 5), say("assistant", "x")], "messages[0].content", "wrong_type"),
        ([say("user", [{"type": "image_url"}]), say("assistant", "x")], "messages[0].content", "wrong_type"),
        ([say("user", "x"), say("assistant", "")], "messages[1].content", "empty"),
        ([say("user", "x"), say("assistant", "x", weight=2)], "messages[1].weight", "invalid_weight"),
        ([say("user", "x", weight=1), say("assistant", "x")], "messages[0].weight", "invalid_weight"),
        ([say("user", "x"), say("assistant", "x", weight=0)], "messages", "nothing_to_learn"),
        (
            [say("user", "x"), say("assistant", "x", tool_calls=[{}])],
            "messages[1].tool_calls",
            "unsupported_field",
        ),
        ([say("user", "x"), say("assistant", "x", wieght=0)], "messages[1]", "unsupported_field"),
    ],
)
def test_bad_conversations(decoder: Job, messages: Any, field: str, code: str) -> None:
    with pytest.raises(DatasetInvalid) as caught:
        decoder.prepare("generate", [{"messages": messages}])
    assert [(row.field, row.code) for row in caught.value.rows] == [(field, code)]


def test_long_examples_of_a_decoder(decoder: Job) -> None:
    rows = [{"prompt": "a" * 10, "completion": "b" * 20}, {"prompt": "a" * 10, "completion": "b" * 5}]
    found = decoder.prepare("generate", rows, max_length=16)
    cut, whole = decoder.examples()
    assert shown(decoder, cut) == ("a" * 10 + "b" * 6, ["b" * 6])
    assert shown(decoder, whole)[1] == ["bbbbb<|end|>"]
    assert [(w.code, w.count, w.lines) for w in found.warnings] == [("truncated", 1, [1])]
    with pytest.raises(DatasetInvalid) as caught:
        decoder.prepare("generate", rows, positions=10)
    assert [(row.line, row.code) for row in caught.value.rows] == [
        (1, "completion_cut"),
        (2, "completion_cut"),
    ]


def test_an_encoder_reads_as_a_task_does(encoder: Job) -> None:
    rows = [
        {"a": "w5 [MASK]", "b": "w6 w7", "label": 0.5},
        {"a": "w8", "b": " ".join(["w9"] * 20), "label": "-1"},
    ]
    encoder.prepare("regress", rows, template=["{a}", "{b}!"], max_length=12)
    for row, example in zip(rows, encoder.examples(), strict=True):
        pieces = [[TextPiece(str(row["a"]), False)], [TextPiece(str(row["b"]), False), TextPiece("!", True)]]
        served = encoder.tokenizer.encode_pieces(pieces, 12)
        assert (example.tokens, example.types) == (served.ids, served.types)
        assert example.label == float(row["label"])
    encoder.prepare("regress", [{"text": "w5", "label": 1}])
    assert encoder.examples() == [Example(tokens=[3, 5, 4], label=1.0)]


def test_a_field_by_its_own_name_or_as_text(encoder: Job) -> None:
    for name in ("review", "text"):
        encoder.prepare("regress", [{name: "w5", "label": 1}], template="{review} w6")
        assert encoder.examples()[0].tokens == [3, 5, 6, 4]


def test_an_encoder_decoder(seq2seq: Job) -> None:
    rows = [{"prompt": "w5 w6", "completion": "w7 w8"}, {"prompt": " ".join(["w5"] * 20), "completion": "w7"}]
    found = seq2seq.prepare("generate", rows, max_length=8)
    one, cut = seq2seq.examples()
    assert one == Example(
        tokens=seq2seq.tokenizer.encode("w5 w6"), target=[*seq2seq.tokenizer.encode("w7 w8")]
    )
    assert cut.tokens == seq2seq.tokenizer.encode_within(rows[1]["prompt"], 8)
    assert [warning.code for warning in found.warnings] == ["truncated"]
    seq2seq.prepare("generate", [{"text": "w5", "label": "w7"}], template="{text} w6")
    assert seq2seq.examples() == [
        Example(tokens=seq2seq.tokenizer.encode("w5 w6"), target=seq2seq.tokenizer.encode("w7"))
    ]
    seq2seq.prepare("classify", [{"text": "w5", "label": "x"}, {"text": "w6", "label": "y"}])
    assert [example.label for example in seq2seq.examples()] == [0, 1]
