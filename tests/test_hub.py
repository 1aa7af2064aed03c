"""Models by name: the real Hub client against a server on 127.0.0.1, and official releases from the same."""

import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import TINY, random_model
from hub_server import HubServer, Request

import m2d_embed
from m2d_embed import CheckpointError, ConfigError, ModelNotFoundError
from m2d_embed.backends import selection
from m2d_embed.checkpoints.layouts import Checkpoint, write_native
from m2d_embed.checkpoints.registry import BUNDLED_NAME, LICENSE_NOTICE, RELEASES, Release
from m2d_embed.config import CheckpointName, ClapConfig, FeatureConfig
from m2d_embed.m2d import M2D

REPOSITORY = "someone/tiny-m2d"
WITH_TEXT_ENCODER = replace(
    TINY, clap=ClapConfig("mlp", (32, 24), (32, 24), "some/encoder", "mean", text_encoder_included=True)
)
FLOAT32, BF16, TEXT_ENCODER = "model.safetensors", "model.bf16.safetensors", "text_encoder.safetensors"
OFFLINE = ["argument", "environment", "no connection"]

RELEASE = "m2d_vit_tiny-80x64p16x16-990101"
RELEASE_FILE = f"/releases/v9.9.9/{RELEASE}.zip"

CHUNK = 64 * 1024

CURRENT_CLIENT = pytest.mark.skipif(
    not hasattr(huggingface_hub, "close_session"), reason="a client of before 1.0 gives up sooner, in other words"
)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds the client would have waited between its tries; it does not wait."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def close_session() -> None:
    """Forget the client's connections; the one of before 1.0 calls it otherwise."""
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
    else:
        huggingface_hub.utils._http.reset_sessions()


