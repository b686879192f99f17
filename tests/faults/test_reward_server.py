"""Server and client of remote rewards: they agree, hostile requests are refused, faults of a server are survived."""

import base64
import functools
import gzip
import io
import json
import resource
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from unified_rl.cli import main
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.picture_wire import encode_picture
from unified_rl.rewards.remote import RemoteError, RemoteReward
from unified_rl.rewards.scoring import RewardFailedError, load_rewards, reward_of, score
from unified_rl.rewards.serve import Limits, make_app, serve_command
from unified_rl.types import Completion, Prompt

TOKEN = "a long secret"


def length(prompts: list, completions: list, factor: list, **columns: Any) -> list[float | None]:
    return [None if each == "?" else len(each) * times for each, times in zip(completions, factor, strict=True)]


def redness(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [image.getpixel((0, 0))[0] / 255 for image in completions]


def broken(completions: list, **columns: Any) -> list[float]:
    raise RuntimeError("out of order")


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(timeout=5)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of three rewards, behind a token and small limits."""
    rewards = [reward_of(function, name=function.__name__) for function in (redness, length, broken)]
    limits = Limits(body_bytes=100_000, batch=8, pixels=10_000, all_pixels=20_000)
    with serving(make_app(rewards, names=["redness", "length", "broken"], token=TOKEN, limits=limits)) as address:
        yield address


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_RL_TOKEN", TOKEN)


def post(url: str, body: Any, **headers: str) -> int:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=head)) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        assert isinstance(error.reason, ConnectionError), "the server hung up on a body that is too long"
        return 413


# --- they agree ---


def test_a_remote_reward_scores_as_the_local_one(server: str) -> None:
    (remote,) = load_rewards([RewardBlock(name=f"{server}/length")])
    local = reward_of(length, name="length")
    prompts = [Prompt(text="p", images=(), columns={"factor": number}, group_id=0, seed=0) for number in (1, 2, 3)]
    said = [Completion(text=text, images=()) for text in ("a", "bcd", "?")]
    found, expected = (score([each], prompts, said).breakdown["length"] for each in (remote, local))
    remote.runner.close()
    assert remote.name == "length"
    assert found[:2].tolist() == expected[:2].tolist() == [1.0, 6.0] and found.isnan().tolist() == [False, False, True]


def test_pictures_and_flow_factorys_protocol(server: str) -> None:
    shown = [Image.new("RGB", (4, 4), colour) for colour in ("red", "black")]
    assert RemoteReward(f"{server}/redness")(["p", "p"], shown) == [1.0, 0.0]
    assert RemoteReward(f"{server}/any", protocol="flow_factory")(["p", "p"], shown) == [1.0, 0.0]


def half_broken(solution_str: str) -> float:
    if solution_str == "boom":
        raise RuntimeError("no")
    return 1.0


def answer(url: str, *texts: str) -> dict[str, Any]:
    body = json.dumps({"prompts": ["p"] * len(texts), "texts": texts}).encode()
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/score", data=body, headers=head)) as response:
        return json.loads(response.read())


def test_what_fails_for_some_has_scores_for_the_others() -> None:
    rewards = [reward_of(half_broken, name="half_broken")]
    with serving(make_app(rewards, names=["half_broken"], token=None)) as address:
        some, none = answer(address, "a", "boom", "b"), answer(address, "boom")
    assert (some["scores"], some["errors"]) == ({"half_broken": [1.0, None, 1.0]}, {})
    assert (none["scores"], none["errors"]) == ({}, {"half_broken": "reward 'half_broken' RuntimeError: no"})


def test_the_command_tells_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed call is no abstention: the client has to count it."""
    (tmp_path / "mine.py").write_text("def broken(completions):\n    raise RuntimeError('out of order')\n")
    apps: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(uvicorn, "run", lambda app, **keys: apps.append(app))
        assert serve_command([f"{tmp_path}/mine.py:broken"], host="127.0.0.1", port=1) == 0
    with serving(apps[0]) as address:
        found = answer(address, "a")
    assert found["scores"] == {} and "RuntimeError: out of order" in found["errors"]["broken"]


def test_errors_are_a_rewards_own(server: str) -> None:
    with pytest.raises(RemoteError, match="reward 'broken' failed: RuntimeError: out of order"):
        RemoteReward(f"{server}/broken")(["p"], ["a"])
    with pytest.raises(RemoteError, match="has no reward 'lenght'"):
        RemoteReward(f"{server}/lenght")
    assert RemoteReward(f"{server}/length")(["p"], ["ab"], factor=[1]) == [2.0], "the others go on"


# --- hostile requests ---


def bomb() -> str:
    """A picture of 144 million pixels in a few kB."""
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def picture_request(*pictures: Any) -> dict[str, Any]:
    return {"prompts": ["p"] * len(pictures), "pictures": list(pictures), "rewards": ["redness"]}


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (401, {"prompts": ["p"]}, {"Authorization": "Bearer wrong"}),
        (401, {"prompts": ["p"]}, {"Authorization": ""}),
        (413, picture_request(*["x"] * 100_000), {}),
        (413, {"prompts": ["p"] * 9, "texts": ["t"] * 9}, {}),
        (413, b"[" + b" " * 200_000, {}),
        (400, picture_request(bomb()), {}),
        (400, picture_request(*[encode_picture(Image.new("RGB", (90, 90)))] * 3), {}),
        (415, gzip.compress(b"{" + b" " * 10_000_000), {"Content-Encoding": "gzip"}),
        (415, {"prompts": ["p"]}, {"Content-Type": "application/x-pickle"}),
        (400, b"[" * 50_000, {}),
        (400, b"\x80\x04.", {}),
        (400, picture_request("file:///etc/passwd"), {}),
        (400, picture_request("http://169.254.169.254/latest/meta-data"), {}),
        (400, picture_request("data:image/svg+xml;base64,AAAA"), {}),
        (400, picture_request(base64.b64encode(b"GIF89a....").decode()), {}),
        (400, picture_request({"path": "/etc/passwd"}), {}),
        (400, {"prompts": ["p", "p"], "texts": ["t"]}, {}),
        (400, {"prompts": []}, {}),
        (400, {"prompts": ["p"], "texts": [5]}, {}),
        (400, {"prompts": ["p"], "texts": ["t"], "columns": {"factor": [1, 2]}}, {}),
        (404, {"prompts": ["p"], "texts": ["t"], "rewards": ["os.system"]}, {}),
    ],
)
def test_hostile_requests_are_refused_and_the_server_stays(
    server: str, status: int, body: Any, headers: dict[str, str]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert post(f"{server}/v1/score", body, **headers) == status
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024, "KiB: the server is in this process"
    with urllib.request.urlopen(f"{server}/health") as response:
        assert json.load(response)["status"] == "ok"


def test_other_addresses_need_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("UNIFIED_RL_TOKEN")
    assert main(["serve", "--reward", "answer", "--host", "0.0.0.0"]) == 2
    assert "set a token in the environment variable UNIFIED_RL_TOKEN" in capsys.readouterr().err


# --- faults of a server ---


class Faulty(BaseHTTPRequestHandler):
    """Plays the faults in `script`, one a request, then answers well."""

    script: list[Callable[["Faulty"], None]] = []
    version = "1"

    def do_GET(self) -> None:
        self.reply({"status": "ok", "version": self.version, "rewards": ["x"]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.script:
            self.script.pop(0)(self)
        else:
            self.reply({"version": self.version, "scores": {"x": [0.5]}, "errors": {}})

    def reply(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"scores"')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def slow(self) -> None:
        time.sleep(3.0)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def faulty() -> Iterator[str]:
    Faulty.script, Faulty.version = [], "1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x"
    server.shutdown()
    server.server_close()


def client(url: str) -> RemoteReward:
    return RemoteReward(url, timeout=1.0, retries=2, first_pause=0.01)


@pytest.mark.parametrize(
    "fault",
    [
        functools.partial(Faulty.reply, body={}, status=500),
        functools.partial(Faulty.reply, body={}, status=429, Retry_After="0"),
        functools.partial(Faulty.reply, body=b"<html>"),
        functools.partial(Faulty.reply, body=[]),
        Faulty.cut,
        Faulty.slow,
    ],
)
def test_a_moments_fault_is_tried_again(faulty: str, fault: Callable) -> None:
    reward = client(faulty)
    Faulty.script = [lambda handler: fault(handler)] * 2
    assert reward(["p"], ["a"]) == [0.5] and not Faulty.script
    Faulty.script = [lambda handler: fault(handler)] * 3
    with pytest.raises(RemoteError, match="failed 3 times; last: "):
        reward(["p"], ["a"])


def test_what_is_no_passing_fault_is_not_repeated(faulty: str) -> None:
    reward = client(faulty)
    Faulty.script = [functools.partial(Faulty.reply, body={"error": "no"}, status=400)] * 2  # type: ignore[list-item]
    with pytest.raises(RemoteError, match="status 400"):
        reward(["p"], ["a"])
    assert len(Faulty.script) == 1
    Faulty.script = [functools.partial(Faulty.reply, body=b"", status=302, Location="http://169.254.169.254/")]  # type: ignore[list-item]
    with pytest.raises(RemoteError, match="status 302"):
        reward(["p"], ["a"])


def test_another_version_in_mid_run_is_noticed(faulty: str) -> None:
    reward = client(faulty)
    Faulty.version = "2"
    with pytest.raises(RemoteError, match="replaced by another version"):
        reward(["p"], ["a"])


@pytest.mark.parametrize("scores", [[float("nan")], [None]])
def test_nan_from_a_server_excludes(faulty: str, scores: list) -> None:
    good = {"version": "1", "scores": {"x": scores}, "errors": {}}
    Faulty.script = [functools.partial(Faulty.reply, body=good)]  # type: ignore[list-item]
    reward = reward_of(client(faulty), name="x")
    prompts = [Prompt(text="p", images=(), columns={}, group_id=0, seed=0)]
    assert score([reward], prompts, [Completion(text="a", images=())]).total.isnan().all()


def test_too_many_scores_from_a_server(faulty: str) -> None:
    much = {"version": "1", "scores": {"x": [1.0, 2.0]}, "errors": {}}
    Faulty.script = [functools.partial(Faulty.reply, body=much)]  # type: ignore[list-item]
    prompts = [Prompt(text="p", images=(), columns={}, group_id=0, seed=0)]
    with pytest.raises(RewardFailedError, match="returned 2 scores for 1 completions"):
        score([reward_of(client(faulty), name="x")], prompts, [Completion(text="a", images=())])


def test_nobody_there() -> None:
    with pytest.raises(RemoteError, match="Connection refused"):
        client("http://127.0.0.1:1/x")
