"""The machine alone: what it knows, what it refuses and in which words, and where it stops.

What its two users make of it is tested in test_plain_pickle.py and test_safe_pickle.py.
"""

import pickle
import pickletools
import struct

import numpy as np
import pytest

from dnnlib import plain_pickle
from dnnlib.pickle_reader import Budget, Reader, Stateful, reporting_damage

KNOWN = set("NJKMXBC}])(taesuchjqrRb") | set("\x88\x89\x8a\x8c\x85\x86\x87\x93\x94\x95")
NAMES = {("shop", "add"): lambda reader, args: sum(args), ("shop", "Thing"): None}


def reader(body, names=NAMES, limit=10_000):
    return Reader(memoryview(body), names, Budget(limit, f"has more than {limit} instructions"))


def read(*code, **options):
    with reporting_damage():
        return reader(b"\x80\x04" + b"".join(code) + b".", **options).read()


def text(value, code=b"X"):
    raw = value.encode()
    return code + struct.pack("<I", len(raw)) + raw


def test_the_list_of_instructions_is_closed():
    assert {chr(code) for code in Reader.opcodes} == KNOWN


@pytest.mark.parametrize("known", [op for op in pickletools.opcodes
                                   if op.code not in KNOWN | {"."}], ids=lambda op: op.name)
def test_an_instruction_outside_the_list_is_refused_by_name(known):
    named = "asks for 'a.b'" if known.name == "INST" else f"instruction {known.name} "
    with pytest.raises(ValueError, match=named):
        read(known.code.encode("latin-1"), b"a\nb\n" + bytes(20))


def test_a_byte_that_is_no_instruction_is_shown():
    with pytest.raises(ValueError, match=r"unknown \(0xff\)"):
        read(b"\xff")


@pytest.mark.parametrize("code", [b"cos\nsystem\n", text("os") + text("system") + b"\x93"])
def test_a_name_outside_the_table_is_refused_at_once_by_name(code):
    with pytest.raises(ValueError, match=r"^asks for 'os\.system'$"):
        read(code)


def test_a_name_in_the_table_stands_for_its_function_alone():
    assert read(b"cshop\nadd\nK\x01K\x02\x86R") == 3
    assert read(text("shop") + text("add") + b"\x93)R") == 0
    for code in (b"cshop\nThing\n)R", b"])R", b"cshop\nadd\n]R"):
        with pytest.raises(ValueError, match="^calls"):
            read(code)
    with pytest.raises(ValueError, match="asks for 'shop.add.x'"):
        read(text("shop.add") + text("x") + b"\x93")  # not (shop, add.x) either
    with pytest.raises(ValueError, match="not a text"):
        read(b")\x85" * 3, text("x"), b"\x93")


def test_only_what_takes_a_state_gets_one():
    class Thing(Stateful):
        def set_state(self, state):
            self.state = state

    assert read(b"cshop\nmake\n)RK\x07b", names={("shop", "make"): lambda *_: Thing()}).state == 7
    for code in (b"}}b", b"cshop\nThing\n}b", b"]}b"):
        with pytest.raises(ValueError, match="as state to"):
            read(code)


def test_pickles_stand_back_to_back_and_share_the_budget():
    data = b"".join(pickle.dumps(value, 2) for value in ([1], {"a": 2}))
    one = reader(data)
    assert (one.read(), one.read(), one.pos) == ([1], {"a": 2}, len(data))
    budget = Budget(3, "has more than 3 instructions")
    for _ in range(3):
        assert Reader(memoryview(b"\x80\x02N."), {}, budget).read() is None
    with pytest.raises(ValueError, match="more than 3 instructions"):
        Reader(memoryview(b"\x80\x02N."), {}, budget).read()