@pytest.fixture
def hub(monkeypatch, tmp_path, waits) -> Iterator[HubServer]:
    """An empty Hub, and the client pointed at it with an empty cache and no token."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        # The client reads its environment when it is imported, so what it made of it is what has to be replaced.
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "DOWNLOAD_CHUNK_SIZE": CHUNK,
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)  # older clients know fewer of them,
            if hasattr(huggingface_hub.file_download, name):  # and have copies
                monkeypatch.setattr(huggingface_hub.file_download, name, value)
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        close_session()
        yield server
    close_session()


@pytest.fixture
def other() -> M2D:
    return random_model(TINY, seed=1)


@pytest.fixture
def files(tmp_path) -> Callable[..., dict[str, bytes]]:
    """``files(model)``: what ``save_pretrained`` writes, and half-precision siblings if dtypes are given."""

    def make(model: M2D, *dtypes: torch.dtype) -> dict[str, bytes]:
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        if dtypes:
            write_native(folder, Checkpoint(model.config, model.state_dict()), [torch.float32, *dtypes])
        content = {f.name: f.read_bytes() for f in folder.iterdir()}
        for file in folder.iterdir():
            file.unlink()
        return content

    return make


@pytest.fixture
def published(hub, files, tiny) -> str:
    return hub.publish(REPOSITORY, files(tiny))


def numbers(model: M2D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.rand(2, 16_000, generator=generator) * 2 - 1)


def assert_same(model: M2D, expected: M2D) -> None:
    assert torch.equal(numbers(model), numbers(expected))


def dtype_of(model: M2D) -> torch.dtype:
    return model.encoder.blocks[0].attn.qkv.weight.dtype


def go_offline(how: str, hub: HubServer, monkeypatch) -> dict[str, bool]:
    """Go offline in one of the ``OFFLINE`` ways; return the arguments that this takes."""
    hub.requests.clear()
    if how == "environment":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        close_session()  # of an older client, which asks when it begins one
    if how == "no connection":
        hub.stop()
    return {"local_files_only": True} if how == "argument" else {}


# --- a repository's files -----------------------------------------------------------------------------------------


def test_repository_gives_the_model_that_was_saved(hub, published, tiny, other):
    model = M2D.from_pretrained(REPOSITORY)
    assert_same(model, tiny)
    assert not torch.equal(numbers(model), numbers(other))
    assert model.config == TINY
    assert model.origin == f"Hub repository {REPOSITORY}"
    assert not model.training
    assert [r.file for r in hub.requests if r.method == "GET"] == ["config.json", FLOAT32]


def test_load_model_takes_repositories_too(hub, published, tiny):
    assert_same(m2d_embed.load_model(REPOSITORY), tiny)


@pytest.mark.parametrize("name", [f"{REPOSITORY}@v2", f"{REPOSITORY}@refs/pr/1"])
def test_revision_in_the_name(hub, files, tiny, other, name):
    hub.publish(REPOSITORY, files(tiny))
    hub.publish(REPOSITORY, files(other), revision=name.partition("@")[2])
    model = M2D.from_pretrained(name)
    assert_same(model, other)
    assert model.origin == f"Hub repository {name}"
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


def test_revision_as_argument(hub, files, tiny, other):
    hub.publish(REPOSITORY, files(tiny))
    commit = hub.publish(REPOSITORY, files(other), revision="v2")
    assert_same(M2D.from_pretrained(REPOSITORY, revision="v2"), other)
    assert_same(M2D.from_pretrained(REPOSITORY, revision=commit), other)
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


def test_new_commit_is_noticed_and_an_old_one_is_not_downloaded_again(hub, files, tiny, other, published):
    M2D.from_pretrained(REPOSITORY)
    hub.requests.clear()
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)
    assert hub.asked() == ["config.json"]
    assert hub.asked("HEAD") == ["config.json"]
    hub.publish(REPOSITORY, files(other))
    assert_same(M2D.from_pretrained(REPOSITORY), other)


def test_push_during_a_download_does_not_mix_two_commits(hub, files):
    old, new = (random_model(WITH_TEXT_ENCODER, seed) for seed in (0, 1))
    first, second = files(old) | {TEXT_ENCODER: b"first"}, files(new) | {TEXT_ENCODER: b"second"}

    def push(request: Request) -> None:
        if request.file == FLOAT32:
            hub.publish(REPOSITORY, second)

    hub.publish(REPOSITORY, first)
    hub.on_request = push
    for expected, text_weights in ((old, b"first"), (new, b"second")):
        model = M2D.from_pretrained(REPOSITORY)
        assert_same(model, expected)
        assert model._text_weights.read_bytes() == text_weights


def test_token_and_cache_dir_reach_the_client(hub, published, tiny, tmp_path):
    model = M2D.from_pretrained(REPOSITORY, token="hf_secret", cache_dir=tmp_path / "elsewhere")
    assert_same(model, tiny)
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {"hf_secret"}
    assert {r.token for r in hub.requests if "/storage/" in r.path} == {None}
    assert (tmp_path / "elsewhere" / "models--someone--tiny-m2d" / "snapshots" / published / FLOAT32).is_file()
    assert not (tmp_path / "cache").exists()


def test_text_encoder_is_downloaded_where_there_is_one(hub, files):
    hub.publish(REPOSITORY, {**files(random_model(WITH_TEXT_ENCODER)), TEXT_ENCODER: b"some tensors"})
    model = M2D.from_pretrained(REPOSITORY)
    assert model._text_weights.name == TEXT_ENCODER
    assert model._text_weights.read_bytes() == b"some tensors"


def test_a_text_encoder_that_should_be_there_is_missed(hub, files):
    hub.publish(REPOSITORY, files(random_model(WITH_TEXT_ENCODER)))
    with pytest.raises(CheckpointError, match=rf"speaks of a {TEXT_ENCODER}, which is missing"):
        M2D.from_pretrained(REPOSITORY)


def test_two_different_revisions_are_refused(hub):
    with pytest.raises(ConfigError, match="another revision than revision='b'"):
        M2D.from_pretrained(f"{REPOSITORY}@a", revision="b")
    assert hub.requests == []


# --- half precision -----------------------------------------------------------------------------------------------


@pytest.fixture
def with_half(hub, files, tiny) -> None:
    hub.publish(REPOSITORY, files(tiny, torch.bfloat16))


def test_bf16_takes_the_bf16_file_alone(hub, with_half, tiny, tmp_path):
    write_native(tmp_path, Checkpoint(tiny.config, tiny.state_dict()), [torch.bfloat16])
    model = M2D.from_pretrained(REPOSITORY, dtype="bf16")
    assert hub.asked("GET") == ["config.json", BF16]
    assert FLOAT32 not in hub.asked()
    assert dtype_of(model) == torch.bfloat16
    assert_same(model, M2D.from_pretrained(tmp_path, dtype="bf16"))
    assert not torch.equal(numbers(model), numbers(tiny))


@pytest.mark.skipif(not selection.supports_int8(), reason="no int8 on this processor")
def test_int8_takes_the_bf16_file_alone(hub, with_half, tiny, tmp_path, caplog):
    """It is rounded from bfloat16 anyway, and the file is half as much to fetch, to read and to keep."""
    model = M2D.from_pretrained(REPOSITORY, dtype="int8", device="cpu")
    assert hub.asked("GET") == ["config.json", BF16]
    assert "rounded" not in caplog.text
    tiny.save_pretrained(tmp_path)
    of_float32 = M2D.from_pretrained(tmp_path, dtype="int8", device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, of_float32.state_dict()[name]), name


def test_cpu_takes_the_float32_file_alone(hub, with_half, tiny):
    model = M2D.from_pretrained(REPOSITORY)
    assert hub.asked("GET") == ["config.json", FLOAT32]
    assert BF16 not in hub.asked()
    assert dtype_of(model) == torch.float32
    assert_same(model, tiny)


@pytest.mark.parametrize(
    ("dtype", "asked", "result"),
    [
        (None, [FLOAT32], torch.float32),
        ("bf16", [BF16], torch.bfloat16),
        ("fp16", ["model.fp16.safetensors", FLOAT32], torch.float16),
        ("fp32", [FLOAT32], torch.float32),
    ],
)
def test_other_devices_take_half_precision_where_it_is_asked_for(hub, with_half, dtype, asked, result):
    model = M2D.from_pretrained(REPOSITORY, device="meta", dtype=dtype)
    weights = [f for f in hub.asked("HEAD") if f.startswith("model.")]
    assert weights == asked
    assert hub.asked("GET") == ["config.json", asked[-1]]
    assert dtype_of(model) == result
    assert model.device.type == "meta"


@pytest.mark.parametrize("how", [None, *OFFLINE])
def test_a_repository_with_half_precision_alone(hub, files, tiny, monkeypatch, caplog, waits, how):
    """Its values are all there is; that they are rounded is said."""
    content = files(tiny, torch.float16)
    del content[FLOAT32]
    hub.publish(REPOSITORY, content)
    if how:
        M2D.from_pretrained(REPOSITORY)
    model = M2D.from_pretrained(REPOSITORY, **go_offline(how, hub, monkeypatch))
    assert dtype_of(model) == torch.float32
    assert_same(model, random_model(TINY).set_dtype(torch.float16).set_dtype(torch.float32))
    assert caplog.messages[-1].endswith("there is no float32 file; the weights are those of float16, rounded.")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_no_rounded_weights_stand_in_for_float32(hub, with_half, monkeypatch, how):
    """What a call gives must not depend on what an earlier one left in the cache."""
    M2D.from_pretrained(REPOSITORY, device="meta", dtype="bf16")
    arguments = go_offline(how, hub, monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"local cache has its config.json but none of model.safetensors\.$"):
        M2D.from_pretrained(REPOSITORY, device="meta", **arguments)


def test_bf16_falls_back_to_the_float32_file(hub, published, tiny):
    model = M2D.from_pretrained(REPOSITORY, dtype="bf16")
    assert hub.asked("GET") == ["config.json", FLOAT32]
    assert dtype_of(model) == torch.bfloat16
    assert_same(model, random_model(TINY).set_dtype(torch.bfloat16))


def test_other_devices_stay_in_float32_without_half_precision_file(hub, published):
    assert dtype_of(M2D.from_pretrained(REPOSITORY, device="meta")) == torch.float32
    assert hub.asked("GET") == ["config.json", FLOAT32]


# --- offline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", OFFLINE)
def test_cached_model_loads_offline(hub, published, tiny, monkeypatch, waits, how):
    M2D.from_pretrained(REPOSITORY)
    arguments = go_offline(how, hub, monkeypatch)
    assert_same(M2D.from_pretrained(REPOSITORY, **arguments), tiny)
    assert hub.requests == []
    assert waits == []


@pytest.mark.parametrize("how", OFFLINE)
def test_fallback_from_bf16_loads_offline(hub, published, monkeypatch, waits, how):
    first = M2D.from_pretrained(REPOSITORY, dtype="bf16")
    arguments = go_offline(how, hub, monkeypatch)
    assert_same(M2D.from_pretrained(REPOSITORY, dtype="bf16", **arguments), first)
    assert hub.requests == []
    assert waits == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_bf16_makes_do_with_a_cached_float32_file(hub, with_half, monkeypatch, how):
    M2D.from_pretrained(REPOSITORY)
    arguments = go_offline(how, hub, monkeypatch)
    model = M2D.from_pretrained(REPOSITORY, dtype="bf16", **arguments)
    assert_same(model, random_model(TINY).set_dtype(torch.bfloat16))
    assert hub.requests == []


@pytest.mark.parametrize("how", OFFLINE)
def test_cached_revision_loads_offline(hub, files, tiny, other, monkeypatch, how):
    hub.publish(REPOSITORY, files(tiny))
    hub.publish(REPOSITORY, files(other), revision="v2")
    M2D.from_pretrained(f"{REPOSITORY}@v2")
    arguments = go_offline(how, hub, monkeypatch)
    assert_same(M2D.from_pretrained(f"{REPOSITORY}@v2", **arguments), other)
    with pytest.raises(ModelNotFoundError, match=f"{REPOSITORY}: not in the local cache"):
        M2D.from_pretrained(REPOSITORY, **arguments)


@pytest.mark.parametrize(
    ("how", "why"),
    [("argument", "local_files_only"), ("environment", "offline mode is enabled"), ("no connection", "refused")],
)
def test_offline_without_the_model(hub, published, monkeypatch, how, why):
    arguments = go_offline(how, hub, monkeypatch)
    expected = rf"{REPOSITORY}: not in the local cache, and the Hub cannot be reached \(.*{why}.*\)\.$"
    with pytest.raises(ModelNotFoundError, match=expected):
        M2D.from_pretrained(REPOSITORY, **arguments)
    assert hub.requests == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_with_half_a_model(hub, published, monkeypatch, how):
    huggingface_hub.hf_hub_download(REPOSITORY, "config.json")
    arguments = go_offline(how, hub, monkeypatch)
    with pytest.raises(ModelNotFoundError, match=f"local cache has its config.json but none of {FLOAT32}"):
        M2D.from_pretrained(REPOSITORY, **arguments)


@pytest.mark.parametrize("how", OFFLINE)
def test_without_connection_a_file_that_is_not_cached_is_missed(hub, published, monkeypatch, how):
    """Whether the repository has it is not known; only one who asks to be offline wants to do without."""
    for file in ("config.json", FLOAT32):
        huggingface_hub.hf_hub_download(REPOSITORY, file)
    arguments = go_offline(how, hub, monkeypatch)
    if how == "no connection":
        with pytest.raises(ModelNotFoundError, match=rf"{REPOSITORY}: not in the local cache, .*refused"):
            M2D.from_pretrained(REPOSITORY)
    else:
        assert_same(M2D.from_pretrained(REPOSITORY, **arguments), random_model(TINY))


@pytest.mark.parametrize("how", OFFLINE)
def test_force_download_cannot_be_had_offline(hub, published, tiny, monkeypatch, how):
    M2D.from_pretrained(REPOSITORY)
    arguments = go_offline(how, hub, monkeypatch)
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: cannot be downloaded again"):
        M2D.from_pretrained(REPOSITORY, force_download=True, **arguments)
    assert_same(M2D.from_pretrained(REPOSITORY, **arguments), tiny)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"status": 401, "code": "RepoNotFound"}, "no such repository on the Hub, or it is private"),
        ({"status": 404, "code": "RepoNotFound"}, "no such repository on the Hub, or it is private"),
        (
            {"status": 401, "message": "Invalid username or password."},
            r"the Hub refuses access \(401 Invalid username or password.\); check",
        ),
        ({"status": 403, "message": "Not yours"}, r"the Hub refuses access \(403 Not yours\); check the token"),
        ({"status": 401, "code": "GatedRepo"}, r"gated\. Accept its terms on the Hub and log in"),
        ({"status": 403, "code": "GatedRepo"}, r"gated\. Accept its terms on the Hub and log in"),
        ({"status": 403, "message": "Access to this resource is disabled."}, r"the Hub refuses access \(403 Access to"),
        ({"status": 400, "message": "What?"}, r"the Hub answered with an error \(400 What\?\)\.$"),
        ({"status": 429}, r"the Hub answered with an error \(429 Too Many Requests\)\.$"),
        ({"status": 500}, r"the Hub answered with an error \(500 Internal Server Error\)\.$"),
        ({"status": 503}, r"the Hub answered with an error \(503 Service Unavailable\)\.$"),
    ],
)
def test_refused(hub, published, fault, expected, force):
    hub.fail(REPOSITORY, **fault)
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: .*{expected}") as caught:
        M2D.from_pretrained(REPOSITORY, force_download=force)
    assert "\n" not in str(caught.value)


def test_unknown_repository(hub):
    with pytest.raises(ModelNotFoundError, match=r"^someone/nothing: no such repository on the Hub"):
        M2D.from_pretrained("someone/nothing")


def test_unknown_revision(hub, published):
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}@v3: the repository exists, but not this revision"):
        M2D.from_pretrained(f"{REPOSITORY}@v3")


def test_repository_of_something_else(hub):
    hub.publish(REPOSITORY, {"README.md": b"# Hello"})
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: not an m2d-embed model, .* no config.json"):
        M2D.from_pretrained(REPOSITORY)


@pytest.mark.parametrize(("dtype", "names"), [(None, FLOAT32), ("bf16", f"{BF16}, {FLOAT32}")])
def test_repository_without_weights(hub, files, tiny, dtype, names):
    hub.publish(REPOSITORY, {"config.json": files(tiny)["config.json"]})
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: .* a config.json but none of {names}.$"):
        M2D.from_pretrained(REPOSITORY, dtype=dtype)


def test_token_asked_for_without_login(hub, published):
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: asked for with token=True, but you are not logged"):
        M2D.from_pretrained(REPOSITORY, token=True)


@pytest.mark.parametrize("file", ["config.json", BF16, FLOAT32, TEXT_ENCODER])
def test_failing_hub_is_not_mistaken_for_a_missing_file(hub, published, tiny, file):
    hub.fail(file, status=500, method="HEAD")
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: the Hub answered with an error .500 Internal"):
        M2D.from_pretrained(REPOSITORY, dtype="bf16")
    hub.heal()
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


@pytest.mark.parametrize("part", ["config.json", "/storage/"])
def test_failing_storage(hub, published, tiny, part):
    hub.fail(part, status=500, method="GET")
    with pytest.raises(ModelNotFoundError, match=f"^{REPOSITORY}: the Hub answered with an error .500 Internal"):
        M2D.from_pretrained(REPOSITORY)
    hub.heal()
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


def test_failing_hub_does_not_matter_once_cached(hub, published, tiny):
    M2D.from_pretrained(REPOSITORY)
    hub.fail(status=500)
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


# --- downloads that break off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["config.json", "/storage/"])
@pytest.mark.parametrize("fault", [{"cut": 100}, {"shorten": 100}, {"status": 0}])
def test_broken_download_is_an_error_and_the_next_try_works(hub, published, tiny, tmp_path, part, fault):
    hub.fail(part, method="GET", **fault)
    with pytest.raises(CheckpointError, match=f"^{REPOSITORY}: the download did not arrive whole .*; try again"):
        M2D.from_pretrained(REPOSITORY)
    file = FLOAT32 if part == "/storage/" else part
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{file}"))
    hub.heal()
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


@CURRENT_CLIENT
def test_connection_closed_without_an_answer(hub, published, tiny):
    hub.fail(status=0)
    with pytest.raises(CheckpointError, match=f"^{REPOSITORY}: the download did not arrive whole .*; try again"):
        M2D.from_pretrained(REPOSITORY)
    hub.heal()
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


@CURRENT_CLIENT
def test_one_hiccup_is_overcome(hub, published, tiny, waits):
    hub.fail("/storage/", method="GET", cut=CHUNK + 1000, times=1)
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)
    assert waits == [1]
    assert [r.range for r in hub.requests if "/storage/" in r.path] == [None, f"bytes={CHUNK}-"]


def test_trouble_with_the_local_disk_is_not_taken_for_the_networks(hub, published, tmp_path):
    (tmp_path / "occupied").touch()
    with pytest.raises(OSError, match="occupied"):
        M2D.from_pretrained(REPOSITORY, cache_dir=tmp_path / "occupied")


# --- files that are wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"version https://git-lfs.github.com/spec/v1",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole + b"more",
    ],
    ids=["empty", "text", "header", "half", "longer"],
)
def test_damaged_weights(hub, files, tiny, damage):
    content = files(tiny)
    hub.publish(REPOSITORY, content | {FLOAT32: damage(content[FLOAT32])})
    with pytest.raises(CheckpointError, match=f"{FLOAT32}: damaged or not a safetensors file"):
        M2D.from_pretrained(REPOSITORY)


def test_force_download_mends_a_damaged_cache(hub, published, tiny, tmp_path):
    M2D.from_pretrained(REPOSITORY)
    (file,) = (tmp_path / "cache").rglob(f"snapshots/*/{FLOAT32}")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="download it again"):
        M2D.from_pretrained(REPOSITORY)
    assert_same(M2D.from_pretrained(REPOSITORY, force_download=True), tiny)
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth": 4}, "encoder.blocks.3.norm1.weight is missing"),
        ({"depth": 2}, "encoder.blocks.2.attn.proj.bias is not part of the model"),
        ({"embed_dim": 64}, r"encoder.blocks.0.attn.proj.bias has shape \(32,\), not \(64,\)"),
        ({"input_size": [80, 96]}, r"encoder.pos_embed has shape \(1, 21, 32\), not \(1, 31, 32\)"),
    ],
)
def test_configuration_that_contradicts_the_weights(hub, files, tiny, change, expected):
    content = files(tiny)
    config = json.dumps(json.loads(content["config.json"]) | change).encode()
    hub.publish(REPOSITORY, content | {"config.json": config})
    with pytest.raises(CheckpointError, match=f"someone.*tiny-m2d.*: the tensors do not fit .*{expected}"):
        M2D.from_pretrained(REPOSITORY)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"depth": "three"}, "'depth' must be int, not 'three'"),
        ({"norm_stats": [1.0]}, "'norm_stats' must be .*"),
        ({"depth": 0}, "depth must be positive, not 0"),
        ({"format_version": 99}, "format_version 99, but this release reads 1; upgrade m2d-embed"),
        ({"model_type": "bert"}, "not an m2d-embed configuration"),
    ],
)
def test_configuration_that_makes_no_sense(hub, files, tiny, change, expected):
    content = files(tiny)
    config = json.dumps(json.loads(content["config.json"]) | change).encode()
    hub.publish(REPOSITORY, content | {"config.json": config})
    with pytest.raises(ConfigError, match=f"config.json: {expected}"):
        M2D.from_pretrained(REPOSITORY)


@pytest.mark.parametrize("config", [b"", b"{", b"\xff\xfe", b"<html></html>"])
def test_configuration_that_is_not_json(hub, files, tiny, config):
    hub.publish(REPOSITORY, files(tiny) | {"config.json": config})
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        M2D.from_pretrained(REPOSITORY)


# --- names --------------------------------------------------------------------------------------------------------


def test_misspelt_name_gets_suggestions(hub):
    with pytest.raises(ModelNotFoundError) as caught:
        M2D.from_pretrained("m2d_vit_base-80x608p16x16-221006-mr8")
    before, _, suggestions = str(caught.value).partition("Known: ")
    assert "'m2d_vit_base-80x608p16x16-221006-mr8' is neither a file, a Hub repository" in before
    assert suggestions.startswith("m2d_vit_base-80x608p16x16-221006-mr")
    assert len(suggestions.split(", ")) == 3
    assert hub.requests == []


def test_name_like_no_other_gets_the_whole_list(hub):
    with pytest.raises(ModelNotFoundError) as caught:
        M2D.from_pretrained("?")
    assert str(caught.value).endswith(f"Known: {', '.join([BUNDLED_NAME, *RELEASES])}.")
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["./someone/model", "/nowhere/model", "~/no-such-model", "a/b/c", "someone/model.pth", Path("someone/model")],
)
def test_missing_path_is_not_looked_for_on_the_hub(hub, name):
    with pytest.raises(ModelNotFoundError, match=r": no such file or folder\.$") as caught:
        M2D.from_pretrained(name)
    assert str(caught.value).startswith(str(name))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["someone/two--dashes", "someone/model.git", "-someone/model", "someone/" + "x" * 100])
def test_invalid_repository_name(hub, name):
    with pytest.raises(ModelNotFoundError, match=f"^{name}: not a valid repository name"):
        M2D.from_pretrained(name)
    assert hub.requests == []


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own upload
def test_what_is_pushed_loads_again(hub, tiny):
    url = tiny.push_to_hub(REPOSITORY, token="hf_secret")
    content = hub.content(REPOSITORY)
    assert set(content) == {"config.json", FLOAT32, "README.md"}
    assert json.loads(content["config.json"])["embed_dim"] == TINY.embed_dim
    assert b"library_name: m2d-embed" in content["README.md"]
    assert url.startswith(f"{hub.url}/{REPOSITORY}/commit/")
    assert {r.token for r in hub.requests if r.method == "POST"} == {"hf_secret"}
    assert hub.asked("PUT"), "the weights go to the storage, not into the commit"
    assert_same(M2D.from_pretrained(REPOSITORY), tiny)


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_push_over_an_earlier_model(hub, with_half, other):
    """Its half-precision weights go with it: a later load in bf16 would take them for the new model's."""
    M2D.from_pretrained(REPOSITORY)
    other.push_to_hub(REPOSITORY, token="hf_secret")
    assert set(hub.content(REPOSITORY)) == {"config.json", FLOAT32, "README.md"}
    assert_same(M2D.from_pretrained(REPOSITORY), other)


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_pushed_features_are_those_of_the_model(hub, tiny):
    tiny.features = FeatureConfig(layers=(0, 1), layer_pooling="concat", flat=True, hop_ms=40, scene_pooling="mean_std")
    tiny.push_to_hub(REPOSITORY, token="hf_secret", delete_patterns="*.txt")
    assert b"# (2, 128)" in hub.content(REPOSITORY)["README.md"]
    assert m2d_embed.load_model(REPOSITORY).features == tiny.features


