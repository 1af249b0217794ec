"""Settings, keys and limits of the service."""

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.serving.admission import Admission
from flashdmd_ray.serving.api_keys import HIDES_CLIENTS, VARIABLE, ApiKeys, is_loopback, read_keys
from flashdmd_ray.serving.command import check_address, name_source, settings_tree
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.rate_limit import RateLimit
from flashdmd_ray.serving.settings import parse_settings

KEY = "a-key-that-is-long-enough"
MODELS = {"demo": "runs/demo"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replica": {"batches": 4}}, "replica.batches: unknown key, did you mean 'batch'?"),
        ({"modles": {}}, "modles: unknown key, did you mean 'models'?"),
        ({"models": {}}, "models: "),
        ({"models": {"a/b": "x"}}, "'a/b' must be"),
        ({"models": {"a:teacher": "x"}}, "'a:teacher' must be"),
        ({"default": "dem"}, "default: no model 'dem', did you mean 'demo'?"),
        ({"aliases": {"x": "nope"}}, "aliases.x: no model 'nope'"),
        ({"aliases": {"demo": "demo"}}, "aliases.demo: is a model's own name"),
        ({"prompt_filter": "os.path.join"}, "must be module:function"),
        ({"replica": {"count": 4, "most": 2}}, "replica.most: 2 is less than"),
        ({"limits": {"images": 11}}, "limits.images"),
        ({"queue": 0}, "queue"),
        ({"cors_origins": ["https://a.example/page"]}, "'https://a.example/page' must be an origin"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(changes, said):
    with pytest.raises(ValueError, match=r".+") as refused:
        parse_settings({"models": MODELS} | changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_models_are_called_after_their_folders(tmp_path):
    assert name_source("runs/demo/export")[0] == name_source("runs/demo")[0] == "demo"
    assert name_source("a=x/b") == ("a", "x/b")
    assert name_source("models:/student@champion") == ("student", "models:/student@champion")
    assert settings_tree(["a=x"], ["replica.count=2"]) == {"models": {"a": "x"}, "replica": {"count": 2}}
    with pytest.raises(ValueError, match="two models are called 'demo'"):
        settings_tree(["runs/demo", "other/demo/export"], [])


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"\ufeff# ours\n{KEY}-file\n\n")
    assert read_keys(file, {VARIABLE: f"{KEY}-1, {KEY}-2"}) == (f"{KEY}-1", f"{KEY}-2", f"{KEY}-file")
    assert read_keys(None, {}) == ()
    for text, said in (("short\n", "at least 16"), ("# nothing\n", "has no key")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_keys(file, {})
    with pytest.raises(ValueError, match="cannot read"):
        read_keys(tmp_path / "absent", {})


def test_without_keys_only_loopback_addresses_are_listened_on(monkeypatch):
    settings = parse_settings({"models": MODELS})
    monkeypatch.delenv(VARIABLE, raising=False)
    check_address("127.0.0.1", settings)
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0"):
        check_address("0.0.0.0", settings)
    monkeypatch.setenv(VARIABLE, KEY)
    check_address("0.0.0.0", settings)


def test_any_origin_needs_keys(monkeypatch):
    settings = parse_settings({"models": MODELS, "cors_origins": ["*"]})
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match="cors_origins: without API keys"):
        check_address("127.0.0.1", settings)
    monkeypatch.setenv(VARIABLE, KEY)
    check_address("127.0.0.1", settings)


def test_where_addresses_are_hidden_there_must_be_keys():
    for value in ("", "0"):
        assert read_keys(None, {HIDES_CLIENTS: value}) == ()
    with pytest.raises(ValueError, match=f"{HIDES_CLIENTS}: .* set {VARIABLE} or keys_file, or unset"):
        read_keys(None, {HIDES_CLIENTS: "1"})
    assert read_keys(None, {HIDES_CLIENTS: "1", VARIABLE: KEY}) == (KEY,)


def test_addresses_of_this_machine():
    assert [is_loopback(address) for address in ("127.0.0.1", "127.8.9.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(address) for address in ("192.0.2.1", "0.0.0.0", "::", "evil.example", None, "")] == [False] * 6


def test_a_key_has_a_name_that_does_not_give_it_away():
    api_keys = ApiKeys([KEY, KEY + "2"])
    names = {api_keys.identify({"authorization": f"Bearer {key}"}, None) for key in (KEY, KEY + "2")}
    assert len(names) == 2
    assert not any(KEY[:8] in name for name in names)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 10)), max_size=60))
def test_a_key_never_gets_more_than_its_rate_and_burst(asked):
    """Over any time: at most burst + rate * time images, and one request may overdraw a full bucket. Retry-After is long enough."""
    now, admitted = 0.0, 0
    limit = RateLimit(per_minute=60, burst=5, clock=lambda: now)
    for pause, images in asked:
        now += pause
        try:
            limit.take("a", images)
        except ApiError as error:
            now += int(error.headers["Retry-After"])
            limit.take("a", images)
        admitted += images
        assert admitted <= 5 + now + 10


def test_keys_do_not_share_their_rate():
    limit = RateLimit(per_minute=1, burst=1, clock=lambda: 0.0)
    limit.take("a", 1)
    with pytest.raises(ApiError) as refused:
        limit.take("a", 1)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "60")
    limit.take("b", 1)


def fill(admission, ends, client, count, teacher=False):
    """How many of `count` requests are admitted."""
    admitted = 0
    for _ in range(count):
        with contextlib.suppress(ApiError):
            ends.enter_context(admission.place(client, teacher))
            admitted += 1
    return admitted


def test_one_client_fills_the_queue_only_while_it_is_alone():
    now = 0.0
    admission = Admission(12, teacher_share=0.25, clock=lambda: now)
    with contextlib.ExitStack() as ends:
        assert fill(admission, ends, "a", 20) == 12
        assert fill(admission, ends, "b", 1) == 0
    with contextlib.ExitStack() as ends:
        assert fill(admission, ends, "a", 20) == 6, "b has asked"
        assert fill(admission, ends, "b", 20) == 6
    now = 31.0
    with contextlib.ExitStack() as ends:
        assert fill(admission, ends, "a", 20) == 12
        assert fill(admission, ends, "b", 1) == 0
    assert admission.inside == 0


def test_teachers_have_a_share_of_the_queue():
    admission = Admission(12, teacher_share=0.25)
    with contextlib.ExitStack() as ends:
        assert fill(admission, ends, "a", 20, teacher=True) == 3
        assert fill(admission, ends, "a", 20) == 9
    assert fill(Admission(1, teacher_share=0.01), contextlib.ExitStack(), "a", 2, teacher=True) == 1


def test_help_and_wrong_options_need_no_torch():
    program = (
        "import sys; from flashdmd_ray.serving.command import serve_command\n"
        "code = serve_command(['runs/absent', '--host', '0.0.0.0'])\n"
        "print(code, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "--host 0.0.0.0" in done.stderr
