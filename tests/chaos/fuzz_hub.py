"""Every fault at every request of a publication, one after the other: `python tests/chaos/fuzz_hub.py`; prints the table.

For each pair a new hub refuses that request as often as it comes; nothing half-uploaded may be seen, and once the hub is well again
the publication must get there by the next checkpoint's try (or by itself, where the hub said how long to wait).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "0", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub_server import HubServer

from sslsr_diffusion.training.publisher import MANIFEST, HubPublisher

REPO = "someone/upscaler"
STEPS = {
    "create the repository": "repos/create",
    "list its files": "/tree/",
    "how to upload": "/preupload/",
    "storage token": "xet-write-token",
    "the bytes": "/xorbs/",
    "their description": "/shards",
    "the commit": "/commit/",
}
KINDS = {
    "500": 500,
    "503": 503,
    "401": 401,
    "403": 403,
    "429, wait 1 s": 429,
    "answer cut": "cut",
    "upload cut": "drop",
    "slow, 1 s": "slow:1",
}


def attempt(match: str, kind: int | str, folder: Path) -> tuple[str, float]:
    """ "recovered", "passed" (the client mended it within the first try) or what went wrong; and seconds that publish() took."""
    with HubServer() as hub:
        publisher = HubPublisher(REPO, token="hf_writetoken", endpoint=hub.url)
        headers = {"Retry_After": "1"} if kind == 429 else {}
        fault = hub.fault(match, kind, times=2 if headers else 10**6, **headers)
        began = time.monotonic()
        publisher.publish(folder, "only")
        blocked = time.monotonic() - began
        publisher.wait(120)
        seen = hub.repositories[REPO].commits[1:] if REPO in hub.repositories else []
        verdict = "passed" if seen else "recovered"
        if not fault.hit:
            verdict = "never asked"
        if not all(complete(commit, folder) for commit in seen):
            verdict = "HALF A COMMIT WAS VISIBLE"
        fault.times = 0
        publisher.checkpoint()
        if not publisher.close(attempts=1, pause=0.1, timeout=60) or not complete(hub.repositories[REPO].commits[-1], folder):
            verdict = "LOST"
        return verdict, blocked


def complete(commit: tuple, folder: Path) -> bool:
    wanted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return set(commit[2]) == wanted | {MANIFEST}


def main() -> None:
    from huggingface_hub.utils import _http

    _http.time = type("Impatient", (), {"sleep": staticmethod(lambda s: None), "time": time.time, "perf_counter": time.perf_counter})
    logging.getLogger("sslsr_diffusion").setLevel(logging.ERROR)
    results, longest = {}, 0.0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pipeline"
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableSRPipeline"}))
        (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(200_000))
        for step, match in STEPS.items():
            for name, kind in KINDS.items():
                (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(200_000))  # else its bytes are known to be there
                results[step, name], blocked = attempt(match, kind, folder)
                longest = max(longest, blocked)
    print(f"{'':24}" + "".join(f"{name:>15}" for name in KINDS))
    for step in STEPS:
        print(f"{step:24}" + "".join(f"{results[step, name]:>15}" for name in KINDS))
    bad = [pair for pair, verdict in results.items() if verdict not in ("recovered", "passed")]
    print(f"{len(results)} faults tried, {len(results) - len(bad)} recovered; publish() held the caller {longest * 1000:.0f} ms at most")
    sys.exit(f"not recovered: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
