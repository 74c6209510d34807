"""The checkpoint: found where it was said to lie, read without running code, fetched whole or not at all."""

import contextlib
import hashlib
import http.server
import pickle
import socket
import threading
import zipfile
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn

from SemiSAMO1Lib.engine.generalists.sam_med3d import checkpoint
from SemiSAMO1Lib.engine.generalists.sam_med3d.architecture import SMALL
from SemiSAMO1Lib.engine.generalists.sam_med3d.checkpoint import (
    CARD,
    NAME,
    VARIABLE,
    CheckpointError,
    fetch,
    find,
    is_published,
    load,
    read_weights,
)
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import load_encoder, load_model
from SemiSAMO1Lib.engine.generalists.sam_med3d.model import SamMed3D

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _nothing_at_hand(monkeypatch, tmp_path):
    """No checkpoint of this computer's user plays a part."""
    monkeypatch.setattr(checkpoint.sys, "platform", "linux")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def cached(tmp_path):
    return put(tmp_path / "cache" / "semisamo1" / NAME)


# ---------------------------------------------------------------------- where it lies


def test_given_file_is_found(tmp_path):
    mine = put(tmp_path / "mine.pth")
    assert find(str(mine)) == mine


def test_given_folder_holds_the_file(tmp_path):
    mine = put(tmp_path / "weights.v1" / NAME)
    assert find(str(mine.parent)) == mine


def test_given_file_may_have_no_suffix(tmp_path):
    mine = put(tmp_path / "blobs" / "899a46d0")
    assert find(str(mine)) == mine


def test_variable_names_the_file(tmp_path, monkeypatch):
    mine = put(tmp_path / "other name.pt")
    monkeypatch.setenv(VARIABLE, str(mine))
    assert find() == mine


def test_variable_names_the_folder(tmp_path, monkeypatch):
    mine = put(tmp_path / "weights" / NAME)
    monkeypatch.setenv(VARIABLE, str(mine.parent))
    assert find() == mine


def test_cache_folder_is_looked_at(cached):
    assert find() == cached


def test_cache_folder_is_in_the_home_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.cache_folder() == tmp_path / ".cache" / "semisamo1", "an empty XDG_CACHE_HOME counts as unset"


def test_variable_comes_before_the_cache(tmp_path, monkeypatch, cached):
    mine = put(tmp_path / "mine.pth")
    monkeypatch.setenv(VARIABLE, str(mine))
    assert find() == mine, f"{cached} was taken though {VARIABLE} names another file"


def test_given_file_comes_before_the_variable(tmp_path, monkeypatch):
    mine = put(tmp_path / "mine.pth")
    monkeypatch.setenv(VARIABLE, str(put(tmp_path / "variable.pth")))
    assert find(str(mine)) == mine


def test_given_file_that_is_missing_is_not_replaced_by_another(tmp_path, cached):
    assert cached.is_file()
    with pytest.raises(CheckpointError, match="absent"):
        find(str(tmp_path / "absent.pth"))


@pytest.fixture
def not_found(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "by_variable.pth"))
    with pytest.raises(CheckpointError) as error:
        find()
    return str(error.value)


def test_not_found_names_the_place_to_put_it(not_found, tmp_path):
    place = tmp_path / "by_variable.pth"
    assert not_found.count(str(place)) == 2, f"where it was looked for and where it goes, expected in: {not_found}"


def test_not_found_does_not_name_a_place_where_nobody_looks(not_found, tmp_path):
    assert str(tmp_path / "cache") not in not_found, not_found


@pytest.mark.parametrize(
    "way", ["semisamo1 checkpoint fetch", CARD.url, "--generalist registration", "--generalist mind"]
)
def test_not_found_says_what_to_do(not_found, way):
    assert way in not_found, f"expected {way!r} in: {not_found}"


# ---------------------------------------------------------------------- reading


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_published_form_is_read(tmp_path, zipped):
    path = saved(tmp_path / "w.pth", {"model_state_dict": WEIGHTS}, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path)[0], WEIGHTS)


def test_bare_state_dict_is_read(tmp_path):
    assert same(read_weights(saved(tmp_path / "w.pth", WEIGHTS))[0], WEIGHTS)


def test_nothing_is_said_of_a_file_as_published(tmp_path):
    assert read_weights(saved(tmp_path / "w.pth", {"model_state_dict": WEIGHTS}))[1] == []


