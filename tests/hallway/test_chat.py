"""Rendering: user text stays text, ids equal transformers', streams equal wholes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Raw

from attending.chat import Tokenizer
from attending.errors import ContextError, TokenizerError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content and loop.last %}<think>\n{{ message.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if thinking_mode == 'on' %}<think>\n{% endif %}"
)


def raw_tokenizer() -> Raw:
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(
        ["im_start im_end the patient has a fever <| |> think system"] * 9, trainer
    )
    raw.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    )
    raw.add_tokens([AddedToken("    ", special=False, normalized=False)])
    return raw


RAW = raw_tokenizer()


def tokenizer(template: str | None = CHATML) -> Tokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    return Tokenizer(json.loads(RAW.to_str()), config)


def says(*contents: str) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


# Surrogates cannot be encoded; everything else may come from a user.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def is_ordinary(text: str) -> bool:
    """Theirs takes what spells a control string for one; hypothesis knows ours from the code."""
    return not any(name in text for name in (*CONTROL, "<think>", "</think>"))


nasty = st.lists(
    st.sampled_from([*CONTROL, "<think>", "</think>", "<|im_", "start|>", "a", "<", "\ue000"])
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(texts.filter(is_ordinary), min_size=1, max_size=4))
def test_ids_equal_transformers_for_ordinary_text(contents: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=RAW, chat_template=CHATML)
    messages = says(*contents)
    theirs = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert tokenizer().render(messages) == list(theirs["input_ids"])


@settings(max_examples=100, deadline=None)
@given(parts=nasty)
def test_user_text_never_becomes_a_control_token(parts: list[str]) -> None:
    text = "".join(parts)
    ours = tokenizer()
    ids = ours.render(says(text))
    control = {RAW.token_to_id(name) for name in [*CONTROL, "<think>", "</think>"]}
    frame = ours.render(says(""))
    assert [i for i in ids if i in control] == [i for i in frame if i in control]
    assert ours.decode(ids) == ours.decode(frame).replace("user\n", "user\n" + text, 1)


def test_a_control_string_cannot_be_put_together_from_several_texts() -> None:
    template = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}<|im_end|>"
    message = {"role": "user", "content": [{"text": "<|im_"}, {"text": "end|>"}]}
    ids = tokenizer(template).render([message])
    assert ids.count(RAW.token_to_id("<|im_end|>")) == 1 and ids[-1] == RAW.token_to_id(
        "<|im_end|>"
    )


def test_plain_encoding_does_not_match_control_strings_but_keeps_white_space_vocabulary() -> None:
    ours = tokenizer()
    assert RAW.token_to_id("<|im_start|>") not in ours.encode("<|im_start|>")
    assert RAW.token_to_id("    ") in ours.encode("a    b")


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_streamed_text_equals_the_whole(text: str) -> None:
    ours = tokenizer()
    ids = ours.encode(text)
    stream = ours.decoder()
    assert "".join([*(stream.feed(i) for i in ids), stream.finish()]) == text == ours.decode(ids)


def test_a_character_cut_off_in_the_middle_is_shown_as_replaced() -> None:
    ours = tokenizer()
    assert ours.decode(ours.encode("é")[:1]) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode_whole(data: st.DataObject) -> None:
    """A model may write bytes that are no characters; that must neither crash nor change others."""
    ours = tokenizer()
    ids = data.draw(st.lists(st.integers(0, RAW.get_vocab_size() - 1), max_size=12))
    stream = ours.decoder()
    text = "".join([*(stream.feed(i) for i in ids), stream.finish()])
    control = set(ours._by_id)
    if not control & set(ids):
        assert text == RAW.decode(ids, skip_special_tokens=False)
    else:
        assert text == ours.decode(ids)


def test_every_way_into_a_template_is_closed_to_control_strings() -> None:
    template = (
        "{{ tools | tojson }}{{ note }}{{ messages[0].reasoning_content }}"
        "{{ messages[0].tool_calls[0].arguments | tojson }}{{ messages[0].role }}<|im_end|>"
    )
    bad = "<|im_end|>"
    message = {
        "role": "assistant",
        "content": bad,
        "reasoning_content": bad,
        "tool_calls": [{"arguments": {bad: [bad]}}],
    }
    ours = tokenizer(template)
    ids = ours.render([message], tools=[{"name": bad}], note=bad)
    assert ids.count(RAW.token_to_id(bad)) == 1 and ours.decode(ids).count(bad) == 5


def test_control_strings_of_letters_are_escaped_and_other_words_left_alone() -> None:
    definition = json.loads(RAW.to_str())
    extra = {"content": "stop", "special": True, "id": RAW.get_vocab_size()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"].append(flags | extra)
    template = "{% if messages[0].kind == 'some' %}{{ messages[0].content }}{% endif %}stop"
    ours = Tokenizer(definition, {"chat_template": template})
    ids = ours.render([{"role": "user", "kind": "some", "content": "please stop now"}])
    assert ids.count(extra["id"]) == 1 and ids[-1] == extra["id"]
    assert ours.decode(ids) == "please stop now"


def test_a_control_token_may_swallow_the_white_space_around_it() -> None:
    definition = json.loads(RAW.to_str())
    for token in definition["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] == "<|im_end|>"
    ours = Tokenizer(definition, {"chat_template": "a \n<|im_end|>\n b"})
    end = RAW.token_to_id("<|im_end|>")
    assert ours.render(says("")) == [*RAW.encode("a").ids, end, *RAW.encode("b").ids]


def test_text_begins_with_the_tokenizers_own_mark_and_is_never_truncated() -> None:
    raw = Raw.from_str(RAW.to_str())
    begin = ("<|endoftext|>", raw.token_to_id("<|endoftext|>"))
    frame = f"{begin[0]} $A"
    raw.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[begin])
    raw.enable_truncation(4)
    ours = Tokenizer(json.loads(raw.to_str()), {"eos_token": "<|im_end|>", "bos_token": begin[0]})
    text = "the patient has a fever " * 9
    assert ours.encode(text) == [begin[1], *RAW.encode(text).ids]


def test_templates_know_the_special_strings() -> None:
    config = {"bos_token": {"content": "<|im_start|>"}, "chat_template": "{{ bos_token }}x"}
    ours = Tokenizer(json.loads(RAW.to_str()), config)
    assert ours.render(says(""))[0] == RAW.token_to_id("<|im_start|>")


def test_only_the_very_beginning_gets_sentencepieces_space() -> None:
    raw = Raw(models.BPE({"<s>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.add_special_tokens(["<s>"])
    ours = Tokenizer(json.loads(raw.to_str()), {"chat_template": "a<s>a"})
    assert ours.render(says("")) == raw.encode("a<s>a").ids == [3, 0, 2]


def test_special_tokens_are_left_out_and_think_tags_kept_when_decoding() -> None:
    ours = tokenizer()
    ids = [RAW.token_to_id(t) for t in ("<|im_start|>", "<think>", "</think>", "<|im_end|>")]
    assert ours.decode(ids) == "<think></think>"


def test_stop_ids_are_the_end_of_turn() -> None:
    assert tokenizer().stop_ids == {RAW.token_to_id("<|im_end|>")}


def test_reasoning_of_an_earlier_answer_reaches_the_template_as_reasoning() -> None:
    ours = tokenizer(REASONING)
    told = [{"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}]
    assert "<think>\nwhy\n</think>\n\nyes" in ours.decode(ours.render(told))
    asked = [{"role": "user", "content": "<think>\nwhy\n</think>\n\nyes"}]
    assert RAW.token_to_id("</think>") not in ours.render(asked)


def test_template_variables_and_the_open_think_tag() -> None:
    ours = tokenizer(REASONING)
    assert ours.reasons and not tokenizer().reasons
    assert ours.opens_reasoning(ours.render(says("q"), thinking_mode="on"))
    assert not ours.opens_reasoning(ours.render(says("q")))


def test_the_oldest_turns_are_forgotten_first_and_the_system_message_never() -> None:
    ours = tokenizer()
    system = {"role": "system", "content": "be brief"}
    messages = [system, *says("one " * 30, "two " * 30, "three", "four", "five")]
    whole, none = ours.fit(messages, 10_000)
    ids, left_out = ours.fit(messages, 90)
    assert none == 0 and left_out == 2 and len(ids) <= 90 < len(whole)
    assert ids == ours.render([system, *says("three", "four", "five")])


def test_a_very_long_history_is_cut_without_reading_it_a_thousand_times() -> None:
    ours = tokenizer()
    messages = says(*["the patient has a fever"] * 2001)
    renders: list[int] = []
    render = ours.render
    ours.render = lambda m, **v: renders.append(len(m)) or render(m, **v)  # type: ignore[method-assign,func-returns-value]
    ids, left_out = ours.fit(messages, 200)
    assert len(renders) < 20 and left_out % 2 == 0
    assert len(ids) <= 200 < len(render(messages[left_out - 2 :]))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": None, "reasoning": "why"}, "why|"),
        ({"content": "<think>\nold\n</think>\n\nyes", "reasoning_content": None}, "old|yes"),
    ],
)
def test_the_forms_that_clients_send_mean_the_same(given: dict[str, Any], plain: str) -> None:
    template = "{% set m = messages[0] %}{% if m.reasoning_content %}{{ m.reasoning_content }}|"
    template += "{% endif %}{{ m.content }}"
    ours = tokenizer(template)
    assert ours.decode(ours.render([{"role": "assistant", **given}])) == plain


def test_text_that_a_vocabulary_spells_as_control_is_refused() -> None:
    raw = Raw(models.WordLevel({"<s>": 0, "a": 1, "[unk]": 2}, unk_token="[unk]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<s>", "[unk]"])
    config = {"chat_template": "{{ messages[0].content }}", "unk_token": "[unk]"}
    ours = Tokenizer(json.loads(raw.to_str()), config)
    assert ours.render(says("a b")) == [1, 2]
    with pytest.raises(TokenizerError, match="spells a control token"):
        ours.render(says("a <s>"))


def test_a_last_message_that_cannot_fit_is_an_error_that_says_how_much_fits() -> None:
    with pytest.raises(ContextError, match=r"tokens with its frame; 20 fit"):
        tokenizer().fit(says("word " * 50), 20)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([], CHATML, "no messages"),
        ([{"role": "doctor", "content": ""}], CHATML, "role 'doctor' is not one of"),
        ([{"role": "user", "content": "x"}], None, "no chat template"),
        ([{"role": "user", "content": "\ud800"}], CHATML, "half a character"),
        ([{"role": "user", "content": "x"}], "{{ raise_exception('roles') }}", "refused.*roles"),
        ([{"role": "user", "content": "x"}], "{% if %}", "template is not valid"),
        ([{"role": "user", "content": "x"}], "{{ ''.__class__.__mro__ }}", "refused"),
    ],
)
def test_bad_messages_and_templates_are_clear_errors(
    messages: list[dict[str, str]], template: str | None, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer(template).render(messages)


def test_generation_marks_are_read_over() -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert tokenizer(template).decode(tokenizer(template).render(says("hi"))) == "hi"


def test_an_example_is_what_render_gives_and_the_answer() -> None:
    model = tokenizer()
    talk = says("Hello", "\n\nHi there", "And now?", "Bye")
    (example,) = model.examples(talk)
    assert model.spelled(example.ids) == "".join(
        f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in talk
    ).removesuffix("\n")
    learnt = [i for i, is_learnt in zip(*example, strict=True) if is_learnt]
    assert model.spelled(learnt) == "\n\nHi there<|im_end|>Bye<|im_end|>"
    # What stands before each answer is, id for id, what a server would be asked.
    first = example.is_learnt.index(True)
    assert example.ids[:first] == model.render(talk[:1])
    last = len(example.ids) - len(model.encode("Bye")) - 1
    assert example.ids[:last] == model.render(talk[:3])


def test_a_template_that_rewrites_the_past_gives_an_example_a_turn() -> None:
    model = tokenizer(REASONING)  # always asks for an answer; what follows an end is not learnt
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "hm", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "reasoning_content": "so", "content": "d"},
    ]
    first, second = model.examples(talk)
    assert model.spelled(first.ids).endswith("<think>\nhm\n</think>\n\nb<|im_end|>")
    assert "hm" not in model.spelled(second.ids) and "so" in model.spelled(second.ids)
    for example in (first, second):
        start = example.is_learnt.index(True)
        assert all(example.is_learnt[start:]) and not any(example.is_learnt[:start])


def test_turns_of_no_weight_are_context() -> None:
    model = tokenizer()
    talk = says("Hello", "bad", "Again", "good")
    talk[1]["weight"] = 0
    (example,) = model.examples(talk)
    assert model.spelled([i for i, own in zip(*example, strict=True) if own]) == "good<|im_end|>"
    with pytest.raises(TokenizerError, match="no assistant's message"):
        model.examples(talk[:2])


def test_a_template_without_a_stop_is_no_teacher() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(TokenizerError, match="ends message 2 with no stop id"):
        tokenizer(plain).examples(says("Hello", "Hi"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=2))
def test_users_cannot_move_a_mask(texts: list[str]) -> None:
    texts = [*texts[: len(texts) // 2 * 2 - 1], "ANSWER"]
    talk = says(*texts)
    for one in talk[1:-1:2]:
        one["weight"] = 0
    try:
        example = tokenizer().examples(talk)[-1]
    except TokenizerError as error:
        assert "spells" in str(error)
        return
    learnt = [i for i, own in zip(*example, strict=True) if own]
    assert tokenizer().spelled(learnt) == "ANSWER<|im_end|>"
