"""The client against the stand-in: what each call returns, and what each fault ends in."""
from __future__ import annotations

from pathlib import Path

from kaggle_stand_in import Plan

META = {"id": "tester/aml-align", "title": "aml align", "code_file": "pipeline.py", "language": "python",
        "kernel_type": "script", "is_private": True, "enable_internet": False, "dataset_sources": [],
        "competition_sources": ["aml-competition"]}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_kernel_from_push_to_output(kaggle, client, tmp_path):
    kaggle.plans = [Plan(queued=1, running=1, outputs={f"f{n}.txt": b"x" * n for n in range(1, 30)}, log="a\nb\n")]
    saved = client.save_kernel(META, "print(1)\n")
    assert (saved.ref, saved.version) == ("tester/aml-align", 1)
    states = [client.kernel_status("tester", "aml-align", 1)[0] for _ in range(3)]
    assert states == ["queued", "running", "complete"]
    files, log = client.kernel_output("tester", "aml-align", 1)
    assert len(files) == 29 and log == "a\nb\n"
    name, url = files[-1]
    client.download_url(url, tmp_path / name)
    assert (tmp_path / name).read_bytes() == kaggle.kernels["tester/aml-align"][0].outputs[name]
    assert "".join(client.kernel_log_stream("tester", "aml-align", 1)) == "a\nb\n"


def test_dataset_and_its_versions(kaggle, client, tmp_path):
    files = [write(tmp_path / "a.bin", b"a" * 1000), write(tmp_path / "b.txt", b""), write(tmp_path / "c.txt", b"c")]
    assert client.create_dataset("tester", "weights", "weights title", "CC0-1.0", files) == 1
    assert client.dataset_status("tester", "weights") == ("ready", 1)
    assert client.dataset_files("tester", "weights") == {"a.bin": 1000, "b.txt": 0, "c.txt": 1}
    assert client.create_dataset_version("tester", "weights", "second", files[:1]) == 2
    assert client.dataset_status("tester", "weights") == ("ready", 2)
    assert client.dataset_files("tester", "weights") == {"a.bin": 1000}


def test_submission_is_scored(kaggle, client, tmp_path):
    kaggle.competitions["aml-competition"].others = {"best": 0.9}
    ref = client.submit_file("aml-competition", write(tmp_path / "s.csv", b"id\n"), "message")
    found = client.wait_for_score(ref)
    assert (found.public_score, found.description, found.status) == (0.5, "message", "complete")
    assert client.leaderboard("aml-competition") == [(1, "best", 0.9), (2, "tester", 0.5)]
    assert client.submission_limits("aml-competition").allowed_now == 4
    assert client.quota()["GPU"].left_hours == 28.5