def test_load_model_takes_what_the_client_takes(hub, files, tiny, other, tmp_path):
    hub.publish(REPOSITORY, files(tiny), "v1")
    hub.publish(REPOSITORY, files(other))
    cache = tmp_path / "elsewhere"
    model = m2d_embed.load_model(REPOSITORY, revision="v1", token="hf_secret", cache_dir=cache)
    assert_same(model, tiny)
    assert {r.token for r in hub.requests if "storage" not in r.path} == {"hf_secret"}
    assert any(cache.iterdir())
    hub.requests.clear()
    again = m2d_embed.load_model(REPOSITORY, revision="v1", cache_dir=str(cache), local_files_only=True)
    assert_same(again, tiny)
    assert hub.requests == []
    with pytest.raises(ModelNotFoundError, match="not in the local cache"):
        m2d_embed.load_model(REPOSITORY, revision="v1", local_files_only=True)


# --- official releases --------------------------------------------------------------------------------------------


def published_zip(seed: int) -> tuple[M2D, bytes]:
    """A model of the published shape, and the zip it would be released in."""
    config = CheckpointName.parse(RELEASE).model_config()
    model = random_model(config, seed)
    state = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    checkpoint, archive = BytesIO(), BytesIO()
    torch.save({"model": state}, checkpoint)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(f"{RELEASE}/checkpoint-300.pth", checkpoint.getvalue())
    return model, archive.getvalue()


