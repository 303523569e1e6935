"""Keys are kept as hashes in a file of one's own, tickets end by themselves."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from attending.errors import UsageError
from attending.gateway.keys import Keys, Tickets, config_folder


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_has_256_random_bits_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "own")
    first, second = keys.add("first"), keys.add("second")
    assert first.startswith("atd-")
    assert len(first) == 4 + 43
    assert first != second
    file = tmp_path / "own/keys.json"
    assert first not in file.read_text()
    kept = json.loads(file.read_text())["keys"]
    assert [one["name"] for one in kept] == ["first", "second"]
    assert kept[0]["sha256"] == hashlib.sha256(first.encode()).hexdigest()
    assert rights(file) == 0o600
    assert rights(file.parent) == 0o700
    assert os.listdir(file.parent) == ["keys.json"]  # noqa: PTH208


def test_a_key_is_known_until_it_is_revoked_also_by_another_process(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    key, other = keys.add("ward"), keys.add("lab")
    holder = keys.holder(key)
    assert holder is not None
    assert keys.holder(key + "x") is keys.holder("") is keys.holder("\udce9") is None
    Keys(tmp_path).revoke("ward")
    assert keys.holder(key) is None
    assert not keys.holds(holder)
    assert keys.holder(other) is not None
    assert [record.name for record in Keys(tmp_path)] == ["lab"]


def test_names_must_be_new_and_known(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    keys.add("ward")
    with pytest.raises(UsageError, match="'ward' exists"):
        keys.add("ward")
    with pytest.raises(UsageError, match="Did you mean 'ward'"):
        keys.revoke("warb")
    for name in ("", " ", "a\nb", "x" * 101):
        with pytest.raises(UsageError, match="cannot name"):
            keys.add(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": [{"name": "x"}]}', '{"keys": 1}', "\0"])
def test_a_damaged_file_is_an_error_and_stays_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UsageError, match="damaged"):
        Keys(tmp_path)
    assert file.read_text() == text


def test_a_file_that_is_damaged_while_the_server_runs_lets_nobody_in(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    key = keys.add("ward")
    (tmp_path / "keys.json").write_text("{")
    assert keys.holder(key) is None
    with pytest.raises(UsageError, match="damaged"):
        keys.add("lab")


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    Keys(tmp_path).add("ward")
    (tmp_path / "keys.json").chmod(0o666)
    with pytest.raises(UsageError, match="chmod 600"):
        Keys(tmp_path)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ATTENDING_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert config_folder() == tmp_path / ".config/attending"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "x"))
    assert config_folder() == tmp_path / "x/attending"
    monkeypatch.setenv("ATTENDING_CONFIG", str(tmp_path / "y"))
    assert config_folder() == tmp_path / "y"


def test_a_ticket_is_good_once_or_until_it_ends_and_the_oldest_make_room() -> None:
    now = [0.0]
    tickets = Tickets(10, 3, lambda: now[0])
    one = tickets.issue("key")
    assert tickets.holder(one) == "key"
    assert tickets.end(one)
    assert not tickets.end(one)
    assert tickets.holder(one) is None
    late = tickets.issue()
    now[0] = 9.9
    assert tickets.holder(late) == ""
    now[0] = 10
    assert tickets.holder(late) is None
    assert not tickets.end(late)
    several = [tickets.issue() for _ in range(4)]
    assert [tickets.holder(ticket) for ticket in several] == [None, "", "", ""]
