import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import requests
from click.testing import CliRunner
from scripts import ROOT

from dnnlib import EasyDict, cli, util
from dnnlib.atomic import atomic_write, write_json
from dnnlib.cli import IntList, UserError, user_errors
from dnnlib.util import Logger, cache_dir, counted, format_time, open_url

BODY = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY, whole or in one of the ways in which servers fail."""

    hits: list[str] = []

    def do_GET(self):
        self.hits.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        body = b"  <!DOCTYPE html><p>Sign in</p>" if self.path == "/page" else BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:1000] if self.path == "/cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv(util.CACHE_DIR_ENV, str(tmp_path))
    Handler.hits = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def cached():
    folder = cache_dir("downloads")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_is_made_once_and_kept(server):
    for _ in range(2):
        with open_url(f"{server}/a/weights.bin?x=1") as file:
            assert file.read() == BODY
    assert Handler.hits == ["/a/weights.bin?x=1"]
    name, record = cached()
    assert name.endswith("_weights.bin") and record == f"{name}.sha256"


def test_the_hash_of_the_first_download_is_kept_and_asked_for(server, monkeypatch):
    open_url(f"{server}/x").close()
    target, record = (cache_dir("downloads") / name for name in cached())
    assert record.read_text() == hashlib.sha256(BODY).hexdigest() + "\n"
    target.write_bytes(BODY[:-1] + b"x")
    with pytest.raises(OSError, match=r"x: is not the file that was downloaded from http://127"):
        open_url(f"{server}/x")
    target.unlink()  # the address then holds something else
    monkeypatch.setattr(sys.modules[__name__], "BODY", BODY[1:])
    with pytest.raises(OSError, match=f"expected {record.read_text()[:8]}"):
        open_url(f"{server}/x")
    record.unlink()
    open_url(f"{server}/x").close()
    assert record.read_text() == hashlib.sha256(BODY).hexdigest() + "\n"


def test_the_right_hash_is_accepted_as_argument_and_as_pin(server):
    digest = hashlib.sha256(BODY).hexdigest()
    with open_url(f"{server}/x", sha256=digest) as file:
        assert file.read() == BODY
    with open_url(f"{server}/y#sha256:{digest.upper()}") as file:
        assert file.read() == BODY
    assert Handler.hits == ["/x", "/y"]


def test_a_pin_is_checked_though_the_address_was_downloaded_without_one(server):
    open_url(f"{server}/x").close()
    for pin in ("0" * 64, "1" * 64):
        with pytest.raises(OSError, match=f"expected {pin[:4]}"):
            open_url(f"{server}/x#sha256:{pin}")
    with open_url(f"{server}/x#sha256:{hashlib.sha256(BODY).hexdigest()}") as file:
        assert file.read() == BODY


@pytest.mark.long
@pytest.mark.parametrize("path, message", [
    ("/missing", "404"), ("/page", "web page"), ("/cut", "1000"),
    ("/x#sha256:" + "0" * 64, "expected 0000"),
])
def test_a_failed_download_leaves_the_cache_as_it_was(server, path, message):
    open_url(f"{server}/good").close()
    before = cached()
    with pytest.raises(OSError, match=message):
        open_url(server + path)
    assert cached() == before


def test_a_dead_server_and_other_schemes_are_one_line(server):
    with pytest.raises(OSError, match="127.0.0.1"):
        open_url("http://127.0.0.1:9/x")
    for url in ("ftp://host/x", "file:///etc/passwd", "gdrive://x"):
        with pytest.raises(OSError, match="only http and https"):
            open_url(url)
    for url in ("http://", "https://.co/x"):  # it would fail again
        with pytest.raises(OSError, match=f"^{url}: not a valid address$"):
            open_url(url)
    assert cached() == []


@pytest.mark.parametrize("error, clause", [
    (requests.ConnectionError(
        "HTTPSConnectionPool(host='h.co', port=443): Max retries exceeded with url: /a (Caused by "
        "NameResolutionError(\"HTTPSConnection(host='h.co', port=443): Failed to resolve 'h.co' "
        "([Errno -2] Name or service not known)\"))"),
     "Failed to resolve 'h.co' ([Errno -2] Name or service not known)"),
    (requests.ConnectionError(
        "HTTPConnectionPool(host='h', port=9): Max retries exceeded with url: /x (Caused by "
        "NewConnectionError('HTTPConnection(host=h): Failed to establish a new connection: "
        "[Errno 111] Connection refused'))"), "[Errno 111] Connection refused"),
    (requests.ConnectTimeout(
        "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /x (Caused by "
        "ConnectTimeoutError(<HTTPSConnection(host='h') at 0x7f>, 'Connection to h timed out. "
        "(connect timeout=30)'))"), "Connection to h timed out. (connect timeout=30)"),
    (requests.ReadTimeout("HTTPSConnectionPool(host='h', port=443): Read timed out. (read "
                          "timeout=30)"), "Read timed out. (read timeout=30)"),
    (requests.ConnectionError(("Connection aborted.", ConnectionResetError(104, "Reset by peer"))),
     "Reset by peer"),
    (requests.ConnectionError("Remote end closed"), "Remote end closed"),
    (requests.ConnectionError(), "ConnectionError")], ids=str)
def test_of_a_failed_request_only_the_last_clause_is_told(error, clause, monkeypatch):
    def get(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(OSError) as caught:
        open_url("https://h.co/a")
    assert str(caught.value) == (f"https://h.co/a: {clause}; try again, or download it by other "
                                 "means and give its path")


def test_one_is_singular_and_all_else_plural():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(1, "class", "classes") == "1 class"
    assert counted(11, "class has", "classes have") == "11 classes have"


def test_a_local_file_is_opened_as_it_is(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with open_url(str(tmp_path / "x")) as file:
        assert file.read() == b"abc"


def test_easydict_keys_are_attributes():
    d = EasyDict(a=1)
    d.b = 2
    del d.a
    assert d == {"b": 2} and d.b == 2
    with pytest.raises(AttributeError):
        _ = d.a


def test_logger_copies_lines_and_leaves_progress_bars_out(tmp_path, capsys):
    with Logger(tmp_path / "log.txt"):
        print("one")
        print("\r 10%|#", end="", file=sys.stderr)
        print("two", file=sys.stderr)
    print("three")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"
    assert capsys.readouterr().out == "one\nthree\n"


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3661, "1h 01m 01s"),
    (90061, "1d 01h 01m")])
def test_durations_are_readable(seconds, text):
    assert format_time(seconds) == text


def test_lists_keep_order_and_ranges():
    assert IntList().convert("5,1-3,2", None, None) == (5, 1, 2, 3)
    assert IntList(unique=False).convert("2,2,2", None, None) == (2, 2, 2)
    for text in ("", "a", "3-1", "1--2", "0-999999999"):
        with pytest.raises(click.BadParameter):
            IntList().convert(text, None, None)


def test_user_errors_are_one_line_from_rank_0(monkeypatch):
    @click.command()
    def main():
        with user_errors(2):
            raise ValueError("bad\n  thing")
    result = CliRunner().invoke(main)
    assert result.exit_code == 2 and result.output == "Error: bad thing\n"
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(main)
    assert result.exit_code == 2 and result.output == ""


def test_other_errors_are_not_hidden():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")
    with pytest.raises(UserError, match="^nowhere: No such file"), user_errors():
        Path("nowhere").read_bytes()


OPENMP = """
import os, sys
from dnnlib import cli
import click