@pytest.fixture(scope="module")
def released() -> tuple[M2D, bytes]:
    return published_zip(seed=0)


@pytest.fixture
def releases(hub, released, monkeypatch, tmp_path) -> Path:
    """The folder that releases are kept in; the server has one."""
    monkeypatch.setitem(RELEASES, RELEASE, Release(RELEASE, "v9.9.9"))
    monkeypatch.setenv("M2D_EMBED_RELEASE_URL", f"{hub.url}/releases")
    monkeypatch.setenv("M2D_EMBED_CACHE", str(tmp_path / "m2d"))
    hub.files[RELEASE_FILE] = released[1]
    return tmp_path / "m2d" / "releases"


@pytest.fixture
def partial(releases) -> Path:
    """The file that a download of the release goes to until it is whole."""
    return releases / f"{RELEASE}.zip.partial"


def visible(folder: Path) -> list[str]:
    """What is in a folder besides lock files."""
    return [f.name for f in folder.iterdir() if not f.name.startswith(".")]


def test_release_is_downloaded_and_converted_once(hub, releases, released):
    model = M2D.from_pretrained(RELEASE)
    assert_same(model, released[0])
    assert model.origin == "official M2D release v9.9.9"
    assert model.config == replace(
        released[0].config,
        source=f"{RELEASE}.zip: {RELEASE}/checkpoint-300.pth",
        license=model.config.license,
    )
    assert "NTT" in model.config.license
    assert [(r.method, r.path) for r in hub.requests] == [("GET", RELEASE_FILE)]
    assert visible(releases) == [RELEASE]
    assert {f.name for f in (releases / RELEASE).iterdir()} == {"config.json", FLOAT32, BF16, "README.md"}
    hub.stop()
    assert_same(M2D.from_pretrained(RELEASE), released[0])
    assert dtype_of(M2D.from_pretrained(RELEASE, device="meta", dtype="bf16")) == torch.bfloat16
    assert len(hub.requests) == 1


