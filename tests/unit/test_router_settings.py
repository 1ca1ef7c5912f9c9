"""Settings that cannot be right are refused with both sides told."""

import pytest
from pydantic import ValidationError

from flagscale.errors import ConfigError, UserError
from flagscale.serve.router.__main__ import load_router, main
from flagscale.serve.router.replica import Replica
from flagscale.serve.router.settings import RouterSettings, is_loopback


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "host: 0.0.0.0 is reached from other machines, so `api_keys` needs at least one key"),
        ({"host": "h1.example"}, "reached from other machines"),
        ({"api_keys": ["a", " "]}, "an empty key would let everybody in"),
        ({"breaker_open_s": 5, "breaker_open_max_s": 2}, "breaker_open_max_s: 2.0 is less than breaker_open_s: 5.0"),
        ({"polcy": "session"}, "Extra inputs are not permitted"),
        ({"policy": "fastest"}, "'round_robin', 'least_load'"),
        ({"load_bound": 1}, "greater than 1"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match="validation error") as caught:
        RouterSettings.model_validate(given)
    assert message in str(caught.value)


def test_beyond_loopback_with_a_key() -> None:
    chosen = RouterSettings.model_validate({"host": "0.0.0.0", "api_keys": ["secret"]})
    assert "secret" not in repr(chosen)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


def test_every_field_is_described() -> None:
    for name, field in RouterSettings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("url", ["h1:8000", "ftp://h1", "http://", "http://h1/?a=b", ""])
def test_a_replica_wants_an_address(url: str) -> None:
    with pytest.raises(UserError, match=r"replica r0: url .* expected http://host:port"):
        Replica("r0", url, "m")


def test_a_replica_wants_weight() -> None:
    with pytest.raises(UserError, match="weight 0; expected more than 0"):
        Replica("r0", "http://h1:1", "m", weight=0)


def test_the_address_of_a_path() -> None:
    assert Replica("r0", "http://h1:1/engine/", "m").url_of("/v1/models") == "http://h1:1/engine/v1/models"


def test_a_file_makes_a_pool() -> None:
    text = '{"settings": {"policy": "session"}, "replicas": [{"id": "r0", "url": "http://h1:1", "model": "m"}]}'
    pool, chosen = load_router(text, "router.json")
    assert chosen.policy == "session"
    assert [(state.id, state.phase) for state in pool.states()] == [("r0", "starting")]


def test_all_faults_of_a_file_at_once_and_no_secret() -> None:
    text = '{"settings": {"port": "x", "hots": 1}, "replicas": [{"id": "r0", "url": "u", "api_key": ["hush"]}]}'
    with pytest.raises(ConfigError) as caught:
        load_router(text, "router.json")
    told = str(caught.value)
    assert "4 faults" in told
    assert "router.json: settings.port" in told
    assert "settings.hots" in told
    assert "replicas.0.model" in told
    assert "hush" not in told


def test_the_same_id_twice() -> None:
    entry = '{"id": "r0", "url": "http://h1:1", "model": "m"}'
    with pytest.raises(UserError, match="replica r0 is there already"):
        load_router(f'{{"replicas": [{entry}, {entry}]}}', "-")


@pytest.mark.parametrize("words", [[], ["--help"], ["/does/not/exist"]])
def test_what_was_typed_wrongly_has_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
