"""OpenVINO GenAI with and without its prompt lookup: pip install openvino-genai.

    python benchmarks/peers/run_lookup.py GGUF THREADS TOKENS STOP_ID,STOP_ID

Reads prompts from its input, a JSON list of ids a line. Each is answered greedily by both; for each
answer a line of JSON: path, ids, and the seconds after the first token.
"""

import json
import sys

import numpy as np
import openvino
import openvino_genai

PROPOSED, NGRAM = 5, 3  # tokens a round, and the length of what is looked up


def main() -> None:
    """See above."""
    model, threads, tokens, stops = sys.argv[1:]
    told = {"INFERENCE_NUM_THREADS": int(threads)}
    pipelines = {
        "plain": openvino_genai.LLMPipeline(model, "CPU", **told),
        "lookup": openvino_genai.LLMPipeline(model, "CPU", prompt_lookup=True, **told),
    }
    for line in sys.stdin:
        for path, pipeline in pipelines.items():
            options = openvino_genai.GenerationConfig()
            options.max_new_tokens = int(tokens)
            options.stop_token_ids = {int(one) for one in stops.split(",")}
            options.include_stop_str_in_output = True
            if path == "lookup":
                options.num_assistant_tokens, options.max_ngram_size = PROPOSED, NGRAM
            rows = np.array([json.loads(line)], dtype=np.int64)
            tensors = openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows))
            found = pipeline.generate(openvino_genai.TokenizedInputs(*tensors), options)
            took = found.perf_metrics
            seconds = (took.get_generate_duration().mean - took.get_ttft().mean) / 1000
            row = {"path": path, "ids": [int(token) for token in found.tokens[0]]}
            row |= {"seconds": seconds, "version": openvino_genai.get_version()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