def test_licence_notice_comes_before_the_download_and_only_then(hub, releases, capsys):
    shown = []
    hub.on_request = lambda request: shown.append(sys.stderr.getvalue())
    M2D.from_pretrained(RELEASE)
    assert len(shown) == 1
    assert f"Downloading {RELEASE}\n{LICENSE_NOTICE}\n" in shown[0]
    capsys.readouterr()
    M2D.from_pretrained(RELEASE)
    assert capsys.readouterr() == ("", "")


def test_interrupted_release_is_resumed(hub, releases, partial, released):
    size = len(released[1])
    hub.fail(RELEASE_FILE, cut=size // 2, times=1)
    hub.fail(RELEASE_FILE, status=0)
    with pytest.raises(CheckpointError, match=f"{RELEASE}.zip: the download broke off .* to go on from there"):
        M2D.from_pretrained(RELEASE)
    arrived = size // 2 // CHUNK * CHUNK
    assert partial.read_bytes() == released[1][:arrived]
    hub.heal()
    hub.requests.clear()
    assert_same(M2D.from_pretrained(RELEASE), released[0])
    assert [r.range for r in hub.requests] == [f"bytes={arrived}-"]
    assert not partial.exists()


def test_server_without_ranges_sends_the_whole_release_again(hub, releases, partial, released):
    hub.serves_ranges = False
    releases.mkdir(parents=True)
    partial.write_bytes(released[1][:1000])
    assert_same(M2D.from_pretrained(RELEASE), released[0])
    assert [r.range for r in hub.requests] == ["bytes=1000-"]


def test_partial_file_longer_than_the_release(hub, releases, partial, released):
    releases.mkdir(parents=True)
    partial.write_bytes(released[1] + b"more")
    with pytest.raises(CheckpointError, match=f"{RELEASE}.zip: the part downloaded earlier does not fit; try again"):
        M2D.from_pretrained(RELEASE)
    assert not partial.exists()
    hub.requests.clear()
    assert_same(M2D.from_pretrained(RELEASE), released[0])
    assert [r.range for r in hub.requests] == [None]


def test_partial_file_of_something_else(hub, releases, partial, released):
    releases.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1000)
    with pytest.raises(CheckpointError, match=f"{RELEASE}.zip: the download is damaged"):
        M2D.from_pretrained(RELEASE)
    assert not partial.exists()
    assert_same(M2D.from_pretrained(RELEASE), released[0])


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


