"""API keys: the file, when they are required, and the commands."""

import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.errors import CommandError, SettingError
from deploy.keys import create_key, key_file_of, read_keys, revoke_key
from deploy.settings import UpSettings
from gateway.protocol import KEY_PATTERN


def settings(state_dir, **options):
    return UpSettings(state_dir=state_dir, cache_dir=state_dir, **options)


def test_a_key_is_kept_as_a_hash_that_it_alone_matches(tmp_path):
    path = tmp_path / "sub" / "keys.json"
    key = create_key(path, "team-a", 5.0, tokens_per_minute=100)
    match = KEY_PATTERN.fullmatch(key)
    assert match
    (record,) = read_keys(path).keys
    assert (record.id, record.name, record.tokens_per_minute, record.created_s) == (match[1], "team-a", 100, 5.0)
    assert record.matches(match[2])
    assert not record.matches(match[2][:-1] + "!")
    assert match[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_revoke_by_id_or_by_a_name_of_its_own(tmp_path):
    path = tmp_path / "keys.json"
    for name in ("a", "b", "b"):
        create_key(path, name, 0.0)
    assert revoke_key(path, "a").name == "a"
    with pytest.raises(CommandError, match="2 keys 'b'"):
        revoke_key(path, "b")
    revoke_key(path, read_keys(path).keys[0].id)
    assert [key.name for key in read_keys(path).keys] == ["b"]
    with pytest.raises(CommandError, match="no key 'a'"):
        revoke_key(path, "a")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"keys": [{"id": "aaaaaaaa", "salt": "zz", "sha256": "' + 64 * "0" + '"}]}',
        '{"keys": [{"id": "aaaaaaaa", "salt": "00", "sha256": "\u00e9"}]}',
    ],
)
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(CommandError, match=r"keys\.json is not a file of API keys"):
        read_keys(path)


@pytest.mark.parametrize("name", ["", " ", "a\x1b[31m"])
def test_a_name_can_be_read(tmp_path, name):
    with pytest.raises(CommandError, match="printable"):
        create_key(tmp_path / "keys.json", name, 0.0)


def test_keys_that_are_made_at_once_are_all_kept(tmp_path):
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: create_key(path, f"k{number}", 0.0), range(40)))
    assert sorted(f"sk-{key.id}" for key in read_keys(path).keys) == sorted(key[:11] for key in made)
    with pytest.raises(CommandError, match="no-such-directory"):
        revoke_key(tmp_path / "no-such-directory" / "k.json", "a")
    assert not (tmp_path / "no-such-directory").exists()


def test_keys_are_required_where_others_can_reach_the_gateway(tmp_path):
    assert key_file_of(settings(tmp_path)) is None
    with pytest.raises(SettingError, match=r"--host '0\.0\.0\.0'.*spotserve keys create NAME.*--no-auth"):
        key_file_of(settings(tmp_path, host="0.0.0.0"))
    assert key_file_of(settings(tmp_path, host="0.0.0.0", no_auth=True)) is None
    create_key(tmp_path / "api-keys.json", "a", 0.0)
    assert key_file_of(settings(tmp_path, host="0.0.0.0")) == tmp_path / "api-keys.json"
    assert key_file_of(settings(tmp_path)) == tmp_path / "api-keys.json"
    with pytest.raises(SettingError, match=r"--api-keys .*does not exist"):
        key_file_of(settings(tmp_path, api_keys=Path("missing")))
    with pytest.raises(SettingError, match="--no-auth"):
        settings(tmp_path, no_auth=True, api_keys=Path("keys"))


def test_commands(tmp_path):
    def spotserve(*arguments):
        command = [sys.executable, "-m", "deploy", "keys", *arguments, "--file", str(tmp_path / "k.json")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    created = spotserve("create", "team-a", "--budget-tokens", "5000", "--model", "m")
    assert created.returncode == 0, created.stderr
    assert KEY_PATTERN.fullmatch(created.stdout.strip())
    assert "not shown again" in created.stderr
    (record,) = json.loads((tmp_path / "k.json").read_text())["keys"]
    assert (record["budget_tokens"], record["models"]) == (5000, ["m"])
    assert record["id"] in spotserve("list").stdout
    assert spotserve("revoke", "team-a").returncode == 0
    assert spotserve("revoke", "team-a").returncode == 2
