"""Judges behind a real server: verdicts in both orders, the cache, bounds, costs, and servers that fail."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, JudgeError, ServerError
from posttrain.judges import ChatClient, Judge, Rubric, compare, grade
from posttrain.rollouts.vllm.server import VllmServer
from tests.judges.servers import serving
from tests.sockets import answering


def longer(system: str, user: str) -> str:
    """Prefer the longer answer, whatever its place."""
    assert "Count letters." in system
    a, b = (re.search(rf"\[begin of answer {x}\]\n(.*?)\n\[end", user, re.S)[1] for x in "AB")  # type: ignore[index]
    return f"so: [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]"


def always_first(system: str, user: str) -> str:
    return "[[A]]"


RUBRIC = Rubric("Count letters.")
CHAT = [{"role": "user", "content": "say something"}]
PAIRS = [("p", "long answer", "short"), ("p", "a", "bb"), (CHAT, "same", "size"), ("p", "long answer", "short")]


def client(url: str, **options: object) -> ChatClient:
    return ChatClient(url, "judge", waits_seconds=(0.0, 0.0), **options)  # type: ignore[arg-type]


def test_both_orders_are_asked_and_a_judge_that_follows_the_place_says_tie() -> None:
    with serving(longer) as server:
        judge = Judge(client(server.url))
        assert compare(judge, RUBRIC, PAIRS) == ["first", "second", "tie", "first"]
        assert len(server.bodies) == 6, "the pair that came twice is asked once, each pair in both orders"
        assert (judge.usage.asked, judge.usage.cached) == (6, 2)
        assert "user: say something" in {
            text for body in server.bodies for text in body["messages"][1]["content"].split("\n")
        }
    with serving(always_first) as server:
        assert compare(Judge(client(server.url)), RUBRIC, PAIRS[:2]) == ["tie", "tie"]


def test_scores_are_read_within_their_range_and_a_reply_without_one_is_none() -> None:
    replies = {"one": "[[1]] no: [[7.5]]", "two": "eleven [[11]]", "three": "good"}
    with serving(lambda system, user: next(r for word, r in replies.items() if word in user)) as server:
        graded = grade(Judge(client(server.url)), RUBRIC, [("p", word) for word in replies])
        assert graded == [7.5, None, None]


def test_replies_are_on_disk_and_a_second_judge_asks_nothing_and_costs_nothing(tmp_path: Path) -> None:
    with serving(longer) as server:
        first = Judge(client(server.url, key="secret-key"), tmp_path)
        assert compare(first, RUBRIC, PAIRS[:1]) == ["first"]
        words = sum(len(body["messages"][1]["content"].split()) for body in server.bodies)
        assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (words, 2 * 3)
        assert server.headers[0]["Authorization"] == "Bearer secret-key"
        second = Judge(client(server.url), tmp_path)
        assert compare(second, RUBRIC, PAIRS[:1]) == ["first"]
        assert (len(server.bodies), second.usage.asked, second.usage.cached) == (2, 0, 2)
        assert compare(Judge(client(server.url), tmp_path), Rubric("Count letters. Twice."), PAIRS[:1]) == ["first"]
        assert len(server.bodies) == 4, "another rubric is another question"
        stored = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(b"secret-key" in path.read_bytes() for path in stored)
        for path in stored:
            path.write_bytes(b"{")
        compare(Judge(client(server.url), tmp_path), RUBRIC, PAIRS[:1])
        assert len(server.bodies) == 6, "a damaged reply is asked for again"


def test_no_more_requests_than_allowed_are_under_way() -> None:
    barrier = threading.Barrier(3)
    with serving(always_first) as server:
        server.wait = lambda: barrier.wait(timeout=60)  # type: ignore[assignment,return-value]
        judge = Judge(client(server.url), concurrent=3)
        grade(judge, RUBRIC, [("p", str(i)) for i in range(9)])
        assert (server.most_at_once, len(server.bodies)) == (3, 9)


COMPLETION = b'{"choices": [{"message": {"content": "[[7]]"}}], "usage": {"prompt_tokens": %s}}'
"""A reply with its count of tokens."""


def test_a_busy_server_is_asked_again_and_one_that_stays_broken_ends_in_words(tmp_path: Path) -> None:
    with serving(always_first) as server:
        server.faults = [503, 429]
        assert grade(Judge(client(server.url)), RUBRIC, [("p", "a")]) == [None]
        assert len(server.bodies) == 3
        server.faults = [500, 500, 500]
        with pytest.raises(JudgeError, match=r"failed 3 times: status 500"):
            grade(Judge(client(server.url), tmp_path), RUBRIC, [("p", "a")])
        server.faults = [401]
        with pytest.raises(JudgeError, match="refused the request with status 401"):
            grade(Judge(client(server.url, key="k")), RUBRIC, [("p", "a")])
        server.raw = b"<html>"
        for odd in (b"[" * 100_000, COMPLETION % b"1e999", b"[]", b"3", b'{"choices": [3]}'):
            server.raw = odd
            with pytest.raises(JudgeError, match="sent no chat completion: "):
                grade(Judge(client(server.url)), RUBRIC, [("p", "a")])
        server.raw = b"<html>"
        with pytest.raises(JudgeError, match="sent no chat completion: <html>"):
            grade(Judge(client(server.url)), RUBRIC, [("p", "a")])
        url = server.url
    with pytest.raises(JudgeError, match="Is the server running"):
        grade(Judge(client(url)), RUBRIC, [("p", "a")])


@pytest.mark.parametrize(("reported", "counted"), [(b"7", 7), (b"-1000", 0), (b"1" + b"0" * 30, 0)])
def test_an_impossible_usage_is_not_counted(reported: bytes, counted: int) -> None:
    with serving(always_first) as server:
        server.raw = COMPLETION % reported
        judge = Judge(client(server.url))
        assert grade(judge, RUBRIC, [("p", "a")]) == [7.0]
        assert judge.usage.prompt_tokens == counted


def test_a_server_that_never_answers_is_left() -> None:
    released = threading.Event()
    with serving(always_first) as server:
        server.wait = lambda: released.wait(60)  # type: ignore[assignment,return-value]
        with pytest.raises(JudgeError, match=r"failed 3 times: (timed out|no whole answer within 0\.2 s)"):
            grade(Judge(client(server.url, timeout_seconds=0.2)), RUBRIC, [("p", "a")])
        released.set()


@pytest.mark.parametrize("begin", ["X-Slow: ", "\r\n", "Content-Length: 99\r\n\r\n"])
@pytest.mark.parametrize("asks", ["judge", "vllm"])
def test_a_server_that_trickles_its_answer_is_left(begin: str, asks: str) -> None:
    """A socket's limit is one for each byte; this server sends one every 20 ms."""
    ended = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(f"HTTP/1.1 200 OK\r\n{begin}".encode())
            while not ended.wait(0.02):
                connection.sendall(b" ")

    with answering(trickle) as url:
        if asks == "judge":
            with pytest.raises(JudgeError, match=r"failed 1 times: no whole answer within 0\.3 s"):
                ChatClient(url, "judge", timeout_seconds=0.3, waits_seconds=()).complete(
                    [{"role": "user", "content": "x"}]
                )
        else:
            with pytest.raises(ServerError, match=r"no whole answer within 0\.3 s"):
                VllmServer(url)._fetch("GET", "/health", None, 0.3)
        ended.set()


@pytest.mark.parametrize(
    "url", ["http://h:port/v1", "http://[::1/v1", "http://h:0x1/v1", "http://h o/v1", "http:///v1", "http://h/\n"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a server"):
        ChatClient(url, "judge")


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="give the secret as its key") as caught:
        ChatClient("http://me:hunter2@127.0.0.1/v1", "judge")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(ChatClient("http://127.0.0.1/v1", "judge", key="hunter2"))