def small_zip(compression: int) -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as packed:
        packed.writestr(f"{RELEASE}/checkpoint-300.pth", bytes(range(256)) * 100)
    return archive.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Not a zip</html>",
        small_zip(zipfile.ZIP_STORED)[:-30],
        flip(small_zip(zipfile.ZIP_STORED), 5000),
        flip(small_zip(zipfile.ZIP_DEFLATED), 100),
    ],
    ids=["not a zip", "cut", "stored", "deflated"],
)
def test_damaged_release_is_removed(hub, releases, released, content):
    hub.files[RELEASE_FILE] = content
    with pytest.raises(CheckpointError, match=f"{RELEASE}.zip: the download is damaged .*; try again"):
        M2D.from_pretrained(RELEASE)
    assert visible(releases) == []
    hub.files[RELEASE_FILE] = released[1]
    assert_same(M2D.from_pretrained(RELEASE), released[0])


@pytest.mark.parametrize("status", [403, 404, 500])
def test_release_that_the_server_does_not_give(hub, releases, status):
    hub.fail(RELEASE_FILE, status=status)
    with pytest.raises(ModelNotFoundError, match=f"^{hub.url}{RELEASE_FILE}: the server answered {status}.$"):
        M2D.from_pretrained(RELEASE)
    assert not (releases / f"{RELEASE}.zip").exists()


