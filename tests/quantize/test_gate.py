"""The gate's figures by hand; limits that bite."""

import json
import math
from pathlib import Path

import pytest
import torch

from attending.errors import CheckFailed, ConfigError, UsageError
from attending.evaluate.page import Change
from attending.model.attend import Packed
from attending.quantize import gate
from attending.quantize.recipe import GateConfig
from attending.quantize.stream import Stream
from tests.model.test_checkpoint import config_of
from tests.model.tiny import build


def test_a_domains_figures_by_hand() -> None:
    rows = [[math.log(2), math.log(4), 0.5, 1.0], [math.log(8), math.log(4), 0.1, 0.0]]
    one = gate.of_tokens("notes", torch.tensor(rows, dtype=torch.float64))
    assert one.tokens == 2 and one.flips == 0.5
    assert one.before == pytest.approx(4) and one.after == pytest.approx(4)
    assert one.rise == pytest.approx(0, abs=1e-9) and one.divergence == pytest.approx(0.3)
    assert one.tail == pytest.approx(0.1 + 0.999 * 0.4)  # of two, between them


def test_two_models_are_compared_token_by_token() -> None:
    decoders = [build(config_of("baichuan_m1"), seed=seed) for seed in (0, 1)]
    ids = {"a": torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), "b": torch.tensor([[5, 3, 5, 8]])}
    streams = [Stream(one.arch, one.state_dict().__getitem__) for one in decoders]
    seen: list[int] = []
    domains, divergences = gate.compare(*streams, ids, seen.append)
    assert [one.name for one in domains] == ["a", "b"] and [one.tokens for one in domains] == [6, 3]
    assert seen == [*range(1, 1 + 2 * len(decoders[0].arch.layers))]
    with torch.no_grad():
        attend = Packed([4, 4])
        p, q = (
            one.logits(one(ids["a"].flatten(), attend)).reshape(2, 4, -1)[:, :-1].log_softmax(-1)
            for one in decoders
        )
    targets = ids["a"][:, 1:, None]
    expected = (p.exp() * (p - q)).sum(-1).flatten()
    torch.testing.assert_close(divergences["a"], expected, rtol=1e-4, atol=1e-5)
    losses = [-side.gather(-1, targets).mean() for side in (p, q)]
    found = domains[0]
    assert found.before == pytest.approx(float(losses[0].exp()), rel=1e-4)
    assert found.after == pytest.approx(float(losses[1].exp()), rel=1e-4)
    flips = (p.argmax(-1) != q.argmax(-1)).float().mean()
    assert found.flips == pytest.approx(float(flips)) and found.divergence > 0


def test_a_model_beside_itself_differs_in_nothing() -> None:
    one = build(config_of("llama"))
    stream = Stream(one.arch, one.state_dict().__getitem__)
    (found,), divergences = gate.compare(stream, stream, {"a": torch.tensor([[3, 1, 4, 1]])})
    assert found.rise == found.divergence == found.tail == found.flips == 0
    assert divergences["a"].tolist() == [0, 0, 0]


def made(**changes: float) -> gate.Gate:
    values = {"before": 10.0, "after": 10.5, "divergence": 0.02, "tail": 0.4, "flips": 0.05}
    one = gate.Domain("notes", 99, **(values | changes))
    lost = Change("ifeval", "share", "before", "after", 0.5, 0.4, -0.1, (-0.2, -0.01), False)
    return gate.Gate([one], [lost], {"medqa": 0.08})


LIMITS = {
    "max_perplexity_rise": 0.05,
    "max_divergence": 0.02,
    "max_tail_divergence": 0.4,
    "max_flips": 0.05,
    "max_choice_flips": 0.08,
    "max_forgetting": 0.2,
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_bites_just_below_what_was_measured(name: str) -> None:
    found = made()
    gate.check(found, GateConfig.build({name: LIMITS[name] * 1.001}))
    strict = GateConfig.build({name: LIMITS[name] * 0.999})
    with pytest.raises(CheckFailed, match=rf"above {name}=") as told:
        gate.check(found, strict)
    assert told.value.exit_code == 3
    gate.check(found, GateConfig())


def test_what_is_no_number_passes_no_limit() -> None:
    with pytest.raises(CheckFailed, match="nan, above max_divergence"):
        gate.check(made(divergence=math.nan), GateConfig(max_divergence=9.0))


def test_a_limit_without_its_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gate.max_forgetting would compare nothing"):
        gate.require_measured(GateConfig(max_forgetting=0.02))
    with pytest.raises(UsageError, match=r"no data 'medqa_us_4opt_test.jsonl': not in --data"):
        gate.require_measured(GateConfig(max_flips=0.1, data="somewhere"))
    gate.require_measured(GateConfig(max_flips=0.1))


def test_lines_figures_and_files(tmp_path: Path) -> None:
    found = made()
    assert found.lines()[0].startswith("notes: perplexity 10.000 -> 10.500 (+5.00%), KL 0.0200")
    assert found.lines()[-1] == "medqa: 8.0% answered otherwise"
    assert found.figures()["gate/notes_tail_nats"] == 0.4
    assert found.figures()["gate/ifeval_gain"] == -0.1
    gate.write(tmp_path, found, {"notes": torch.tensor([0.1, 0.0, 0.02])})
    told = json.loads((tmp_path / "gate.json").read_text("utf-8"))
    assert (
        told["domains"][0]["rise"] == pytest.approx(0.05) and told["choice_flips"]["medqa"] == 0.08
    )
    assert "<svg" in (tmp_path / "gate.svg").read_text("utf-8")


def test_the_suite_is_asked_of_both_and_flips_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"before": ["A", "B", "C", "A"], "after": ["A", "C", "C", "B"]}
    for side, own in texts.items():
        (tmp_path / "forgetting" / side).mkdir(parents=True)
        for task in ("medqa", "mmlu-med"):
            rows = [json.dumps({"id": str(i), "repeat": 0, "text": t}) for i, t in enumerate(own)]
            file = tmp_path / "forgetting" / side / f"{task}.answers.jsonl"
            file.write_text("\n".join(rows[: 4 if task == "medqa" else 1]) + "\n", "utf-8")
    monkeypatch.setattr("attending.evaluate.forgetting.of_suite", lambda *_: made().changes)
    config, notes = GateConfig(data="data"), list[str]()
    changes, flips = gate.ask(config, "m", tmp_path, lambda *_: None, notes.append)
    assert flips == {"medqa": 0.5, "mmlu-med": 0.0} and changes == made().changes
    assert gate.ask(GateConfig(), "m", tmp_path, lambda *_: None, notes.append) == ([], {})
    assert notes == ["gate: tasks are not compared, since gate.data names no folder."]