def wrapped(prefix):
    return {prefix + name: one for name, one in WEIGHTS.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    assert same(read_weights(saved(tmp_path / "w.pth", wrapped(prefix)))[0], WEIGHTS)


def test_a_prefix_is_told(tmp_path):
    notes = read_weights(saved(tmp_path / "w.pth", wrapped("module.")))[1]
    assert len(notes) == 1 and "'module.'" in notes[0], f"expected one note on the prefix, got {notes}"


def test_a_prefix_of_some_names_stays(tmp_path):
    weights = {**wrapped("module."), "b": torch.zeros(1)}
    assert read_weights(saved(tmp_path / "w.pth", weights))[0].keys() == weights.keys()


HALVES = [torch.float16, torch.bfloat16]


def halved(kind):
    return {name: one.to(kind) for name, one in WEIGHTS.items()}


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_becomes_float32(tmp_path, kind):
    found = read_weights(saved(tmp_path / "w.pth", halved(kind)))[0]
    assert {one.dtype for one in found.values()} == {torch.float32}


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_is_told(tmp_path, kind):
    notes = read_weights(saved(tmp_path / "w.pth", halved(kind)))[1]
    assert len(notes) == 1 and "half precision" in notes[0], f"expected one note on the precision, got {notes}"


class Intruder:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["zip", "old format", "pickle"])
def with_code(request, tmp_path):
    """A checkpoint with program code in it, and the file that the code would write."""
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"model_state_dict": WEIGHTS, "args": Intruder(trace)}
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Intruder(trace), 2))
    else:
        saved(path, content, _use_new_zipfile_serialization=request.param == "zip")
    return path, trace


def test_intruder_is_armed(with_code):
    """Without this the next test would prove nothing."""
    path, trace = with_code
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert trace.exists()


def test_code_is_not_run(with_code):
    path, trace = with_code
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not trace.exists(), "code from the checkpoint was run"


def test_refusal_of_code_names_what_was_found(with_code):
    with pytest.raises(CheckpointError, match=r"pickled program code.*(io|_io|builtins)\W?\.?open"):
        read_weights(with_code[0])


def test_refusal_of_code_says_how_to_convert(with_code):
    with pytest.raises(CheckpointError, match=r"If, and only if, you trust.*weights_only=False.*torch\.save"):
        read_weights(with_code[0])


def test_code_is_refused_behind_the_registrys_door_too(with_code):
    path, trace = with_code
    with pytest.raises(CheckpointError):
        load_encoder(str(path), "small")
    assert not trace.exists(), "code from the checkpoint was run"