def test_release_without_connection(hub, releases):
    hub.stop()
    with pytest.raises(CheckpointError, match=f"{RELEASE}.zip: the download broke off .*refused"):
        M2D.from_pretrained(RELEASE)


def test_release_that_cannot_be_stored(hub, releases, partial):
    partial.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        M2D.from_pretrained(RELEASE)
    assert hub.requests == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_release_offline(hub, releases, released, monkeypatch, capsys, how):
    with monkeypatch.context() as patch:
        arguments = go_offline(how, hub, patch)
        with pytest.raises(ModelNotFoundError, match=f"^{RELEASE}: would have to be downloaded .* offline mode"):
            M2D.from_pretrained(RELEASE, **arguments)
    assert hub.requests == []
    assert "Downloading" not in capsys.readouterr().err
    M2D.from_pretrained(RELEASE)
    arguments = go_offline(how, hub, monkeypatch)
    assert_same(M2D.from_pretrained(RELEASE, **arguments), released[0])
    assert hub.requests == []


def test_force_download_of_a_release(hub, releases, released):
    M2D.from_pretrained(RELEASE)
    model, hub.files[RELEASE_FILE] = published_zip(seed=1)
    assert_same(M2D.from_pretrained(RELEASE), released[0])
    assert_same(M2D.from_pretrained(RELEASE, force_download=True), model)
    assert_same(M2D.from_pretrained(RELEASE), model)


def test_failed_force_download_keeps_what_is_there(hub, releases, released):
    M2D.from_pretrained(RELEASE)
    hub.fail(RELEASE_FILE, status=404)
    with pytest.raises(ModelNotFoundError, match="the server answered 404"):
        M2D.from_pretrained(RELEASE, force_download=True)
    assert_same(M2D.from_pretrained(RELEASE), released[0])
