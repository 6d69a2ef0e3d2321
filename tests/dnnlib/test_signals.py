"""Signals: remembered or met at once, their exit codes, who gets them, when a second one ends."""

import signal
import subprocess
import sys

import pytest
from scripts import HANG_SEC, ROOT

HEAD = """
import os, signal, sys, time
from dnnlib import signals
signals.GRACE_SEC = 0.4
signals.install()

def say(text):
    print(text, flush=True)

def send(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.05)
"""


def run(body):
    done = subprocess.run([sys.executable, "-c", HEAD + body], cwd=ROOT, text=True,
                          capture_output=True, timeout=HANG_SEC)
    return done.returncode, done.stdout.split(), done.stderr


@pytest.mark.scripts
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_each_signal_has_its_exit_code(name, code):
    assert run(f"send('{name}'); say('goes on')")[:2] == (code, [])
    assert run(f"""
with signals.deferred():
    send('{name}')
    say(signals.requested())
sys.exit(signals.requested())
""")[:2] == (code, [str(code)])


@pytest.mark.scripts
def test_what_is_immediate_within_deferred_leaves_the_rest_deferred():
    code, said, errors = run("""
with signals.deferred():
    with signals.immediate():
        pass
    send('SIGTERM')
    say('saved')
    try:
        with signals.immediate():
            say('never')
    except signals.Stopped as stopped:
        say(stopped.code)
say('after')
""")
    assert (code, said) == (0, ["saved", "143", "after"]), errors


@pytest.mark.scripts
def test_the_same_stop_may_come_twice_but_a_second_one_ends_at_once():
    code, said, errors = run("""
with signals.deferred():
    send('SIGTERM')
    send('SIGTERM')  # torchrun passes on what the process has had
    say('going-on')
    time.sleep(0.6)
    say('saving')
    send('SIGTERM')
    time.sleep(20)
    say('never')
""")
    assert (code, said) == (143, ["going-on", "saving"]), errors


@pytest.mark.scripts
def test_forked_children_meet_signals_as_any_process_does():
    code, said, errors = run("""
with signals.deferred():
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    say(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
    say(signals.requested())
""")
    assert (code, said) == (0, [str(int(signal.SIGTERM)), "None"]), errors
