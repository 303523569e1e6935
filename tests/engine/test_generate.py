"""The generate loop: same tokens whatever is cached, stops wherever borders fall, clear limits."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.generate import Generator, StopTexts
from attending.engine.runner import TorchRunner
from attending.engine.sampler import Sampling
from attending.errors import ContextError
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from tests.model.tiny import FAMILIES, build

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "sliding_window": 20,
    "sliding_window_layers": [1],
    "use_sliding_window": True,
    "max_window_layers": 1,
    "head_dim": 8,
}
GREEDY = Sampling(temperature=0.0, max_tokens=20)


def decoder(family: str) -> Decoder:
    return build({**CONFIG, "model_type": family}, dtype=torch.float64)


def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            hidden = model(torch.tensor(text), Packed([len(text)]))
        text.append(int(model.logits(hidden)[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_that_goes_on_equals_one_from_scratch(family: str) -> None:
    model = decoder(family)
    generator = Generator(TorchRunner(model, num_pages=8))
    prompt = np.random.default_rng(0).integers(50, size=100).tolist()
    for more in ([], [3, 1, 4], [1, 5]):
        # Each turn repeats what was said; the last one departs from it in the middle.
        prompt = [*(prompt if more != [1, 5] else prompt[:70]), *more]
        said = list(generator.tokens(prompt, GREEDY))
        assert said == greedy_without_cache(model, prompt, 20)
        prompt = [*prompt, *said]


def test_whole_pages_of_a_shared_beginning_are_not_computed_again() -> None:
    generator = Generator(TorchRunner(decoder("llama"), num_pages=8))
    prompt = list(np.random.default_rng(1).integers(50, size=3 * PAGE_TOKENS + 5))
    list(generator.tokens(prompt, GREEDY))
    steps: list[int] = []
    run = generator._runner.step
    generator._runner.step = lambda spans: steps.append(len(spans[0].ids)) or run(spans)  # type: ignore[method-assign,func-returns-value]
    next(generator.tokens(prompt, GREEDY))
    assert steps == [5]


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    generator = Generator(TorchRunner(decoder("qwen3"), num_pages=8))
    first, second, other = (
        list(generator.tokens([1, 2, 3], Sampling(temperature=1.0, seed=seed, max_tokens=30)))
        for seed in (5, 5, 6)
    )
    assert first == second != other


def test_an_answer_ends_at_its_limit_and_at_the_end_of_the_context() -> None:
    generator = Generator(TorchRunner(decoder("llama"), num_pages=2))
    assert len(list(generator.tokens([1] * 10, GREEDY))) == 20
    assert len(list(generator.tokens([1] * 120, Sampling(temperature=0.0)))) == 8
    for length in (0, 128, 500):
        with pytest.raises(ContextError, match="1 to 127 fit"):
            next(generator.tokens([1] * length, GREEDY))


def test_leaving_an_answer_in_the_middle_does_not_disturb_the_next() -> None:
    model = decoder("baichuan_m1")
    generator = Generator(TorchRunner(model, num_pages=8))
    prompt = list(range(40)) * 2
    list(itertools.islice(generator.tokens(prompt, GREEDY), 3))
    assert list(generator.tokens(prompt, GREEDY)) == greedy_without_cache(model, prompt, 20)


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attending.engine.generate.CHUNK_TOKENS", 30)
    model = decoder("baichuan_m1")
    prompt = np.random.default_rng(3).integers(50, size=100).tolist()
    said = list(Generator(TorchRunner(model, num_pages=8)).tokens(prompt, GREEDY))
    assert said == greedy_without_cache(model, prompt, 20)


def test_answers_written_in_turns_do_not_disturb_each_other() -> None:
    model = decoder("qwen2")
    generator = Generator(TorchRunner(model, num_pages=8))
    prompts = [list(range(10)), list(range(30, 45))]
    both = zip(*(generator.tokens(prompt, GREEDY) for prompt in prompts), strict=True)
    for said, prompt in zip(zip(*both, strict=True), prompts, strict=True):
        assert list(said) == greedy_without_cache(model, prompt, 20)


def test_the_repetition_penalty_sees_prompt_and_answer() -> None:
    generator = Generator(TorchRunner(decoder("llama"), num_pages=8))
    prompt = list(range(25))
    harsh = Sampling(temperature=0.0, repetition_penalty=10.0, max_tokens=20)
    logits_positive = list(generator.tokens(prompt, harsh))
    assert len({*prompt, *logits_positive}) == 45  # 50 in all: nothing said twice


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stop_texts_end_alike_for_every_cut(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from("abc"), max_size=20)))
    stops = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    stopper, seen, ended = StopTexts(stops), "", False
    for start, end in itertools.pairwise(cuts):
        cut = stopper.feed(text[start:end])
        seen += cut.text
        if cut.ended:
            ended = True
            break
    seen += "" if ended else stopper.finish()
    assert ended == bool(ends)
    assert seen == (text[: min(ends)[1]] if ends else text)