def damaged(kind, path):
    """Files that are no checkpoint."""
    whole = saved(path, {"model_state_dict": WEIGHTS}).read_bytes()
    old = saved(path, {"model_state_dict": WEIGHTS}, _use_new_zipfile_serialization=False).read_bytes()
    contents = {
        "empty": b"",
        "first bytes": whole[:3],
        "half": whole[: len(whole) // 2],
        "without the last byte": whole[:-1],
        "half of the old format": old[: len(old) // 2],
        "few bytes of the old format": old[:60],
        "text": b"hello there",
        "pointer to a large file": b"version https://git-lfs.github.com/spec/v1\noid sha256:899a46d0\nsize 402135119\n",
        "web page": b"<!DOCTYPE html><html>404</html>",
        "nothing but zeros": bytes(1000),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b.txt", "no weights")
    return path


DAMAGES = [
    "empty",
    "first bytes",
    "half",
    "without the last byte",
    "half of the old format",
    "few bytes of the old format",
    "text",
    "pointer to a large file",
    "web page",
    "nothing but zeros",
    "another archive",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_file_that_is_no_checkpoint_is_an_error_that_says_what_to_do(tmp_path, kind):
    path = damaged(kind, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth cannot be read.*semisamo1 checkpoint fetch"):
        read_weights(path)


def test_damage_is_told_with_the_sizes(tmp_path):
    path = damaged("half", tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"{path.stat().st_size:,} bytes found.*402,135,119"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"model_state_dict": {"a": "text"}}, {"epoch": 3}, torch.zeros(2)])
def test_file_without_a_state_dict(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(saved(tmp_path / "w.pth", content))


# ---------------------------------------------------------------------- strict loading


def other_architecture():
    """Expected: (3, 2) weight and bias, twice. Here: one layer absent, one of another shape, one too many."""
    model = nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(2, 3)})
    weights = {"second.weight": torch.zeros(5, 7), "second.bias": torch.zeros(3), "third.scale": torch.zeros(1)}
    return model, {**weights, "third.shift": torch.zeros(1)}


@pytest.mark.parametrize(
    "named",
    [
        r"Missing: \['first.weight', 'first.bias'\]",
        r"Unexpected: \['third.scale', 'third.shift'\]",
        r"Other shapes: \['second.weight \(5, 7\) instead of \(3, 2\)'\]",
        "semisamo1 checkpoint fetch",
    ],
)
def test_every_name_of_another_architecture_is_listed(tmp_path, named):
    model, weights = other_architecture()
    with pytest.raises(CheckpointError, match=named):
        load(model, weights, tmp_path / "w.pth")


def test_another_architecture_changes_nothing(tmp_path):
    model, weights = other_architecture()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(model, weights, tmp_path / "w.pth")
    assert same(model.state_dict(), before)


def test_a_part_is_loaded_by_its_prefix(tmp_path):
    layer = nn.Linear(3, 2)
    load(
        layer,
        {"encoder.weight": WEIGHTS["a.weight"], "encoder.bias": WEIGHTS["a.bias"], "other": torch.zeros(1)},
        tmp_path / "w.pth",
        "encoder.",
    )
    assert torch.equal(layer.weight, WEIGHTS["a.weight"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model and a checkpoint of it."""
    torch.manual_seed(1)
    model = SamMed3D(SMALL)
    path = tmp_path_factory.mktemp("small") / "small.pth"
    return model, saved(path, {"model_state_dict": model.state_dict()})


def test_whole_model_is_loaded(small):
    assert same(load_model(str(small[1]), "small").model.state_dict(), small[0].state_dict())


def test_an_encoder_beside_another_decoder_is_refused(small, tmp_path):
    """The encoder fits; the file is another model's all the same."""
    state = {name: one for name, one in small[0].state_dict().items() if not name.startswith("mask_decoder.")}
    path = saved(tmp_path / "other.pth", {**state, "another_decoder.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"Missing: \['mask_decoder.*another_decoder\.weight"):
        load_encoder(str(path), "small")


def test_encoder_alone_is_loaded(small):
    assert same(load_encoder(str(small[1]), "small").model.state_dict(), small[0].image_encoder.state_dict())


def test_loaded_model_answers_as_the_saved_one(small):
    """Nothing that is not in the file may stay uninitialised."""
    volume = torch.randn(1, 1, 64, 64, 64)
    with torch.inference_mode():
        expected = small[0].image_encoder.eval()(volume)
        found = load_encoder(str(small[1]), "small").model.eval()(volume)
    assert torch.equal(found, expected)


def test_prefixed_half_precision_model_is_loaded(small, tmp_path):
    weights = {f"module.{name}": one.half() for name, one in small[0].state_dict().items()}
    notes = load_model(str(saved(tmp_path / "w.pth", weights)), "small").notes
    assert len(notes) == 3, f"expected notes on prefix, precision and hash, got {notes}"


def test_small_file_is_not_the_full_model(small):
    with pytest.raises(CheckpointError, match=r"another architecture.*pos_embed"):
        load_encoder(str(small[1]), "full")


def test_identity_is_the_files_hash(small):
    assert load_encoder(str(small[1]), "small").identity == hashlib.sha256(small[1].read_bytes()).hexdigest()


def test_another_hash_than_the_published_one_is_told(small):
    digest = hashlib.sha256(small[1].read_bytes()).hexdigest()
    notes = load_encoder(str(small[1]), "small").notes
    assert len(notes) == 1 and digest in notes[0] and "899a46d0" in notes[0], f"expected both hashes in {notes}"


def test_published_hash_needs_no_word(small, monkeypatch):
    digest = hashlib.sha256(small[1].read_bytes()).hexdigest()
    monkeypatch.setattr(checkpoint, "CARD", replace(CARD, sha256=(digest[:8], digest[-5:])))
    assert load_encoder(str(small[1]), "small").notes == ()


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        ("899a46d0" + "0" * 51 + "cdd3c", True),
        ("899a46d0" + "0" * 51 + "cdd3d", False),
        ("999a46d0" + "0" * 51 + "cdd3c", False),
        ("", False),
    ],
)
def test_published_hash_is_known_by_its_ends(digest, expected):
    assert is_published(digest) is expected


def test_random_weights_depend_on_the_seed_alone():
    states = [load_encoder("random", "small", seed).model.state_dict() for seed in (3, 3)]
    assert same(*states)


def test_random_weights_of_another_seed_are_others():
    states = [load_encoder("random", "small", seed).model.state_dict() for seed in (3, 4)]
    assert not same(*states)


def test_random_weights_leave_the_random_state_alone():
    before = torch.get_rng_state()
    load_encoder("random", "small", 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_are_told():
    assert "random weights" in load_encoder("random", "small").notes[0]


# ---------------------------------------------------------------------- fetching


@dataclass
class Server:
    """A web server on this computer that gives CONTENT.

    Attributes:
        ranges: it can go on where a download stopped.
        cut: bytes after which it hangs up, once; None: never.
        chunked: it does not say in advance how much there is.
        asked: the Range header of every request, or None.
        sent: bytes of every answer.
    """

    ranges: bool = True
    cut: int | None = None
    chunked: bool = False
    asked: list = field(default_factory=list)
    sent: list = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if self.path != "/w.pth":
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            body = CONTENT[start:]
            self.send_response(206 if asked and state.ranges else 200)
            if state.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            body, state.cut = (body[: state.cut], None) if state.cut else (body, None)
            state.sent.append(len(body))  # first: who has got it may ask at once
            if state.chunked:
                self.wfile.write(b"%x\r\n" % len(CONTENT))
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{one.server_port}/w.pth"
        yield state
        one.shutdown()
        thread.join()


@pytest.fixture
def published(monkeypatch):
    """CONTENT is the published file."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(checkpoint, "CARD", replace(CARD, sha256=(digest[:8], digest[-5:]), size_bytes=len(CONTENT)))
    return digest


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new folder" / NAME


def begun(target, count):
    """A download of which `count` bytes are there."""
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(CONTENT[:count])
    return part


def test_whole_file_is_fetched(server, published, target):
    path, _ = fetch(target, server.url)
    assert path == target and target.read_bytes() == CONTENT


def test_hash_of_what_was_fetched_is_given(server, published, target):
    assert fetch(target, server.url)[1] == published


def test_nothing_else_stays_in_the_folder(server, published, target):
    fetch(target, server.url)
    assert [path.name for path in target.parent.iterdir()] == [NAME]


def test_fetching_tells_how_far_it_is(server, published, target):
    told = []
    fetch(target, server.url, lambda done, of: told.append((done, of)))
    assert told[-1] == (len(CONTENT), len(CONTENT)), f"expected to be told of all bytes, got {told}"


@pytest.mark.parametrize("ranges", [True, False], ids=["goes on", "begins anew"])
def test_interrupted_download_ends_whole(server, published, target, ranges):
    server.ranges = ranges
    begun(target, 100_000)
    fetch(target, server.url)
    assert target.read_bytes() == CONTENT


def test_interrupted_download_fetches_the_rest_only(server, published, target):
    begun(target, 100_000)
    fetch(target, server.url)
    assert (server.asked, server.sent) == (["bytes=100000-"], [200_000])


def test_resumed_download_tells_of_all_bytes(server, published, target):
    told = []
    begun(target, 100_000)
    fetch(target, server.url, lambda done, of: told.append((done, of)))
    assert told[-1] == (len(CONTENT), len(CONTENT)), f"expected to be told of all bytes, got {told}"


def test_download_of_which_all_is_there_is_finished(server, published, target):
    begun(target, len(CONTENT))
    fetch(target, server.url)
    assert target.read_bytes() == CONTENT


@pytest.fixture
def cut_short(server, published, target):
    server.cut = 120_000
    with pytest.raises(CheckpointError) as error:
        fetch(target, server.url)
    return str(error.value)


def test_server_that_ends_early_is_an_error(cut_short):
    assert "120,000 of 300,000" in cut_short and "run it again" in cut_short, cut_short


def test_what_came_before_the_end_is_not_taken_for_the_file(cut_short, target):
    assert not target.exists()


def test_after_an_early_end_the_rest_is_fetched(cut_short, server, target):
    fetch(target, server.url)
    assert server.asked[1] == "bytes=120000-" and target.read_bytes() == CONTENT


def test_early_end_without_a_known_size_is_an_error(server, published, target):
    server.chunked, server.cut = True, 50_000
    with pytest.raises(CheckpointError, match="IncompleteRead"):
        fetch(target, server.url)


@pytest.fixture
def not_the_published(server, target):
    with pytest.raises(CheckpointError) as error:
        fetch(target, server.url)
    return str(error.value)


def test_another_file_is_an_error_with_both_hashes(not_the_published):
    expected = [hashlib.sha256(CONTENT).hexdigest(), *CARD.sha256]
    assert all(part in not_the_published for part in expected), f"expected {expected} in: {not_the_published}"


def test_another_file_is_kept_beside(not_the_published, target):
    kept = target.with_name(NAME + ".unverified")
    assert kept.read_bytes() == CONTENT and str(kept) in not_the_published


def test_another_file_does_not_become_the_checkpoint(not_the_published, target):
    assert not target.exists()


def test_another_file_does_not_spoil_the_next_download(not_the_published, published, server, target):
    fetch(target, server.url)
    assert target.read_bytes() == CONTENT


@pytest.fixture(params=["closed port", "no such page"])
def unreachable(request, server, published, target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/w.pth"
    with pytest.raises(CheckpointError) as error:
        fetch(target, closed if request.param == "closed port" else server.url + "x")
    return str(error.value)


def test_without_a_network_it_says_where_to_put_the_file(unreachable, target):
    expected = (str(target), "300,000 bytes", VARIABLE, "--checkpoint")
    assert all(part in unreachable for part in expected), f"expected {expected} in: {unreachable}"


def test_without_a_network_no_file_is_left(unreachable, target):
    assert not list(target.parent.iterdir())
