"""What MLflow refuses for good costs one warning and nothing else; what somebody has to mend is named with its remedy."""

import json
import logging
import re
import shutil
import sqlite3
import string

import mlflow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_logged_model_name, _validate_metric_name
from PIL import Image
from pydantic import ValidationError

from flashdmd_ray.config import Config, RewardConfig, TrackingConfig, hide_passwords, parse_config
from flashdmd_ray.run import mirror as mirror_process
from flashdmd_ray.run.destinations import Unusable
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.mirror import Mirror
from flashdmd_ray.run.mlflow_names import LONGEST_KEY, mlflow_key, mlflow_model_name
from flashdmd_ray.run.mlflow_run import MlflowRun
from flashdmd_ray.run.tracking import Tracker, default_uri

SECRET = "S3CRET-pw"


@given(st.text(min_size=1, max_size=300))
@example("PickScore@v1")
@example("a/../b")
@example("/")
@example("x" * 400)
def test_every_name_becomes_one_that_mlflow_takes(name):
    key = mlflow_key(name)
    _validate_metric_name(key)
    assert len(key) <= LONGEST_KEY
    _validate_logged_model_name(mlflow_model_name(name))


@given(st.text(alphabet=string.ascii_letters + string.digits + "_.- ", min_size=1, max_size=100))
def test_a_reward_may_be_called_as_mlflow_takes_it_and_then_keeps_its_name(name):
    try:
        reward = RewardConfig(kind="pickscore", name=name)
    except ValidationError:
        assert name != name.strip() or name in (".", "..")
        return
    assert mlflow_key(f"reward/{reward.label}") == f"reward/{name}"


@pytest.mark.parametrize("key", ["name", "pool"])
@pytest.mark.parametrize("name", ["PickScore@v1", "a/b", "quality %", " x", "x\n", "\x00", "x" * 101])
def test_other_names_are_refused_where_they_are_given(key, name):
    with pytest.raises(ValueError, match=rf"rewards\.0\.{key}: must be letters"):
        parse_config({"rewards": [{"kind": "pickscore", key: name}]})


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty database of MLflow, whose tables take seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run(tmp_path, database):
    shutil.copy(database, tmp_path)
    own = {"my key@": 1, "plain": 2, "long": 4000 * "é ", "fits": 3000 * "é "}
    options = {"kind": "custom", "path": "a.b:C", "options": own, "weight": 2.0}
    settings = {"dir": str(tmp_path), "name": "sdxl_v1.5: 'a' 50%"}
    config = Config.model_validate({"run": settings, "rewards": [{"kind": "pickscore"}, options | {"name": "own"}]})
    return RunDirectory.prepare(config.run, config)


def write(run, *records):
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def mirror(run, said):
    uri = default_uri(run)
    return Mirror(lambda: MlflowRun(run.path, uri, uri, "flashdmd_ray", said.append), run.path)


def stored(run):
    mlflow.set_tracking_uri(default_uri(run))
    client = mlflow.MlflowClient()
    return client.get_run(json.loads((run.path / "mlflow.json").read_text())["run_id"])


def test_one_refused_key_leaves_the_others_and_the_run_finishes(run, monkeypatch, capsys):
    """Even one that no rule of ours foresees: the name is sent as it is here."""
    monkeypatch.setattr("flashdmd_ray.run.mlflow_run.mlflow_key", lambda name: name)
    said = []
    monkeypatch.setattr(mirror_process, "leave_out", said.append)
    many = {f"metric/{number}": float(number) for number in range(40)}
    write(run, {"step": 1, "bad@": 1.0, **many}, {"step": 2, "bad@": 2.0, **many})
    Image.new("RGB", (4, 4)).save(run.samples / "a.png")
    (run.export / "unet").mkdir(parents=True)
    (run.export / "README.md").write_text("# A student\n")
    link = mirror(run, said)
    link.transfer([{"image": ["samples", "samples/gone.png", 1]}, {"image": ["samples", "samples/a.png", 1]}])
    write(run, {"step": 3, "bad@": 3.0, **many})
    link.transfer([{"tag": ["bad@tag", "x"]}, {"model": "export"}, {"finish": "FINISHED"}])

    found = stored(run)
    assert found.info.status == "FINISHED"
    assert {"mlflow.user", "mlflow.source.name"} <= found.data.tags.keys()
    assert found.data.metrics == many
    assert found.data.params["rewards.1.options.plain"] == "2"
    assert mlflow.MlflowClient().get_model_version_by_alias("flashdmd_ray", "newest").run_id == found.info.run_id
    named = sorted(re.findall(r"bad@tag|bad@|my key@|gone\.png", " ".join(said)))
    assert sorted(set(named)) == ["bad@", "bad@tag", "gone.png", "my key@"]
    assert sum("'bad@'" in text for text in said) == 1


def test_names_of_the_users_reach_mlflow_in_its_form(run):
    said = []
    mirror(run, said).transfer([{"finish": "FINISHED"}])
    keys = stored(run).data.params
    assert said == []
    assert any(key.startswith("rewards.1.options.my key_.") for key in keys)
    assert keys["rewards.1.options.fits"] == 3000 * "é "
    assert keys["rewards.1.options.long"] == (2998 * "é ") + " ..."


