"""Configuration text: nothing is dropped, cut or read as something else than it says."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from flashdmd_ray.commands import prepare_data
from flashdmd_ray.commands.evaluate import evaluate_command
from flashdmd_ray.commands.export import export_command
from flashdmd_ray.commands.scale import scale_command
from flashdmd_ray.config import Config, ModelConfig, apply_override, load_as, load_config
from flashdmd_ray.config.annotations import is_text
from flashdmd_ray.config.yaml_text import read_tree
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.serving.command import name_source
from flashdmd_ray.serving.settings import ServeSettings, parse_settings
from flashdmd_ray.training.cli import main


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("steps: 10\nseed: 1\nsteps: 20\n", "steps", (1, 3)),
        ("rewards:\n- kind: pickscore\n  weight: 1\n  weight: 2\n", "rewards.0.weight", (3, 4)),
        ("placement:\n  pools:\n    reward: {cpus: 1, cpus: 2}\n", "placement.pools.reward.cpus", (3, 3)),
        (
            "rewards: [{kind: custom, path: 'a:B', options: {deep: {x: 1,\n x: 2}}}]\n",
            "rewards.0.options.deep.x",
            (1, 2),
        ),
        ("data: {source: demo}\n'data': {scenes: 4}\n", "data", (1, 2)),
    ],
)
@pytest.mark.parametrize("section", [Config, RewardTrainingConfig])
def test_a_key_given_twice_is_refused_with_both_lines(tmp_path, section, text, key, lines):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"c.yaml: {key}: given twice, in line {lines[0]} and in line {lines[1]}"):
        load_as(section, tmp_path / "c.yaml")


def test_merged_keys_are_no_duplicates(tmp_path):
    text = "generator: &g {lr: 0.001, warmup: 3}\nadversarial:\n  optimizer:\n    <<: *g\n    warmup: 5\n"
    config = load(tmp_path, text)
    assert (config.adversarial.optimizer.lr, config.adversarial.optimizer.warmup) == (0.001, 5)


@pytest.mark.parametrize("name", ["20261129", "2026-11-29", "007", "on", "1e5", "1:30", "1.5", "null_", "true"])
def test_a_name_is_what_is_written(tmp_path, name):
    assert load(tmp_path, f"run: {{name: {name}}}").run.name == name
    assert load_config(None, [f"run.name={name}"]).run.name == name
    tree = {"models": {}}
    apply_override(ServeSettings, tree, f"models.x={name}")
    assert list(parse_settings(tree).models.values()) == [name]


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20))
def test_a_text_setting_on_the_command_line_is_never_cut(text):
    tree = {}
    written = text.strip()
    assume(not written.startswith(("'", '"')))  # YAML's quotes, which must end
    apply_override(Config, tree, f"tracking.experiment={text}")
    assert tree["tracking"]["experiment"] == written


@given(value=st.one_of(st.integers(), st.booleans(), st.lists(st.integers(0, 9))), comment=st.text("ab ", max_size=4))
def test_another_value_is_read_whole_or_refused(value, comment):
    tree = {}
    with pytest.raises(ValueError, match="would end before '#"):
        apply_override(Config, tree, f"steps={value} #{comment}")
    assert tree == {}


def test_quotes_and_null_are_understood():
    config = load_config(
        None, ["run.name='a b'", "data.prompts=null", "data.caption=", 'model.vae="x #1"', "data.cache=~"]
    )
    assert (config.run.name, config.data.prompts, config.data.caption, config.model.vae) == ("a b", None, None, "x #1")
    assert config.data.cache is None
    assert load_config(None, ["run.name=none", "tracking.uri_env='None'"]).tracking.uri_env == "None"


def test_an_item_of_a_list_is_set_by_its_number(tmp_path):
    assert [reward.weight for reward in load_config(None, ["rewards.1.weight=2"]).rewards] == [1, 2]
    config = load(tmp_path, "rewards: [{kind: custom, path: 'a:B'}]", "rewards.0.options.eps=1e-5", "rewards.0.pool=7")
    assert config.rewards[0].options == {"eps": 1e-5}
    assert config.rewards[0].pool == "7"
    assert load_config(None, ["sampling.timesteps.3=200"]).sampling.timesteps == (999, 749, 499, 200)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards.2.weight", "2", "'rewards' has the items 0 to 1, no 2; set 'rewards' as a whole"),
        ("rewards.weight", "2", "'rewards' is a list; name one of its items by number, such as rewards.0"),
        ("steps", "1e3", "steps: input should be a valid integer, got 1000.0; write 1000"),
        ("steps", "010", "YAML reads 010 as 8; write 8"),
        ("steps", "1:30", "YAML reads 1:30 as 90"),
        ("lora.targets", "to_q", "got 'to_q'; write a list: [to_q]"),
        ("rewards", "[{kind: latent, name: a #b}]", "not valid YAML"),
        ("steps", "2026-13-45", "put text in quotes"),
        ("rewards.0.weight", "yes", "YAML reads yes as true; write true"),
        ("generator.lr", "true", "generator.lr: must be a number, got true"),
        ("adversarial.weight", "inf", "should be a finite number"),
        ("adversarial.weight", "1e400", "1e400 is no finite number"),
        ("steps", "!env STEPS", "nothing is known of !env"),
        ("rewards", "{kind: latent}", "write a list"),
        ("tracking.uri", "sqlite:///~/mlflow.db", "a ~ inside an address is not replaced"),
        ("run.name", "demo-$USER", "environment variables are not replaced"),
        ("tracking.experiment", "${TEAM}", "environment variables are not replaced"),
        ("checkpoint.dir", "None", "None is a text, as any word; write null"),
        ("data", "null", "leave the key out for its default"),
    ],
)
def test_a_mistake_has_its_remedy(key, value, message):
    with pytest.raises(ValueError, match=key.split(".")[0]) as caught:
        load_config(None, [f"{key}={value}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_without_its_option_is_recognised():
    with pytest.raises(ValueError, match="did you mean --set steps=2"):
        load_config(Path("steps=2"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_any_unicode_encoding_is_read(tmp_path, encoding):
    assert load(tmp_path, "run: {name: größe}\r\nsteps: 3\r\n".encode(encoding)).run.name == "größe"


def test_aliases_cannot_make_a_file_too_large(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    with pytest.raises(ValueError, match="aliases make it too large"):
        load(tmp_path, "\n".join(lines))


def test_another_encoding_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"c.yaml: not UTF-8 text .*save it as UTF-8"):
        load(tmp_path, "run: {name: größe}".encode("latin-1"))


TRAINING = ("data.source=x", "adversarial.real_through_vae=true")
DRAWN = ("pairs.source=teacher", "pairs.labels=rewards")
PATHS = [
    *(
        (Config, TRAINING, key)
        for key in ("run.dir", "checkpoint.dir", "tracking.uri", "data.source", "data.prompts", "data.cache")
    ),
    *((Config, TRAINING, key) for key in ("data.embeddings", "data.latents", "evaluation.prompts", "rewards.0.path")),
    *((Config, TRAINING, key) for key in ("model.teacher", "model.vae", "model.sam")),
    *((RewardTrainingConfig, (), key) for key in ("pairs.source", "pairs.cache", "run.dir")),
    (RewardTrainingConfig, DRAWN, "pairs.prompts"),
    *((ServeSettings, ("models.a=x",), key) for key in ("models.a", "bases.b", "cache", "keys_file", "registry")),
]


@pytest.mark.parametrize(("section", "others", "key"), PATHS)
def test_every_path_setting_knows_the_home_folder(monkeypatch, section, others, key):
    monkeypatch.setenv("HOME", "/users/me")

    def value(text):
        tree = {}
        for override in (*others, f"{key}={text}"):
            apply_override(section, tree, override)
        found = section.model_validate(tree)
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else found[0] if part == "0" else getattr(found, part)
        return str(found)

    assert value("~/x y") == "/users/me/x y"
    assert value("a/~b") == "a/~b"
    for wrong, message in (
        ("~nobody-here/x", "no home folder ~nobody-here"),
        ("${HOME}/x", "variables"),
        ("/scratch/$USER/x", "variables"),
        ("''", "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            value(wrong)


def test_every_path_on_a_command_line_knows_the_home_folder(monkeypatch, capsys):
    """Shells replace a ~ at the beginning of a word only, not in --out=~/x, and programs that start commands have no shell."""
    monkeypatch.setenv("HOME", "/users/me")
    for command in (evaluate_command, export_command, scale_command, main):
        assert command(["~/gone.yaml"]) == 2
        assert "/users/me/gone.yaml" in capsys.readouterr().err
        with pytest.raises(SystemExit) if command is not main else contextlib.nullcontext():
            assert command([""]) == 2
        assert "is empty; give a path" in capsys.readouterr().err
    assert name_source("~/runs/demo/export") == ("demo", "/users/me/runs/demo/export")
    assert str(prepare_data._parse(["x", "--out=~/out"]).out) == "/users/me/out"


def test_an_address_is_no_folder():
    with pytest.raises(ValueError, match=r"run\.dir: must be a folder or file of this machine"):
        load_config(None, ["run.dir=s3://bucket/runs"])


KEYS = st.sampled_from(["steps", "run", "name", "rewards", "0", "data", "source", "x", "kind", "placement", "pools"])
TEXTS = st.text(st.sampled_from("ab01.:#'\"[]{},-&*!|>%@`~ \t\nü\x00é"), max_size=25)


@given(keys=st.lists(KEYS, min_size=1, max_size=4), value=TEXTS)
def test_any_override_is_applied_or_refused_in_one_line(keys, value):
    with contextlib.suppress(ValueError):
        load_config(None, [f"{'.'.join(keys)}={value}"])


@given(st.one_of(TEXTS.map(str.encode), st.binary(max_size=30), st.lists(TEXTS).map("\n".join).map(str.encode)))
def test_any_file_is_read_or_refused_with_its_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        load_config(path)


@given(
    st.recursive(
        st.integers(0, 9), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    )
)
def test_a_tree_comes_back_as_it_was_written(tree):
    text = yaml.safe_dump({"rewards": [{"kind": "custom", "path": "a:B", "options": {"o": tree}}]})
    assert read_tree(text, Config)[0]["rewards"][0]["options"]["o"] == tree


@pytest.mark.parametrize(
    "value", ["no", "off", "Yes", "2026-11-30", ".nan", "!!binary aGk=", "!env X", "!include [x]", "=", "012"]
)
def test_an_option_of_a_class_is_what_json_would_give_it_or_refused(tmp_path, value):
    """A resumed run and `evaluate` read it again from config.yaml, where a day would be text and nan unlike itself."""
    with pytest.raises(ValueError, match=r"c\.yaml: rewards\.0\.options\.x: "):
        load(tmp_path, f"rewards: [{{kind: custom, path: 'a:B', options: {{x: {value}}}}}]")
    text = f"rewards: [{{kind: custom, path: 'a:B', options: {{x: '{value}', y: true, z: [1e-5, null]}}}}]"
    assert load(tmp_path, text).rewards[0].options == {"x": value, "y": True, "z": [1e-5, None]}


def test_text_settings_are_told_by_their_type():
    fields = ModelConfig.model_fields
    assert is_text(fields["teacher"].annotation)
    assert is_text(fields["family"].annotation)
    assert not is_text(fields["resolution"].annotation)
    assert not is_text(fields["t5"].annotation)


def test_a_class_in_the_working_directory_is_found(tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "class Mine:\n    def score(self, images, texts):\n        return [0.0] * len(texts)\n"
    )
    code = "import sys; from flashdmd_ray.training.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = ["rewards=[{kind: custom, path: 'my_rewards:Mine'}]"]
    command = [sys.executable, "-c", code, "--dry-run", "--set", *settings]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
