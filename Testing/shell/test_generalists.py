"""Generalists from the shell: the checkpoint is fetched and shown, trainings with and without it, curves."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import DONE, WRONG_USE, Shown, Trained, curves, shell

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.generalists.sam_med3d import checkpoint
from SemiSAMO1Lib.engine.generalists.sam_med3d.architecture import SMALL as SMALL_ARCHITECTURE
from SemiSAMO1Lib.engine.generalists.sam_med3d.checkpoint import CARD, NAME, VARIABLE
from SemiSAMO1Lib.engine.generalists.sam_med3d.model import SamMed3D
from SemiSAMO1Lib.job import JobFolder

CONTENT = np.random.default_rng(0).bytes(200_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()

# ---------------------------------------------------------------------- checkpoint fetch


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this computer that gives CONTENT, from where it is asked to begin."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            body = CONTENT[int(asked.removeprefix("bytes=").rstrip("-")) :] if asked else CONTENT
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/w.pth"
        server.shutdown()
        thread.join()


@pytest.fixture
def genuine(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTENT is the published file."""
    card = replace(CARD, sha256=(DIGEST[:8], DIGEST[-5:]), size_bytes=len(CONTENT))
    monkeypatch.setattr(checkpoint, "CARD", card)


@pytest.fixture
def fetched(no_checkpoint: Path, genuine: None, address: str) -> tuple[Shown, Path]:
    return shell("checkpoint", "fetch", "--url", address, "--json"), no_checkpoint / NAME


def test_fetch_puts_the_file_into_its_place(fetched: tuple[Shown, Path]) -> None:
    assert fetched[1].read_bytes() == CONTENT, fetched[0].text


def test_fetch_says_place_hash_and_licence(fetched: tuple[Shown, Path]) -> None:
    assert fetched[0].json() == {"path": str(fetched[1]), "sha256": DIGEST, "licence": "Apache-2.0"}


def test_fetch_for_people(no_checkpoint: Path, genuine: None, address: str) -> None:
    shown = shell("checkpoint", "fetch", "--url", address)
    assert str(no_checkpoint / NAME) in shown.out.splitlines() and f"sha256 {DIGEST}" in shown.out


def test_fetch_goes_on_where_it_stopped(no_checkpoint: Path, genuine: None, address: str) -> None:
    no_checkpoint.mkdir(parents=True)
    (no_checkpoint / f"{NAME}.part").write_bytes(CONTENT[:70_000])
    shell("checkpoint", "fetch", "--url", address)
    assert (no_checkpoint / NAME).read_bytes() == CONTENT


def test_fetch_of_another_file_is_refused(no_checkpoint: Path, address: str) -> None:
    shown = shell("checkpoint", "fetch", "--url", address)
    assert shown.code == WRONG_USE and "is not the published file" in shown.text and DIGEST in shown.text


def test_fetch_without_a_network_says_where_to_put_the_file(no_checkpoint: Path) -> None:
    shown = shell("checkpoint", "fetch", "--url", "http://127.0.0.1:9/w.pth")
    expected = ("cannot be reached", str(no_checkpoint / NAME), VARIABLE)
    assert shown.code == WRONG_USE and all(part in shown.text for part in expected), shown.text


# ---------------------------------------------------------------------- checkpoint show


def test_show_without_a_file_says_where_to_put_it(no_checkpoint: Path) -> None:
    shown = shell("checkpoint", "show")
    expected = (NAME, str(no_checkpoint / NAME), "semisamo1 checkpoint fetch", CARD.url)
    assert shown.code == WRONG_USE and all(part in shown.text for part in expected), shown.text


def test_show_of_a_named_file_that_is_not_there(no_checkpoint: Path, tmp_path: Path) -> None:
    shown = shell("checkpoint", "show", "--checkpoint", tmp_path / "mine.pth")
    assert shown.code == WRONG_USE and str(tmp_path / "mine.pth") in shown.text


def test_show_of_another_architecture(no_checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"model_state_dict": SamMed3D(SMALL_ARCHITECTURE).state_dict()}, tmp_path / "small.pth")
    shown = shell("checkpoint", "show", "--checkpoint", tmp_path / "small.pth")
    assert shown.code == WRONG_USE and "belongs to another architecture than SAM-Med3D" in shown.text


