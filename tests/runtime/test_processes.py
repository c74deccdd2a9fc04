"""Processes that are forked from one with an engine: its sessions are refused there in words, and nothing hangs.

Each test is a process of its own, which forks: pytest's has threads that nobody knows of.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from bedplate.bundle.store import Bundle

BEGIN = """
import gc, os, signal, sys, threading, time
from pathlib import Path
from bedplate import Bundle, Engine
from bedplate.errors import RunError

PROMPT = dict(max_tokens=12, temperature=50.0, seed=4)

def in_child(work):
    \"\"\"Run it in a forked process, which ends as Python ends, within 20 s, without an error.\"\"\"
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        work()
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"status {status}"

def refused(call):
    try:
        call()
    except RunError as error:
        assert "was forked" in str(error) and "hint: make a new engine in the child" in str(error), error
    else:
        raise AssertionError(f"{call} is not refused")

bundle = Bundle.open(sys.argv[1])
engine = Engine(bundle, threads=3)
session = engine.session("all")
text = session.generate("the quick", **PROMPT)
"""


def run(script: str, bundle: Bundle, *words: str) -> str:
    # Python 3.12 warns of every fork of a process with threads.
    python = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
    command = [*python, "-c", BEGIN + script, str(bundle.path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


USES = """
pieces = engine.session("all2").generate("pack my box", stream=True, **PROMPT)
next(pieces)
events = engine.session().events("pack my box", **PROMPT)
fixed = engine.fixed("all")
of_fixed = fixed.session()
rest = engine.session().generate("the", stream=True, **PROMPT)
next(rest)
locked, may = threading.Event(), threading.Event()

def hold():
    with fixed._lock, engine._lock:  # as a thread does that loads
        locked.set()
        may.wait()

holds = threading.Thread(target=hold)
holds.start()
locked.wait()

def uses():
    for call in (
        lambda: session.generate("the quick", **PROMPT),
        lambda: session.generate([5, 6], stream=True, **PROMPT),
        lambda: session.events("the quick", **PROMPT),
        lambda: session.step([1]),
        lambda: session.logits([1, 2]),
        lambda: session.use(None),
        lambda: session.use("all2", scale=0.5),
        lambda: session.save("file"),
        session.fork,
        session.reset,
        lambda: list(pieces),
        lambda: list(events),
        lambda: engine.step([(session, [1])]),
        lambda: engine.session().step([1]),
        lambda: engine.load("all2"),
        lambda: engine.load_session("file"),
        lambda: engine.unload("all"),
        lambda: of_fixed.generate("the quick", **PROMPT),
        fixed.session,
        engine.memory,
    ):
        refused(call)
    session.cancel()
    engine.close()

in_child(uses)
may.set()
holds.join()
assert of_fixed.generate("the quick", **PROMPT) == text
in_child(lambda: None)
assert session.generate("the quick", **PROMPT) == text
assert list(pieces) and list(events) and list(rest)
"""


def test_uses_of_the_engine_are_refused_and_the_parent_goes_on(toy_bundle: Bundle) -> None:
    run(USES, toy_bundle)


ANOTHER = """
def another():
    files = len(os.listdir("/proc/self/fd"))
    with Engine(bundle, threads=2) as own:
        assert own.session("all").generate("the quick", **PROMPT) == text
        in_child(lambda: refused(lambda: own.session().step([1])))  # a process that was forked from this one
    own = Engine(bundle)
    assert own.session("all").generate("the quick", **PROMPT) == text
    assert len(os.listdir("/proc/self/fd")) == files

def forget():
    global engine, session
    del engine, session
    gc.collect()
    another()

in_child(lambda: (refused(lambda: session.step([1])), another()))
in_child(forget)
with engine:
    in_child(lambda: engine.__exit__(None, None, None))
    assert session.generate("the quick", **PROMPT) == text
"""


TEMPLATES = """
guarded = Engine(bundle, guard_templates=True)
messages = [{"role": "user", "content": "the fox"}]
rendered = guarded.tokenizer.render(messages)
in_child(lambda: refused(lambda: guarded.tokenizer.render(messages)))
assert guarded.tokenizer.render(messages) == rendered == engine.tokenizer.render(messages)
guarded.close()
"""


def test_templates_are_not_rendered_for_two_processes(toy_bundle: Bundle) -> None:
    """They would read each other's answers from one pipe."""
    run(TEMPLATES, toy_bundle)


def test_an_engine_of_its_own_works(toy_bundle: Bundle) -> None:
    run(ANOTHER, toy_bundle)


BUSY = """
ended = threading.Event()

def busy(number):
    own = engine.session("all")
    while not ended.is_set():
        own.generate([number, 5, 6, 7], **PROMPT)
        engine.unload("all")
        if number == 1:
            engine.unload()
        engine.memory()

threads = [threading.Thread(target=busy, args=[number]) for number in range(1, 4)]
for thread in threads:
    thread.start()

def child():
    refused(lambda: session.step([1]))
    refused(engine.memory)
    with Engine(bundle, threads=2) as own:
        assert own.session("all").generate("the quick", **PROMPT) == text
    gc.collect()

for number in range(25):
    time.sleep(0.001 * number)  # at any moment of what the threads do
    in_child(child)
ended.set()
for thread in threads:
    thread.join()
assert session.generate("the quick", **PROMPT) == text
"""


def test_while_other_threads_load_and_compute(toy_bundle: Bundle) -> None:
    run(BUSY, toy_bundle)


WORKERS = """
import multiprocessing

def work(prompt):
    signal.alarm(20)
    refused(lambda: session.generate(prompt, **PROMPT))
    global own
    if "own" not in globals():
        own = Engine(bundle, threads=2)
    return own.session("all").generate(prompt, **PROMPT)

prompts = ["the quick", "pack my box", "jugs", "five dozen"]
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(work, prompts) == [engine.session("all").generate(prompt, **PROMPT) for prompt in prompts])
"""


def test_workers_of_multiprocessing(toy_bundle: Bundle) -> None:
    assert run(WORKERS, toy_bundle) == "True\n"


INTERRUPTED = """
import random
engine.close()
engine = Engine(bundle, threads=2, kv="float32")
prompt, settings = list(range(20, 90)), dict(max_tokens=150, temperature=50.0, seed=4, ignore_eos=True)
expected = engine.session("all").generate(prompt, **settings)
session, drawn, interrupted = engine.session("all"), random.Random(int(sys.argv[2])), 0

def interrupt(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)

for number in range(30):
    # The handler runs in this thread, at any of its bytecodes.
    thread = threading.Thread(target=interrupt, args=[drawn.uniform(0, 0.06)])
    text = ""
    try:
        thread.start()
        begin = time.perf_counter()
        for piece in session.generate(prompt, stream=True, **settings):
            text += piece
        thread.join()
    except KeyboardInterrupt:
        interrupted += 1
    assert expected.startswith(text), (number, text)
    thread.join()
    assert session.generate(prompt, **settings) == expected, number
    # Nothing is locked: another thread can use it.
    other = threading.Thread(target=lambda: session.fork().step([1]))
    other.start()
    other.join(10)
    assert not other.is_alive()
print(interrupted > 10)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_a_session_that_was_interrupted_goes_on(toy_bundle: Bundle, seed: int) -> None:
    assert run(INTERRUPTED, toy_bundle, str(seed)) == "True\n"