@click.command()
def main():
    assert "torch" not in sys.modules  # which reads them
    print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))

cli.run(main)
"""


@pytest.mark.scripts
@pytest.mark.parametrize("given, expected", [
    ({}, "PASSIVE 1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ({"GOMP_SPINCOUNT": "7"}, "None 7")])
def test_threads_of_scripts_sleep_while_they_wait_unless_the_user_says_otherwise(given, expected):
    others = {key: value for key, value in os.environ.items()
              if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", OPENMP], cwd=ROOT, text=True, capture_output=True,
                          env=others | given)
    assert done.stdout.strip() == expected, done.stderr


ENVIRONMENT = """
import gettext, locale, os, pwd, sys
from dnnlib.cli import cache_dir_option, run, user_errors
from dnnlib.util import cache_dir
import click

@click.command()
@click.option("--outdir", default="")
@click.option("--text", default="")
@click.option("--look", default="")
@cache_dir_option
def main(outdir, text, look):
    with user_errors():
        print(ascii(outdir), text)
        if look == "cache":
            print(cache_dir("x"))
        if look == "compiled":
            import torch
            try:
                from torch._inductor.runtime.cache_dir_utils import cache_dir as chosen
            except ImportError:
                from torch._inductor.codecache import cache_dir as chosen
            print(chosen())

if "BECOME" in os.environ:
    os.setuid(int(os.environ["BECOME"]))
run(main)
"""


def in_environment(*args, without=(), nobody=False, **env):
    """Runs ENVIRONMENT's command, perhaps as a user of whom the system knows nothing."""
    env = {key: value for key, value in (os.environ | env).items() if key not in without}
    if nobody and os.getuid():
        pytest.skip("only root can be another user")
    return subprocess.run([sys.executable, "-c", ENVIRONMENT, *args], cwd=ROOT, capture_output=True,
                          env=env | ({"BECOME": "54321"} if nobody else {}))