def test_show_of_a_file_that_is_none(no_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(b"<html>sign in</html>")
    shown = shell("checkpoint", "show", "--checkpoint", tmp_path / "page.pth")
    assert shown.code == WRONG_USE and "truncated or no checkpoint" in shown.text


@pytest.fixture
def shown_small(no_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A usable file, of the small architecture because the full one has 384 MiB."""
    from SemiSAMO1Lib.engine.generalists.sam_med3d import generalist

    real = generalist.load_model
    monkeypatch.setattr(generalist, "load_model", lambda given, _: real(given, "small"))
    path = tmp_path / "small.pth"
    torch.save({"model_state_dict": SamMed3D(SMALL_ARCHITECTURE).state_dict()}, path)
    return path, shell("checkpoint", "show", "--checkpoint", path).out.splitlines()


def test_show_says_place_and_hash(shown_small: tuple[Path, list[str]]) -> None:
    path, lines = shown_small
    assert lines[:2] == [str(path), f"sha256 {files.sha256(path)}"]


def test_show_says_that_a_file_is_not_the_published_one(shown_small: tuple[Path, list[str]]) -> None:
    assert shown_small[1][2] == "NOT the published file"


@pytest.mark.parametrize("command", ["fetch", "show"])
def test_the_help_has_an_example(command: str) -> None:
    assert f"Example: semisamo1 checkpoint {command}" in shell("checkpoint", command, "--help").text


@pytest.mark.parametrize("command", ["reproduce", "test", "export-h5", "import-h5"])
def test_the_help_of_the_other_commands_has_an_example(command: str) -> None:
    assert f"Example: semisamo1 {command}" in shell(command, "--help").text


# ---------------------------------------------------------------------- train --generalist


def trainings(project: Path) -> list[str]:
    return [path.name for path in (project / "jobs").iterdir() if path.name.endswith("-train")]


def test_a_training_without_rounds_finishes(trained: Trained) -> None:
    assert trained.shown.code == DONE and trained.shown.json()["round"] == 0, trained.shown.text


def test_features_are_kept_in_the_project(trained: Trained) -> None:
    kept = list((trained.project / "cache" / "features").glob("*.h5"))
    assert len(kept) == 3, f"one file a scan, the template's included, was expected, got {kept}"


def test_the_generalist_reaches_the_job(trained: Trained) -> None:
    assert trained.job.spec()["parameters"]["generalist"] == "mind"


def kept_features(project: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (project / "cache" / "features").iterdir()}


@dataclass(frozen=True)
class Second:
    """A second training of the project, of one round: its job folder, and when features were written before it."""

    job: Path
    before: dict[str, int]


@pytest.fixture(scope="module")
def second(trained: Trained) -> Second:
    before = kept_features(trained.project)
    options = ("--rounds", 1, "--iterations", 3, "--generalist", "mind", "--learner", "adversarial", "--json")
    shown = shell("train", trained.project, "--config", trained.config, *options)
    assert shown.code == DONE, shown.text
    return Second(JobFolder(trained.project / "jobs" / shown.json()["job"]).path, before)


def test_features_are_used_again(trained: Trained, second: Second) -> None:
    """By the next training of the project, whatever its other settings."""
    assert kept_features(trained.project) == second.before


def test_a_training_leaves_curves_in_its_job_folder(second: Second) -> None:
    assert set(curves(second.job / "curves" / "round-1")) == {
        *("total", "supervised", "pseudo", "consistency", "discriminator")
    }


def test_curves_and_events_say_the_same(second: Second) -> None:
    rows = [row for row in files.read_lines(second.job / "events.jsonl")[0] if row["kind"] == "losses"]
    expected = [row["losses"]["total"] for row in rows]
    assert curves(second.job / "curves" / "round-1")["total"] == pytest.approx(expected)


@pytest.mark.parametrize("expected", [NAME, "semisamo1 checkpoint fetch", "--generalist registration"])
def test_without_the_checkpoint_a_training_is_refused(trained: Trained, no_checkpoint: Path, expected: str) -> None:
    shown = shell("train", trained.project, "--generalist", "sam-med3d")
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


@pytest.mark.parametrize(
    "options",
    [
        ("--generalist", "sam-med3d"),
        ("--generalist", "fused", "--checkpoint", "nowhere.pth"),
        ("--generalist", "oracle"),
        ("--learner", "semisam"),
        ("--learner", "meen_teacher"),
    ],
)
def test_what_is_refused_makes_no_job(trained: Trained, no_checkpoint: Path, options: tuple[str, ...]) -> None:
    before = trainings(trained.project)
    shown = shell("train", trained.project, *options)
    assert (shown.code, trainings(trained.project)) == (WRONG_USE, before), shown.text


def test_an_unknown_generalist_is_named(trained: Trained) -> None:
    shown = shell("train", trained.project, "--generalist", "oracle")
    assert "unknown generalist 'oracle'; there are: fused, mind, registration, sam-med3d" in shown.text


@pytest.fixture
def requested(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Train without a worker: the parameters that a job would have got."""
    found: list[dict[str, Any]] = []

    def listening(_: object, parameters: dict[str, Any]) -> None:
        found.append(parameters)
        raise ValueError("that is all")

    monkeypatch.setattr("SemiSAMO1Lib.project.training.request_training", listening)

    def parameters(*options: object) -> dict[str, Any]:
        shown = shell("train", trained.project, *options)
        assert "that is all" in shown.text, shown.text
        return found[-1]

    return parameters


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--preprocessing", "released", {"preprocessing": "released"}),
        ("--coverage", "centre", {"coverage": "centre"}),
        ("--checkpoint", "random", {"checkpoint": "random"}),
    ],
)
def test_options_of_the_generalist_reach_the_job(
    requested: Callable[..., dict[str, Any]], option: str, value: str, expected: dict[str, str]
) -> None:
    assert requested(option, value)["generalists"] == expected


def test_options_of_the_generalist_leave_the_config_files(
    requested: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    files.write_json(tmp_path / "more.json", {"generalists": {"prototypes": 2, "coverage": "full"}})
    found = requested("--config", tmp_path / "more.json", "--coverage", "centre")
    assert found["generalists"] == {"prototypes": 2, "coverage": "centre"}


@pytest.mark.parametrize(("option", "value"), [("--preprocessing", "raw"), ("--coverage", "half")])
def test_a_wrong_option_of_the_generalist_is_named(trained: Trained, option: str, value: str) -> None:
    shown = shell("train", trained.project, option, value)
    assert shown.code == WRONG_USE and f"'{value}'" in shown.text, shown.text


def test_sections_of_the_config_file_must_be_sections(trained: Trained, tmp_path: Path) -> None:
    files.write_json(tmp_path / "more.json", {"generalists": "sam-med3d"})
    shown = shell("train", trained.project, "--config", tmp_path / "more.json", "--coverage", "centre")
    assert shown.code == WRONG_USE and "generalists" in shown.text, shown.text
