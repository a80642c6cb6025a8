"""The filters of system calls, each instruction of them carried out here."""

from __future__ import annotations

import platform
import struct

import pytest

from nox_runner import seccomp
from nox_runner.zygote import kernel

_FILTER = struct.Struct("=HBBI")
_DATA = struct.Struct("=iIQ6Q")
"""struct seccomp_data: call, processor, address, arguments."""
_PROCESSORS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FLAGS = [0, 1, 0x11, *(1 << bit for bit in range(32)), 0x7E020000, 0xFFFFFFFF, (1 << 64) - 1]
_MARKED = kernel.MARK | 7
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000


def answer(program: bytes, call: int, *arguments: int, processor: int = 0) -> int:
    """What a filter says of a call."""
    text = _DATA.pack(call, processor or _processor(), 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    steps = list(_FILTER.iter_unpack(program))
    value, at = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:  # load a word
            (value,) = struct.unpack_from("=I", text, k)
        elif code == 0x54:
            value &= k
        elif code == 0x05:
            at += k
        elif code in (0x15, 0x25, 0x35, 0x45):
            found = {0x15: value == k, 0x25: value > k, 0x35: value >= k, 0x45: value & k}[code]
            at += yes if found else no
        else:
            assert code == 0x06, hex(code)
            return int(k)


def strictest(*answers: int) -> int:
    """Which one counts, as the kernel has it: they are ordered as signed numbers."""
    return min(answers, key=lambda each: each - (1 << 32) if each & 1 << 31 else each)


def _processor() -> int:
    machine = platform.machine()
    if machine not in _PROCESSORS:
        pytest.skip(f"no numbers for the processor {machine}")
    return _PROCESSORS[machine]


@pytest.fixture(scope="module")
def calls() -> list[tuple[int, ...]]:
    """Every call, with first arguments that mean something to one that has conditions."""
    return [(call, *rest) for call in range(520) for rest in [(f,) for f in _FLAGS]] + [
        (call, first, second, third)
        for call in range(520)
        for first in (0, 1, 2, 10, 16, 17)
        for second, third in ((0, 0), (1, 0), (0, 1), (3, 9))
    ]


def test_both_filters_of_a_run_are_the_whole_one(calls: list[tuple[int, ...]]) -> None:
    whole, zygote = seccomp.program(), seccomp.zygote_program()
    quiet, telling = (seccomp.rest_program(telling=told) for told in (False, True))
    more = set()
    for call in calls:
        expected, base = answer(whole, *call), answer(zygote, *call)
        assert strictest(base, answer(quiet, *call)) == expected, call
        assert strictest(base, answer(telling, *call)) == expected, call
        if base != expected:
            assert base == _ALLOW
            more.add(call[0])
    # What the zygote may do beyond: clone, unshare, mount, setns.
    assert len(more) == 4, more


def test_no_process_makes_itself_invisible() -> None:
    number = {"x86_64": 157, "aarch64": 167}[platform.machine()]
    for program in (seccomp.program(), seccomp.zygote_program()):
        for option in (4, 4 | 1 << 32, 4 | 1 << 63):
            assert answer(program, number, option, 0) != _ALLOW, hex(option)
            assert answer(program, number, option, 1) == _ALLOW, hex(option)
        for option in (0, 5, 6, 15, 22, 24, 36, 38, 1 << 2 | 1 << 3, 0xFFFFFFFF):
            assert answer(program, number, option, 0) == _ALLOW, hex(option)


def test_only_a_marked_exit_is_told_of(calls: list[tuple[int, ...]]) -> None:
    telling = seccomp.rest_program(telling=True)
    exit_group = kernel._EXIT_GROUP.value
    assert answer(telling, exit_group, _MARKED) == _NOTIFY
    assert all(answer(telling, *call) != _NOTIFY for call in calls)
    for other in (7, _MARKED + (1 << 32), _MARKED & ~(1 << 32), _MARKED << 1):
        assert answer(telling, exit_group, other) == _ALLOW, hex(other)


def test_another_processors_calls_end_the_process() -> None:
    quiet, telling = (seccomp.rest_program(telling=told) for told in (False, True))
    for program in (seccomp.program(), seccomp.zygote_program(), quiet, telling):
        assert answer(program, 1, processor=0x40000003) in (0, 1 << 31)
        # The third interface of x86-64: the same processor, numbers from 2^30 on.
        assert answer(seccomp.program(), 1 | 1 << 30) in (0, 1 << 31)
