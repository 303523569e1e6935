"""OpenVINO GenAI with and without its prompt lookup: pip install openvino-genai. Standard library.

    python benchmarks/peers/run_lookup.py WORK.json GGUF

WORK holds `threads`, `tokens` and `prompts`, lists of ids. Each prompt is answered greedily by both
before the next one; a line of JSON for each answer: path, tokens and seconds after the first token.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

PROPOSED, NGRAM = 5, 3  # tokens a round, and the length of what is looked up


def main() -> None:
    """See above."""
    work, model = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    told = {"INFERENCE_NUM_THREADS": work["threads"]}
    pipelines = {
        "plain": openvino_genai.LLMPipeline(model, "CPU", **told),
        "lookup": openvino_genai.LLMPipeline(model, "CPU", prompt_lookup=True, **told),
    }
    for ids in ([1, 2, 3, 4] * 8, *work["prompts"]):  # the first settles buffers and the clock
        for path, pipeline in pipelines.items():
            options = openvino_genai.GenerationConfig()
            options.max_new_tokens = work["tokens"]
            if path == "lookup":
                options.num_assistant_tokens, options.max_ngram_size = PROPOSED, NGRAM
            rows = np.array([ids], dtype=np.int64)
            tensors = openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows))
            found = pipeline.generate(openvino_genai.TokenizedInputs(*tensors), options)
            took = found.perf_metrics
            seconds = (took.get_generate_duration().mean - took.get_ttft().mean) / 1000
            row = {"path": path, "ids": [int(token) for token in found.tokens[0]]}
            row |= {"seconds": seconds, "version": openvino_genai.get_version()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