def test_a_deleted_experiment_is_named_with_its_remedy_and_works_again_when_it_is_restored(run):
    said = []
    mirror(run, said).transfer([{"tag": ["key", "text"]}])
    client, experiment = mlflow.MlflowClient(), stored(run).info.experiment_id
    client.delete_experiment(experiment)
    write(run, {"step": 1, "loss": 0.5})
    link = mirror(run, said)
    with pytest.raises(
        Unusable, match=rf"'flashdmd_ray' was deleted: .*restore --experiment-id {experiment}.*tracking.experiment"
    ):
        link.transfer([])
    client.restore_experiment(experiment)
    link.transfer([{"finish": "FINISHED"}])
    assert (stored(run).data.metrics, said) == ({"loss": 0.5}, [])


def test_a_run_deleted_while_it_is_recorded_is_not_taken_for_bad_metrics(run):
    said = []
    link = mirror(run, said)
    link.transfer([{"tag": ["key", "text"]}])
    client, run_id = mlflow.MlflowClient(), stored(run).info.run_id
    client.delete_run(run_id)
    write(run, {"step": 1, "a": 0.5, "b": 0.5})
    with pytest.raises(Unusable, match=f"was deleted: .*runs restore --run-id {run_id}"):
        link.transfer([{"tag": ["key", "text"]}])
    client.restore_run(run_id)
    link.transfer([{"finish": "FINISHED"}])
    assert (stored(run).data.metrics, said) == ({"a": 0.5, "b": 0.5}, [])


def test_a_database_of_another_mlflow_is_named_with_its_remedy(run):
    with sqlite3.connect(run.path.parent / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
    database.close()
    # MLflow looks at the schema once per process and address; another spelling of the address is looked at again.
    uri = f"sqlite:///{run.path.parent}/./mlflow.db"
    with pytest.raises(Unusable, match=r"is of another MLflow.*mlflow db upgrade.*tracking\.uri"):
        MlflowRun(run.path, uri, uri, "flashdmd_ray", [].append)


URLS = [
    f"http://user:{SECRET}@mlflow:5000",
    f"https://{SECRET}@mlflow",
    f"postgresql+psycopg2://user:{SECRET}@host:5432/db?x=1",
    f"postgresql://host/db?user=u&password={SECRET}",
    f"sftp://me:{SECRET}@host/folder",
    f"s3://KEY:{SECRET}/x@bucket/folder",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["tracking.uri", "checkpoint.dir"])
def test_an_address_with_a_password_is_refused_without_repeating_it(key, url):
    section, name = key.split(".")
    with pytest.raises(ValueError, match=rf"{key}: no user with a password") as refusal:
        parse_config({section: {name: url}})
    assert SECRET not in str(refusal.value)
    assert SECRET not in hide_passwords(f"could not connect to {url}: no route", url)


@pytest.mark.parametrize("url", ["localhost:5000", "127.0.0.1:5000/x", "http:/x", "https://", "postgres://h/db"])
def test_an_address_where_no_mlflow_can_be_is_refused_where_it_is_given(run, monkeypatch, url):
    with pytest.raises(ValueError, match=r"tracking\.uri: .*(write http://HOST:PORT|postgresql://)"):
        parse_config({"tracking": {"uri": url}})
    monkeypatch.setenv("MLFLOW_ADDRESS", url)
    with pytest.raises(ValueError, match=r"tracking\.uri_env: the address in MLFLOW_ADDRESS (has|names|must)"):
        Tracker(run, TrackingConfig(uri_env="MLFLOW_ADDRESS"), after_step=0)


@pytest.mark.parametrize(
    "url",
    ["http://mlflow:5000", "sqlite:////a/b.db", "s3://bucket/a@b/c", "http://h:80/p@x", "/a/b:c@d", "sftp://me@host/x"],
)
def test_an_address_without_one_is_taken(url):
    assert TrackingConfig(uri=url).uri == url
    assert hide_passwords(url, url) == url


def test_the_password_of_a_variable_is_on_no_command_line_and_in_no_file(run, monkeypatch, caplog):
    uri = f"postgresql://user:{SECRET}@127.0.0.1:1/db"
    monkeypatch.setenv("MLFLOW_ADDRESS", uri)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(run, TrackingConfig(uri_env="MLFLOW_ADDRESS"), after_step=0)
        process = tracker._mirrors[0]._process
        with open(f"/proc/{process.pid}/cmdline") as file:
            assert SECRET not in file.read()
        tracker.finish("finished")
    written = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert SECRET.encode() not in b"".join(written)
    assert len(caplog.messages) == 1
    assert SECRET not in caplog.text


def test_a_variable_that_is_empty_is_refused_before_work(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_ADDRESS", "")
    with pytest.raises(ValueError, match=r"tracking\.uri_env: the environment variable MLFLOW_ADDRESS is not set"):
        Tracker(run, TrackingConfig(uri_env="MLFLOW_ADDRESS"), after_step=0)