def test_bytes_are_views_of_the_file():
    data = pickle.dumps(bytes(1000), 4)
    assert np.shares_memory(np.frombuffer(reader(data).read(), np.uint8),
                            np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("fits,too_much,problem", [
    ([b"](" * 500, b"N", b"e" * 500], [b"](" * 501, b"N", b"e" * 501], "nested too deeply"),
    ([b"\x8a\x10", bytes(16)], [b"\x8a\x11", bytes(17)], "integer of 17 bytes"),
    ([b"}J\xff\xff\x0f\x00Ns"], [b"}J\x00\x00\x10\x00Ns"], "has 1048576 as a key"),
    ([b"}", text("a"), b"Ns"], [b"}(", text("a") + b"N", text("a") + b"Nu"], "'a' twice"),
    ([b"Nq\x00q\x01\x94"], [b"Nq\x00q\x00"], "memo entry twice"),
    ([b"Nq\x07h\x07\x86"], [b"h\x07"], "memo entry that does not exist"),
    ([text("\xc3" * (1 << 20))], [text("\u4e00" + "x" * (1 << 20))], "long text"),
    ([text("\u4e00" * 1000)], [b"X\x01\x00\x00\x00\xff"], "not UTF-8"),
    ([b"\x95", struct.pack("<Q", 2), b"N"], [b"\x95", struct.pack("<Q", 9), b"N"], "a frame"),
    ([text("abc")], [text("abc")[:-1]], "cut short"),
    ([b"NNN\x87"], [b"NN\x87"], "stack"),
    ([b"N"], [b"NN"], "ends too early"), ([b"N"], [b"(N"], "ends too early"),
    ([b"N", b"\x85" * 9999], [b"N", b"\x85" * 10_000], "more than 10000 instructions"),
    ([b"]Na"], [b"}Na"], "appends to a dict"), ([b"](NNe"], [b")(NNe"], "appends to a tuple"),
    ([b"}K\x01Ns"], [b"]K\x01Ns"], "sets items of a list"),
    ([b"(t"], [b"t"], "damaged"),
])
def test_a_limit_holds_where_it_stands(fits, too_much, problem):
    read(*fits)
    with pytest.raises(ValueError, match=problem):
        read(*too_much)


@pytest.mark.parametrize("key", [b"N", b"\x88", b"J\xff\xff\xff\xff", b")", b"C\x01a", b"]",
                                 b"cshop\nadd\n"])
def test_keys_are_texts_or_small_numbers(key):
    with pytest.raises(ValueError, match="as a key"):
        read(b"}", key, b"Ns")


@pytest.mark.parametrize("data", [b"", b"\x80", b"N.", b"\x80\x01N.", b"\x80\x06N.", b"\x80\x02N"])
def test_a_pickle_begins_with_its_protocol_and_has_an_end(data):
    with pytest.raises(ValueError):
        reader(data).read()


def test_what_trips_python_is_damage():
    for error in (IndexError, KeyError, RecursionError, MemoryError, struct.error):
        with pytest.raises(ValueError, match="damaged"), reporting_damage():
            raise error


@pytest.mark.parametrize("data,problem", [
    (b"\x80\x02cos\nsystem\n)R.", r"^asks for os\.system$"), (b"\x80\x02])R.", "^calls a list$"),
    (b"\x80\x02N.x", "1 bytes after its end"), (b"N.", "protocol 2 to 5"),
    (b"\x80\x02\x80\x02N.", "PROTO"), (b"\x80\x02}\x88Ns.", "keys"),
    (b"\x80\x02}(U\x01aNU\x01aNu.", "twice"), (b"\x80\x02K\x01U\x01a\x93.", "not a text"),
    (b"\x80\x02" + b"(" * 600 + b"t" * 600 + b".", "nested too deeply"),
])
def test_pickles_of_data_sets_are_held_to_the_limits(data, problem):
    with pytest.raises(ValueError, match=problem):
        plain_pickle.loads(data)


def test_pickles_of_data_sets_have_a_budget(monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_OPCODES", 3)
    assert plain_pickle.loads(b"\x80\x02N\x85\x85.") == ((None,),)
    with pytest.raises(ValueError, match="more than 3 instructions"):
        plain_pickle.loads(b"\x80\x02N\x85\x85\x85.")
