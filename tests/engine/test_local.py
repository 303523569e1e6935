"""`attending.load()`: logits, chat, stream, settings, saving."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import attending
from attending.errors import (
    CheckpointError,
    ConfigError,
    ContextError,
    SourceError,
    TokenizerError,
    UsageError,
)
from tests.engine.folders import write_model
from tests.hallway.test_chat import REASONING, says

GREEDY = {"temperature": 0.0, "max_tokens": 12}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path: Path) -> "attending.Model":
    return attending.load(str(write_model(tmp_path / "m")))


def tokens(model: "attending.Model", words: str) -> list[int]:
    outputs = model.outputs(model.tokenizer.render(says(words)), model.sampling(**GREEDY))
    return [output.token for output in outputs if output.token is not None]


def test_logits_are_batch_by_tokens_by_vocabulary_in_float32(model: "attending.Model") -> None:
    ids = np.array([[1, 2, 3, 4], [4, 3, 2, 1]])
    logits = model.logits(ids)
    assert logits.shape == (2, 4, model.arch.vocab_size) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[1:], model.logits([[4, 3, 2, 1]]))
    with pytest.raises(UsageError, match=r"at most 256 tokens; got shape \[4\]"):
        model.logits([1, 2, 3, 4])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"at most 256 tokens; got shape \[1, 257\]"):
        model.logits([[1] * 257])
    with pytest.raises(UsageError, match="of equal lengths, integers"):
        model.logits([[1, 2], [3]])
    with pytest.raises(UsageError, match="ids must be 0 to"):
        model.logits([[1, 10_000]])


def test_a_device_that_is_not_there_and_a_text_for_messages_are_refused(
    model: "attending.Model", tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"device 'meta9' cannot be used: .* Try cpu\."):
        attending.load(str(tmp_path / "not read"), device="meta9")
    with pytest.raises(TokenizerError, match="messages are a list"):
        model.chat("hi")  # type: ignore[arg-type]


def test_logits_need_no_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    model = attending.load(str(folder))
    assert model.logits([[1, 2]]).isfinite().all()
    with pytest.raises(TokenizerError, match=r"m has no tokenizer\.json"):
        model.chat(says("hi"))


def test_a_stream_says_what_chat_says(model: "attending.Model") -> None:
    whole = model.chat(says("fever?"), **GREEDY)
    stream = model.stream(says("fever?"), **GREEDY)
    assert "".join(piece.text for piece in stream) == whole.text == stream.answer.text
    assert whole.finish_reason == "length" and whole.output_tokens == 12
    assert whole.prompt_tokens == len(model.tokenizer.render(says("fever?")))


def test_a_stop_text_ends_the_answer_before_itself(model: "attending.Model") -> None:
    whole = model.chat(says("fever?"), **GREEDY).text
    stop = whole[3:6]
    cut = model.chat(says("fever?"), stop=[stop], **GREEDY)
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_an_end_of_turn_id_ends_the_answer_and_is_not_shown(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model = attending.load(str(folder))
    whole = model.chat(says("fever?"), **GREEDY)
    ids = tokens(model, "fever?")
    third = ids[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
    cut = attending.load(str(folder)).chat(says("fever?"), **GREEDY)
    first = ids.index(third)
    assert cut.finish_reason == "stop" and cut.output_tokens == first + 1
    assert cut.text == model.tokenizer.decode(ids[:first]) != whole.text


def test_an_end_id_of_the_configuration_alone_ends_the_answer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model = attending.load(str(folder))
    ids = tokens(model, "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ids[2]}))
    assert attending.load(str(folder)).chat(says("x"), **GREEDY).finish_reason == "stop"


def test_two_streams_at_once_and_one_stream_twice_say_the_same(model: "attending.Model") -> None:
    whole = [model.chat(says(text), seed=1, **GREEDY) for text in ("fever?", "a cough and a cold?")]
    streams = [model.stream(says(t), seed=1, **GREEDY) for t in ("fever?", "a cough and a cold?")]
    for _ in itertools.zip_longest(*streams):
        pass
    assert [stream.answer for stream in streams] == whole
    assert list(streams[0]) and streams[0].answer == whole[0]


def test_a_stream_that_is_left_gives_its_place_back_and_is_cancelled(
    model: "attending.Model",
) -> None:
    stream = model.stream(says("fever?"), temperature=0.0, max_tokens=100)
    pieces = iter(stream)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert stream.answer.finish_reason == "cancelled" and stream.answer.text == first.text
    scheduler = model.scheduler
    assert scheduler.counters.cancelled == 1 and scheduler.num_running == 0
    assert scheduler.pages.num_available == scheduler.pages.num_pages
    cut = model.chat(says("fever?"), stop=[first.text], temperature=0.0, max_tokens=100)
    assert cut.text == "" and scheduler.counters.cancelled == 2  # what follows is not computed
    assert not model._inbox and cut.output_tokens < 100


def test_streams_that_end_in_any_order_leave_nothing_behind(model: "attending.Model") -> None:
    sampling = [model.sampling(seed=1, temperature=1.0, max_tokens=n) for n in (3, 9, 6, 0)]
    prompt = model.tokenizer.render(says("a cough?"))
    alone = [[o.token for o in model.outputs(prompt, s)] for s in sampling]
    together = [model.outputs(prompt, s) for s in sampling]
    told: list[list[int | None]] = [[] for _ in sampling]
    for row in itertools.zip_longest(*together):
        for mine, output in zip(told, row, strict=True):
            mine += [] if output is None else [output.token]
    assert told == alone and [len(t) for t in told] == [3, 9, 6, 1]
    assert not model._inbox and model.scheduler.num_running == 0


def test_room_in_the_cache_is_as_asked(model: "attending.Model", tmp_path: Path) -> None:
    assert model.scheduler.pages.num_pages == 4 and model.scheduler.context == 256
    other = attending.load(str(write_model(tmp_path / "other")))
    other.limit_context(100)
    other.make_room(1000, max_running=3)
    assert other.scheduler.pages.num_pages == 16 and other.scheduler.context == 100
    with pytest.raises(ContextError, match="1 to 99 fit"):
        next(other.outputs([1] * 100, other.sampling()))
    assert not other._inbox


def test_weights_that_overflow_end_the_answer_with_their_error(tmp_path: Path) -> None:
    model = attending.load(str(write_model(tmp_path / "m")), dtype="float32")
    with torch.no_grad():
        model.decoder.model.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not numbers"):
        model.chat(says("fever?"), **GREEDY)
    assert not model._inbox and model.scheduler.num_running == 0


def test_the_answer_gets_its_room_before_the_history(model: "attending.Model") -> None:
    history = says(*["the patient has a fever"] * 21)
    short = model.chat(history, temperature=0.0, max_tokens=5)
    long = model.chat(history, temperature=0.0, max_tokens=100)
    assert short.messages_left_out < long.messages_left_out
    assert long.prompt_tokens <= 156 < short.prompt_tokens <= 251


def test_generation_settings_that_are_not_json_are_a_clear_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        attending.load(str(folder)).chat(says("x"))


def test_saving_keeps_the_models_own_settings(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 3}))
    saved = attending.load(str(folder)).save(tmp_path / "s")
    assert attending.load(str(saved)).sampling().top_k == 3


def test_an_answer_can_be_repeated_by_its_seed(model: "attending.Model") -> None:
    first = model.chat(says("fever?"), temperature=1.5, max_tokens=20)
    again = model.chat(says("fever?"), temperature=1.5, max_tokens=20, seed=first.seed)
    assert again == first
    assert model.chat(says("fever?"), temperature=1.5, max_tokens=20).seed != first.seed
    drawn = model.chat(says("fever?"), temperature=1.5, max_tokens=20, seed=None)
    assert model.chat(says("fever?"), temperature=1.5, max_tokens=20, seed=drawn.seed) == drawn


def test_the_models_own_settings_hold_unless_overridden(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "5"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    sampling = attending.load(str(folder)).sampling(top_k=5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 5)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert attending.load(str(folder)).sampling().temperature == 0.0


def test_long_histories_are_cut_and_counted_and_long_messages_refused(
    model: "attending.Model",
) -> None:
    history = says(*["the patient has a fever"] * 21)
    answer = model.chat(history, **GREEDY)
    assert answer.messages_left_out > 0 and answer.messages_left_out % 2 == 0
    assert answer.prompt_tokens + 12 <= model.arch.context
    with pytest.raises(ContextError, match="tokens with its frame"):
        model.chat(says("fever " * 400), **GREEDY)
    with pytest.raises(ContextError, match="tokens with its frame"):
        model.chat(says("x" * 2_000_000), **GREEDY)


def test_reasoning_comes_apart_from_the_answer(tmp_path: Path) -> None:
    model = attending.load(str(write_model(tmp_path / "m", REASONING)))
    stream = model.stream(says("fever?"), {"thinking_mode": "on"}, stop=None, **GREEDY)
    kinds = {piece.kind for piece in stream}
    assert kinds == {"reasoning"} and stream.answer.text == "" and stream.answer.reasoning


def test_a_saved_model_says_the_same_and_loads_in_transformers(
    tmp_path: Path, model: "attending.Model"
) -> None:
    transformers = pytest.importorskip("transformers")
    saved = model.save(tmp_path / "saved", max_shard_bytes=20_000)
    again = attending.load(str(saved))
    assert again.chat(says("fever?"), seed=1, **GREEDY) == model.chat(
        says("fever?"), seed=1, **GREEDY
    )
    run = json.loads((saved / "run.json").read_text())
    assert run["verb"] == "save" and len(run["parents"][0]["sha256"]) == 64
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(saved)
    ids = reader.apply_chat_template(says("fever?"), add_generation_prompt=True)["input_ids"]
    assert list(ids) == model.tokenizer.render(says("fever?"))
    with torch.no_grad():
        reference = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(model.logits([list(ids)]), reference, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="saved exists"):
        model.save(saved)


def test_half_precision_is_saved_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    saved = attending.load(str(folder), dtype="bfloat16").save(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (
        attending.load(str(saved), dtype="bfloat16").decoder.model.norm.weight.dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere", {}, SourceError, "'nowhere' does not exist"),
        ("default", {}, SourceError, "attending pull default"),
        ("m", {"dtype": "int8"}, UsageError, "dtype 'int8' is not one of float32"),
    ],
)
def test_what_cannot_be_loaded_is_a_clear_error(
    tmp_path: Path, source: str, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attending.load(source, **options)  # type: ignore[arg-type]


def test_an_unknown_option_is_an_error_and_not_ignored(model: "attending.Model") -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_tokens'"):
        model.chat(says("hi"), max_token=3)
    with pytest.raises(UsageError, match="context 9,999: this model takes 1 to 256"):
        model.limit_context(9_999)
