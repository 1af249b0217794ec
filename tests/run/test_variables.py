"""Variables that are set and empty, proxies, and folders that are too deep."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from flashdmd_ray.run.variables import check_ray_address, prepare_environment, ray_address
from flashdmd_ray.runtime.environment import use_loopback


def test_an_empty_variable_is_unset_except_where_empty_says_something():
    environment = {
        "RAY_ADDRESS": "",
        "HF_HOME": "",
        "MLFLOW_TRACKING_URI": "",
        "HOME": "",
        "LOCAL_RANK": " ",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_TOKEN": "x",
        "MY_OWN": "",
    }
    prepare_environment(environment)
    ours = ("no_proxy", "kineto_log_level")
    kept = {name: value for name, value in environment.items() if name.lower() not in ours}
    assert kept == {"CUDA_VISIBLE_DEVICES": "", "HF_TOKEN": "x", "MY_OWN": ""}


@pytest.mark.parametrize("address", [None, "", " ", "local"])
def test_a_ray_of_its_own_is_private(address):
    environment = {} if address is None else {"RAY_ADDRESS": address}
    use_loopback(environment)
    assert ray_address(environment) is None
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    in_cluster = {"RAY_ADDRESS": "10.0.0.1:6379"}
    use_loopback(in_cluster)
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in in_cluster


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1", ":6379", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_at_which_no_cluster_can_be_is_refused_before_ray_is_there(address):
    with pytest.raises(ValueError, match=f"RAY_ADDRESS={address}: cannot join a Ray there.*unset RAY_ADDRESS"):
        check_ray_address({"RAY_ADDRESS": address})
    with socket.create_server(("127.0.0.1", 0)) as server:
        for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}", "auto", " "):
            check_ray_address({"RAY_ADDRESS": form.format(server.getsockname()[1])})


@pytest.mark.parametrize("given", [{}, {"no_proxy": "a.org, b.org"}, {"NO_PROXY": "a.org"}, {"no_proxy": "*"}])
def test_loopback_needs_no_proxy_and_what_was_named_stays(given, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    environment = dict(given)
    prepare_environment(environment)
    prepare_environment(environment)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, environment[name])
    hosts = ["localhost", "127.0.0.1", "localhost:8000", *(["a.org"] if given else [])]
    assert all(urllib.request.proxy_bypass(host) for host in hosts)
    assert bool(urllib.request.proxy_bypass("c.org")) == ("*" in str(given))


def test_sockets_of_ray_fit_whatever_the_temporary_folder():
    deep = {"TMPDIR": "/scratch/" + "x" * 60}
    use_loopback(deep)
    assert deep["RAY_TMPDIR"] == "/tmp"
    short = {"TMPDIR": "/scratch/x"}
    use_loopback(short)
    assert "RAY_TMPDIR" not in short
    with pytest.raises(
        ValueError, match=r"RAY_TMPDIR: /scratch/x+ is too long for Ray's sockets; set one of at most \d+ bytes"
    ):
        use_loopback({"RAY_TMPDIR": deep["TMPDIR"]})
