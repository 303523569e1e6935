"""DPO's loss and gradients on the same rows by TRL, from the messages on: tokens are equal, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attending.mesh import World
from attending.prefer.setup import open_models, prepare
from tests.prefer.making import ask, make_model, recipe, write

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

ROWS = [
    {"prompt": ask("what is it"), "chosen": "asthma", "rejected": "no idea at all"},
    {"prompt": ask("and now"), "chosen": "rest and drink a lot", "rejected": "run"},
    {"prompt": ask("why"), "chosen": "since", "rejected": "because"},
]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the reference that it has left."""
    reference = make_model(tmp_path / "reference", initializer_range=0.3)
    return make_model(tmp_path / "model", initializer_range=0.2), reference


def ours(model: Path, reference: Path, data: Path) -> tuple[float, dict[str, Tensor], list[Any]]:
    batch = {"units": 3, "max_tokens": 40, "micro_tokens": 240}
    config = recipe(model, data, "dpo", reference=str(reference), batch=batch)
    state, units, found = prepare(config, open_models(config), World(0, 0, 1), torch.device("cpu"))
    decoder = state.decoder
    gradients, _ = found.gradients(decoder, found.passes(decoder, units.units, 0))
    named = {name: weight.grad for name, weight in decoder.named_parameters()}
    tokens = [[[*unit.prompt], *map(list, unit.answers)] for unit in units.units]
    return gradients.loss, {name: one for name, one in named.items() if one is not None}, tokens


def theirs(model: Path, reference: Path, out: Path) -> tuple[float, dict[str, Tensor], list[Any]]:
    datasets = pytest.importorskip("datasets")
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, frozen = (load(str(one), dtype=torch.float32) for one in (model, reference))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = (model / "chat_template.jinja").read_text("utf-8")
    rows = [
        {"prompt": row["prompt"]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in ROWS
    ]
    config = trl.DPOConfig(
        output_dir=str(out), beta=0.1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=frozen,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    tokenized = [trainer.train_dataset[at] for at in range(len(rows))]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(tokenized))
    loss.backward()
    gradients = {name: one.grad for name, one in trainer.model.named_parameters()}
    return float(loss.detach()), gradients, [[row[name] for name in names] for row in tokenized]


def test_dpo_equals_trls(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    loss, gradients, tokens = ours(*folders, data)
    wanted, their_gradients, their_tokens = theirs(*folders, tmp_path / "trl")
    assert tokens == their_tokens
    assert loss == pytest.approx(wanted, rel=1e-5) and abs(loss - 0.6931472) > 1e-2
    assert gradients.keys() == their_gradients.keys()
    apart = [float((one - their_gradients[name]).norm()) for name, one in gradients.items()]
    whole = sum(float(one.norm()) ** 2 for one in gradients.values()) ** 0.5
    assert max(apart) / whole < 1e-4
