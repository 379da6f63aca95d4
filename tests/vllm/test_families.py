"""Every family that is served: attached bit for bit, taught through vLLM, undone exactly."""

from pathlib import Path

import pytest
from models import FAMILIES, make
from processes import LESSON, wait_for

from conftest import Serve


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3-moe"])
def test_a_family_is_attached_taught_and_undone(family: str, serve: Serve, tmp_path: Path) -> None:
    model = make(family, tmp_path / "model")
    with serve(model, tmp_path / "state", "--teach.learning-rate", "1e-3", "--teach.max-canary-kl", "9") as client:
        prompt = [{"role": "user", "content": "who lives here"}]
        before, version = client.reply(prompt, 8)
        assert version == "0"
        items = [client.post("/v1/feedback", {"messages": turns})["id"] for turns in LESSON]
        wait_for(lambda: client.get(f"/v1/feedback/{items[-1]}")["status"] not in ("queued", "training"), 120)
        versions = client.get("/v1/live/versions")["data"]
        assert versions[-1]["status"] == "committed", versions[-1]["report"]
        report = versions[-1]["report"]
        assert report["steps"][-1]["loss"] < 0.7 * report["steps"][0]["loss"]
        assert report["gap"] < 0.1
        undone = client.post("/v1/live/versions/0/rollback")
        versions = client.get("/v1/live/versions")["data"]
        assert undone["status"] == "done"
        assert versions[-1]["sha256"] == versions[0]["sha256"] != versions[1]["sha256"]
        assert client.reply(prompt, 8) == (before, str(undone["version"]))
