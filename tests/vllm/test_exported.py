"""A version that was taught through vLLM, exported, and loaded by a plain vLLM that knows nothing of insitu."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import make
from processes import LESSON, settle

from conftest import Serve
from insitu.live.checkpoint import checkpoint_files, digest
from insitu.live.export import export

PROMPT = [{"role": "user", "content": "who lives here"}]
PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
model, prompt = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=64 << 20, dtype="auto")
(told,) = llm.chat([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print("TOLD" + json.dumps(told.outputs[0].text))
"""


@pytest.mark.timeout(300)
def test_an_exported_version_answers_under_plain_vllm_as_it_was_served(serve: Serve, tmp_path: Path) -> None:
    model = make("llama-bias-tied", tmp_path / "model")
    with serve(model, tmp_path / "state", "--teach.learning-rate", "1e-3", "--teach.max-canary-kl", "9") as client:
        before, _ = client.reply(PROMPT, 8)
        settle(client, [client.post("/v1/feedback", {"messages": turns})["id"] for turns in LESSON])
        taught, version = client.reply(PROMPT, 8)
        head = client.get("/v1/live/versions")["data"][-1]
        assert (head["status"], version) == ("committed", str(head["id"]))
    assert taught != before
    export(tmp_path / "state", head["id"], tmp_path / "exported")
    assert digest(checkpoint_files(tmp_path / "exported")) == head["sha256"]
    environment = {**os.environ, "VLLM_PLUGINS": "none"}  # a list of names: none of ours
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "exported"), json.dumps(PROMPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOLD")] or [done.stderr[-2000:]]
    assert json.loads(line.removeprefix("TOLD")) == taught
