"""llama.cpp through its own server. MODEL is a GGUF; VARIANT is the program llama-server."""

import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import Request, urlopen

from measuring import Engine, Prompts, main

SERVERS: list[subprocess.Popen[bytes]] = []


def load(model: str, threads: int, variant: str) -> Engine:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"-t {threads} -c 8192 -np 8 --host 127.0.0.1 --port {port} --no-webui".split()
    server = subprocess.Popen(
        [variant, "-m", model, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    SERVERS.append(server)
    url = f"http://127.0.0.1:{port}"
    for _ in range(6000):
        try:
            urlopen(f"{url}/health", timeout=1).read()
            break
        except (URLError, OSError):
            assert server.poll() is None, "llama-server did not start"
            time.sleep(0.01)

    def one(ids: list[int], new_tokens: int, sampled: bool) -> int:
        body = {"prompt": ids, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
        body |= {"temperature": 0.7, "top_p": 0.9, "top_k": 0} if sampled else {"temperature": 0.0}
        headers = {"Content-Type": "application/json"}
        request = Request(f"{url}/completion", json.dumps(body).encode(), headers)
        return int(json.loads(urlopen(request, timeout=600).read())["tokens_predicted"])

    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        with ThreadPoolExecutor(len(prompts)) as users:
            return list(users.map(lambda ids: one(ids, new_tokens, sampled), prompts))

    told = subprocess.run([variant, "--version"], capture_output=True, text=True)
    version = (told.stderr + told.stdout).partition("\n")[0].strip()
    path = "as stored; 8-bit activations by group of 32, float16 KV"
    return Engine(generate, f"llama.cpp {version}", path, server.pid)


if __name__ == "__main__":
    try:
        main(load)
    finally:
        for server in SERVERS:
            server.terminate()
            server.wait()
