"""docs/troubleshooting*.md against nox-debug's tables; tests/troubleshooting.py tries the same on a host."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_nox_debug import FRENCH, debug

from tests.troubleshooting import NOT_SHOWN, PAGES, SYMPTOMS, Entry, kinds, read_page, rounds

TABLES = {
    "troubleshooting.md": debug.ENGLISH,
    "troubleshooting.fr.md": debug.translate(debug.read_texts(FRENCH.read_text())),
}
FINDINGS = {
    f"{check}/{name}"
    for check, topic in debug.ENGLISH.items()
    for name, text in topic.outcomes.items()
    if text.state in ("warn", "fail") and not check.startswith("problem.")
}


def test_both_pages_show_the_same_with_the_same_commands() -> None:
    english, french = (read_page(name) for name in PAGES.values())
    assert len(english) > 80
    assert [(entry.id, entry.do) for entry in english] == [(entry.id, entry.do) for entry in french]


def test_every_finding_is_shown_and_tried_or_named_with_the_reason() -> None:
    shown = {entry.id for entry in read_page("troubleshooting.md")}
    assert shown == set(SYMPTOMS)
    excused = {name for name in FINDINGS if name in NOT_SHOWN or f"{name.partition('/')[0]}/*" in NOT_SHOWN}
    assert shown | excused == FINDINGS
    assert not shown & excused


def as_pattern(text: str) -> str:
    return ".*".join(map(re.escape, re.split(r"{\w+}", text)))


@pytest.mark.parametrize("page", TABLES)
def test_pages_quote_what_the_tables_say(page: str) -> None:
    table: dict[str, Any] = TABLES[page]
    for entry in read_page(page):
        check, _, name = entry.id.partition("/")
        text = table[check].outcomes[name]
        finding = table["report.finding"].title.format(title=table[check].title, detail=text.detail)
        lines = [f"{table[f'state.{text.state}'].title} *{as_pattern(finding)}"]
        lines += [f" +{as_pattern(table['report.cause'].title.format(text=text.cause))}"]
        lines += [f" +{as_pattern(table['report.help'].title.format(text=text.help))}"]
        assert len(lines) == len(entry.says)
        for pattern, said in zip(lines, entry.says, strict=True):
            assert re.fullmatch(pattern, said), entry.id
        problem = next((one for one, members in debug.PROBLEMS.items() if check in members), "report.other")
        assert entry.heading == table[problem].title, entry.id


def test_what_one_repair_mends_is_of_different_kinds() -> None:
    entries = read_page("troubleshooting.md")
    found = rounds(entries)
    assert sorted(entry.id for group in found for entry in group) == sorted(entry.id for entry in entries)
    for group in found:
        assert sum(len(kinds(entry)) for entry in group) == len(set[str]().union(*map(kinds, group)))
        assert len(group) == 1 or all(entry.mended_by_repair for entry in group)
    assert max(map(len, found)) > 1


def test_the_command_that_nox_debug_names_is_the_default_advice() -> None:
    entries = {entry.id: entry for entry in read_page("troubleshooting.fr.md")}
    assert entries["config.mode/wide"] == Entry(
        "config.mode/wide",
        "Autres constats",
        entries["config.mode/wide"].says,
        ("sudo chmod 0600 /etc/default/nox-api",),
    )