@pytest.mark.scripts
def test_a_home_directory_is_written_as_a_tilde_after_an_equals_sign():
    def outdir(text, **more):
        return in_environment(f"--outdir={text}", HOME="/home/me", **more).stdout.decode().strip()
    assert outdir("~/runs") == "'/home/me/runs'" and outdir("~") == "'/home/me'"
    in_two = in_environment("--outdir", "~/runs", HOME="/home/me")
    assert in_two.stdout.strip() == b"'/home/me/runs'"
    assert outdir("~root/x") == repr(os.path.expanduser("~root/x"))
    assert outdir("a~/b") == "'a~/b'" and outdir("~other-folder") == "'~other-folder'"


@pytest.mark.scripts
def test_without_a_home_directory_there_is_one_line_where_one_is_needed():
    done = in_environment("--look=cache", nobody=True, without=["HOME", "PFGMPP_CACHE_DIR"])
    assert done.returncode == 1
    assert done.stderr == (b"Error: this user has no home directory for the cache; set the "
                           b"environment variable PFGMPP_CACHE_DIR to a folder\n")
    done = in_environment("--outdir=~/runs", nobody=True, without=["HOME", "PFGMPP_CACHE_DIR"])
    assert done.returncode == 2 and done.stderr == (
        b"Error: --outdir=~/runs: this user has no home directory; give the full path\n")
    done = in_environment("--outdir=runs", nobody=True, without=["HOME", "PFGMPP_CACHE_DIR"])
    assert done.returncode == 0, "where none is needed"


@pytest.mark.scripts
def test_a_console_that_lacks_a_character_shows_its_number():
    done = in_environment("--text=D = \u221e", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert (done.returncode, done.stdout.strip()) == (0, b"'' D = \\u221e"), done.stderr


@pytest.mark.scripts
@pytest.mark.parametrize("given", [None, pytest.param("/elsewhere", marks=pytest.mark.slow)])
def test_pytorch_keeps_what_it_compiles_in_the_cache_unless_the_user_says_otherwise(given,
                                                                                    tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": given} if given else {}
    done = in_environment("--look=compiled", PFGMPP_CACHE_DIR=str(tmp_path),
                          without=() if given else ["TORCHINDUCTOR_CACHE_DIR"], **env)
    assert done.stdout.decode().split()[-1] == (given or str(tmp_path / "compiled")), done.stderr


@pytest.mark.scripts
def test_pytorch_keeps_what_it_compiles_elsewhere_if_the_cache_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    given = dict(PFGMPP_CACHE_DIR=str(tmp_path / "file"), without=["TORCHINDUCTOR_CACHE_DIR"])
    done = in_environment("--look=compiled", **given)
    assert done.returncode == 0 and str(tmp_path) not in done.stdout.decode(), done.stderr
    done = in_environment("--look=compiled", f"--cache-dir={tmp_path / 'other'}", **given)
    assert done.stdout.decode().split()[-1] == str(tmp_path / "other/compiled"), done.stderr


def test_a_folder_for_compiled_code_that_cannot_be_made_is_given_up(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path))
    for chosen, left in ((str(tmp_path / "compiled"), None), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
        with monkeypatch.context() as patch:
            patch.setattr(os, "makedirs", full)
            cli.check_compiled_dir()
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == left
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    cli.check_compiled_dir()
    assert (tmp_path / "compiled").is_dir()


def test_another_rank_shows_an_error_of_its_own_after_a_while(monkeypatch, capsys):
    @click.command()
    @click.option("--num", type=int)
    def main(num):
        raise cli.UserError("too many", hint="a hint")

    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for args, code, words in ((["--num=x"], 2, "Error: rank 1: Invalid value for '--num'"),
                              (["--num=1"], 1, "Error: rank 1: too many")):
        monkeypatch.setattr(sys, "argv", ["x.py", *args])
        with pytest.raises(SystemExit) as end:
            cli._run_on_other_rank(main)
        assert end.value.code == code and words in capsys.readouterr().err
    assert waited == [cli._RANK0_SEC] * 2


@pytest.mark.parametrize("error, text", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (OSError(28, "No space left on device", "x.pt"), "x.pt: No space left on device"),
    (OSError("of our own"), "of our own"), (ValueError("bad"), "bad")])
def test_errors_are_described_without_their_numbers(error, text):
    assert cli.describe(error) == text


@pytest.mark.parametrize("value, digits, text", [
    (0, 4, "0 "), (61, 3, "61 "), (999.4, 3, "999 "), (999.6, 3, "1 k"), (7808, 3, "7.81 k"),
    (42.79e9, 4, "42.79 G"), (999_960, 4, "1 M"), (5e24, 3, "5e+03 Z")])
def test_numbers_have_a_prefix_and_so_many_digits(value, digits, text):
    assert util.scaled(value, digits) == text


def test_a_log_goes_on_where_an_earlier_process_ended(tmp_path, capsys):
    for line in ("first", "second"):
        with Logger(tmp_path / "log.txt"):
            print(line)
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n" == capsys.readouterr().out


def test_an_interrupted_write_leaves_the_earlier_file_alone(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
