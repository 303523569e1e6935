"""The plan's arithmetic: by hand, against the published figures, and its laws."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.plan import (
    FIT,
    Card,
    Plan,
    card_names,
    explain,
    group_size,
    kv_bytes,
    load_card,
    plan,
    table,
    weight_bytes,
)
from attending.errors import UsageError
from attending.model.architecture import Architecture, parse_config

GIB = 2**30
M1 = parse_config(
    {
        "model_type": "baichuan_m1",
        "vocab_size": 133120,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 20,
        "num_key_value_heads": 2,
        "num_swa_attention_heads": 40,
        "num_swa_key_value_heads": 8,
        "sliding_window": 8192,
        "sliding_window_layers": list(range(1, 40, 2)),
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
)
M2 = parse_config(
    {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
    }
)


def llama(**changes: Any) -> Architecture:
    return parse_config(
        {
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            **changes,
        }
    )


def contexts(result: Plan) -> dict[str, int]:
    return {row.scheme: row.context for row in result.rows}


def test_parameters_equal_the_published_counts() -> None:
    assert M1.num_parameters() == 14_470_764_320
    assert M2.num_parameters() == 32_763_876_352


def test_one_constant_predicts_the_published_contexts_within_5_percent() -> None:
    """By hand: fit the reserve on W4A16 alone, then divide the other rooms by the KV of a token."""
    memory, active = 24_564 * 2**20, 2 * 2048 * (2 * 5120 + 2 * 27648) + 4 * 152_064
    gptq, qqq = 19_343_747_072, 19_225_520_128
    reserve = memory - gptq - active - 9_982 * 262_144
    result = plan(M2, load_card("rtx4090"))
    assert result.reserve_bytes == reserve and result.activation_bytes == active
    by_hand = {
        "16-bit": 0,
        "W4A16": 9_982,
        "W4A16+KV8": (memory - gptq - active - reserve) // 131_072,
        "W4A8": (memory - qqq - active - reserve) // 262_144,
        "W4A8+KV8": (memory - qqq - active - reserve) // 131_072,
    }
    assert contexts(result) == by_hand
    published = {"W4A16": 9_982, "W4A16+KV8": 19_965, "W4A8": 10_566, "W4A8+KV8": 21_133}
    assert {r.scheme: r.published_tokens for r in result.rows if r.published_tokens} == published
    for scheme, tokens in published.items():
        assert by_hand[scheme] == pytest.approx(tokens, rel=0.05)
    # The layouts matter: W4A8 stored as GPTQ would miss its row by more than that.
    assert by_hand["W4A16"] != pytest.approx(published["W4A8"], rel=0.05)


def test_the_stored_fit_is_what_the_plan_computes_for_its_row() -> None:
    result = plan(M2, load_card(FIT["card"]))
    assert result.card.memory_bytes == FIT["memory_bytes"]
    assert weight_bytes(M2, "GPTQ").total() == FIT["weight_bytes"]
    assert result.activation_bytes == FIT["activation_bytes"]
    assert kv_bytes(M2, FIT["published_tokens"][FIT["scheme"]]) == FIT["kv_bytes"]
    assert M2.num_parameters() == FIT["parameters"]


@pytest.mark.parametrize("name", card_names())
def test_the_reserve_is_the_same_for_every_card(name: str) -> None:
    card = load_card(name)
    assert plan(M1, card).reserve_bytes == plan(M2, load_card("rtx4090")).reserve_bytes
    assert card.memory_bytes > 0 and card.name == name


def test_gptq_sizes_equal_the_size_check_of_the_published_file() -> None:
    sizes = weight_bytes(M2, "GPTQ")
    assert sizes["in 4 bits"] / 1e9 == pytest.approx(15.60, abs=0.005)
    assert sizes["group scales"] / 1e9 == pytest.approx(0.488, abs=0.0005)
    assert sizes["zero points and g_idx"] / 1e9 == pytest.approx(0.122 + 0.015, abs=0.0005)
    assert sizes.total() / 1e9 == pytest.approx(19.34, abs=0.005)
    assert weight_bytes(M2, "16-bit").total() == 2 * M2.num_parameters()


def test_one_small_block_by_hand_in_every_layout() -> None:
    arch = llama(num_hidden_layers=1)
    linears = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    values = sum(out * inner for out, inner in linears)
    rest = 2 * (2 * 1000 * 256 + 3 * 256)
    gptq = sum(o * i // 2 + o * i // 128 * 2 + o * i // 128 // 2 + 4 * i for o, i in linears)
    qqq = sum(o * i // 2 + o * i // 128 * 2 + 4 * o for o, i in linears)
    assert weight_bytes(arch, "16-bit").total() == 2 * values + rest
    assert weight_bytes(arch, "GPTQ").total() == gptq + rest
    assert weight_bytes(arch, "QQQ").total() == qqq + rest


@pytest.mark.parametrize(
    ("inputs", "group"), [(5120, 128), (576, 64), (1536, 128), (96, 32), (48, None), (7, None)]
)
def test_groups_divide_their_inputs(inputs: int, group: int | None) -> None:
    assert group_size(inputs) == group


def test_inputs_that_cannot_be_grouped_stay_in_16_bits_and_are_named() -> None:
    arch = llama(hidden_size=48, intermediate_size=64, num_key_value_heads=4)
    sizes = weight_bytes(arch, "GPTQ")
    assert sizes["in 4 bits"] == 2 * 48 * 64 // 2  # the down projections alone
    text = explain(plan(arch, load_card("24GiB")))
    assert "none of 48, 64 of 64 (none: 16 bits)" in text


@pytest.mark.parametrize(
    ("tokens", "mib"), [(2048, 240), (8192, 960), (16384, 1280), (32768, 1920)]
)
def test_m1_cache_equals_the_table_plus_its_raw_rows(tokens: int, mib: int) -> None:
    """The table counts K and V; each page adds a raw row: 2,048 B global, 4,096 B window."""
    windowed = min(tokens, 8192) // 64
    raw = 20 * 2048 * (tokens // 64) + 20 * 4096 * windowed
    assert kv_bytes(M1, tokens) - raw == mib * 2**20
    assert kv_bytes(M1, tokens, 1) - raw == mib * 2**19


def test_a_window_caps_the_cache_and_a_started_page_has_its_raw_row() -> None:
    growth = kv_bytes(M1, 8193) - kv_bytes(M1, 8192)
    assert growth == 20 * (2048 + 2048)  # global layers only: a token, and a new page's raw row
    assert kv_bytes(M1, 8194) - kv_bytes(M1, 8193) == 20 * 2048
    assert kv_bytes(M1, 1) == 20 * (2048 + 2048) + 20 * (4096 + 4096)


def test_qwen_cache_is_256_kib_a_token() -> None:
    assert kv_bytes(M2, 1) == 256 * 1024
    assert kv_bytes(M2, 1000, 1) == 1000 * 128 * 1024


def test_what_does_not_fit_says_how_much_is_short() -> None:
    card = load_card("16GiB")
    row = plan(M2, card).rows[1]
    assert (row.context, row.sequences, row.ceiling_tokens_s) == (0, 0, None)
    needed = 19_343_747_072 + FIT["activation_bytes"] + plan(M2, card).reserve_bytes
    assert -row.room_bytes == needed - 16 * GIB
    assert f"does not fit: {(needed - 16 * GIB) / GIB:.1f} GiB short" in table(plan(M2, card))[1][1]


def test_a_large_card_is_bound_by_the_model() -> None:
    rows = {row.scheme: row for row in plan(M2, load_card("h200")).rows}
    assert rows["W4A16"].context == 131_072 and rows["W4A16"].bound_by == "model"
    assert rows["W4A16"].sequences == rows["W4A16"].room_bytes // (4096 * 262_144)
    tight = {row.scheme: row for row in plan(M2, load_card("rtx4090")).rows}
    assert tight["W4A16"].bound_by == "memory"


def test_the_ceiling_is_above_the_published_speed() -> None:
    row = plan(M2, load_card("rtx4090")).rows[1]
    read = 19_343_747_072 - 2 * 152_064 * 5120 + 4096 * 262_144
    assert row.ceiling_tokens_s == pytest.approx(1008e9 / read)
    assert 0.7 < 41.5 / (1008e9 / read) < 1
    assert "78 % of its bound" in explain(plan(M2, load_card("rtx4090")))
    assert round(100 * 41.5 * read / 1008e9) == 78
    assert plan(M2, load_card("24GiB")).rows[1].ceiling_tokens_s is None


def test_a_tied_embedding_is_read_because_it_is_the_head() -> None:
    card = Card("x", "x", 24 * GIB, 100.0)
    tied, untied = (plan(llama(tie_word_embeddings=t), card).rows[0] for t in (True, False))
    assert tied.weight_bytes < untied.weight_bytes
    assert tied.ceiling_tokens_s == untied.ceiling_tokens_s


def test_published_figures_stand_only_beside_their_own_model_and_card() -> None:
    for arch, card in ((M1, "rtx4090"), (M2, "rtx3090"), (M2, "24564MiB")):
        assert all(row.published_tokens is None for row in plan(arch, load_card(card)).rows)
        assert "published" not in table(plan(arch, load_card(card)))[0]
    headers, rows = table(plan(M2, load_card("rtx4090")))
    assert headers[-1] == "published"
    assert [cells[-1] for cells in rows][:2] == ["-", "9,982 fitted"]
    assert rows[3][2:] == ["10,433 (memory)", "2", "54", "10,566 -1.3%"]


@pytest.mark.parametrize(
    "text", ["24GiB", "24 gib", "24576MiB", "25769.803776MB", "25.769803776GB"]
)
def test_a_size_is_a_card(text: str) -> None:
    assert load_card(text).memory_bytes == pytest.approx(24 * GIB, abs=1)


def test_card_names_are_found_in_any_case() -> None:
    assert load_card("RTX4090") == load_card("rtx4090")


def test_an_unknown_card_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'rtx4091'.*24GiB.*Did you mean 'rtx4090'.*h100"):
        load_card("rtx4091")


@pytest.mark.parametrize("text", ["0GiB", "-3GiB", "24", "24 XB", "GiB", "", "1e3GiB", "nanGiB"])
def test_a_bad_size_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="neither a known card nor a size"):
        load_card(text)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"chunk": 0}, {"tokens": -1}])
def test_lengths_below_one_are_errors(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected 1 or more"):
        plan(M2, load_card("rtx4090"), **options)


def test_lengths_are_cut_to_the_model() -> None:
    result = plan(llama(max_position_embeddings=512), load_card("24GiB"))
    assert (result.tokens, result.chunk) == (512, 512)
    assert all(row.context == 512 for row in result.rows)


def test_this_machine_is_a_card() -> None:
    card = load_card("cpu")
    assert card.memory_bytes > GIB // 4 and card.bandwidth_gb_s is None


def test_the_plan_is_json_and_every_row_has_a_cell_for_every_header() -> None:
    for arch, name in ((M1, "t4"), (M2, "rtx4090"), (llama(), "cpu")):
        result = plan(arch, load_card(name))
        loaded = json.loads(json.dumps(result.to_json()))
        assert [row["context"] for row in loaded["rows"]] == list(contexts(result).values())
        assert loaded["architecture"]["model_type"] == arch.family
        headers, rows = table(result)
        assert len(rows) == 5 and all(len(row) == len(headers) for row in rows)


def test_the_explanation_shows_the_fit_and_its_terms_add_up() -> None:
    text = explain(plan(M2, load_card("rtx4090")))
    terms = [25_757_220_864, 19_343_747_072, 269_043_712, 2_616_721_408]
    assert terms[0] - sum(terms[1:]) == 3_527_708_672
    for value in (*terms, 3_527_708_672, 15_602_810_880, 65_536):
        assert f"{value:,}" in text
    assert "fitted" in text and "predicted" in text and "published" in text
    assert "{" not in text


@settings(max_examples=40, deadline=None)
@given(
    mib=st.integers(1, 2**18),
    more=st.integers(0, 2**16),
    arch=st.sampled_from([M1, M2, llama(), llama(hidden_size=48, num_key_value_heads=4)]),
)
def test_more_memory_never_fits_less_and_kv8_never_fewer(
    mib: int, more: int, arch: Architecture
) -> None:
    small, large = (plan(arch, Card("x", "x", size * 2**20)) for size in (mib, mib + more))
    for before, after in zip(small.rows, large.rows, strict=True):
        assert before.context <= after.context and before.sequences <= after.sequences
    fits = contexts(large)
    assert fits["W4A16"] <= fits["W4A16+KV8"] and fits["W4A8"] <= fits["W4A8+KV8"]
    assert fits["16-bit"] <= fits["W4A16"] <= fits["W4A8"]


@settings(max_examples=40, deadline=None)
@given(mib=st.integers(2**12, 2**17), scheme=st.integers(0, 4), arch=st.sampled_from([M1, M2]))
def test_the_context_is_exactly_the_largest_that_fits(
    mib: int, scheme: int, arch: Architecture
) -> None:
    row = plan(arch, Card("x", "x", mib * 2**20)).rows[scheme]
    value_bytes = 1 if row.scheme.endswith("KV8") else 2
    if row.context:
        assert kv_bytes(arch, row.context, value_bytes) <= row.room_bytes
    if row.bound_by == "memory":
        assert kv_bytes(arch, row.context + 1, value_bytes) > row.room_bytes
    else:
        assert row.context == arch.context


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, attending.engine.plan, attending.engine.doctor; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
