"""Stores at URLs, over real sockets: web servers behind a slow and faulty line, and an S3-compatible server."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import dask
import numpy as np
import pytest
import web
import zarr

import streamlr
from streamlr.dataset import remote, stored_chunks
from streamlr.dataset.integrity import seal
from streamlr.dataset.remote import RemoteStore, shown
from streamlr.errors import (
    ChunkCorrupt,
    ChunkMissing,
    DataError,
    PathNotFound,
    StoreChanged,
    StoreIncomplete,
    StoreUnreachable,
    StreamlrError,
    UsageError,
)
from streamlr.inspection import inspect_store, verify

pytest.importorskip("obstore")
N, P, CHUNK = 24_000, 100, 400  # 60 chunks of 0.3 MB
SECONDS = 0.05
ENDS = 30  # seconds within which whatever is broken for good has ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores as their writers leave them: sealed by us, consolidated, plain, sharded, of the second format, and one array."""
    root = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 500, size=(N, P)) / 8
    y = x @ np.arange(1.0, P + 1) + rng.normal(size=N)
    for name in ("sealed", "consolidated", "plain", "named"):
        group = zarr.open_group(root / f"{name}.zarr", mode="w")
        last = {"compressors": [zarr.codecs.ZstdCodec(level=0), zarr.codecs.Crc32cCodec()]}
        names = {"X": "table", "y": "price"} if name == "named" else {"X": "X", "y": "y"}
        group.create_array(names["X"], data=x, chunks=(CHUNK, P), **last)
        group.create_array(names["y"], data=y, chunks=(8 * CHUNK,), **last)
    coding = {"features": [f"x{j}" for j in range(P)], "targets": ["price"], "coding": {}, "counts": {}}
    seal(root / "sealed.zarr", **coding)
    old = zarr.open_group(root / "second format.zarr", mode="w", zarr_format=2)
    old.create_array("X", data=x, chunks=(CHUNK, P))
    old.create_array("y", data=y, chunks=(8 * CHUNK,))
    sharded = zarr.open_group(root / "sharded.zarr", mode="w")
    sharded.create_array("X", data=x, chunks=(CHUNK, P), shards=(5 * CHUNK, P))
    sharded.create_array("y", data=y, chunks=(8 * CHUNK,))
    with warnings.catch_warnings(action="ignore"):  # the third format has no word for it yet
        zarr.consolidate_metadata(str(root / "consolidated.zarr"))
        zarr.consolidate_metadata(str(root / "sharded.zarr"))
    return root


@pytest.fixture(scope="module", params=["files", "nginx"])
def server(request, folder, tmp_path_factory):
    if request.param == "files":
        with web.files(folder) as port:
            yield port
    elif web.NGINX is None:
        pytest.skip("NOT TESTED WITH nginx: it is not installed (Debian: apt-get install nginx-light); served by Python only")
    else:
        with web.nginx(folder, tmp_path_factory.mktemp("nginx")) as port:
            yield port


@pytest.fixture(scope="module")
def line(server, tmp_path_factory):
    with web.proxy(server, tmp_path_factory.mktemp("line") / "proxy", SECONDS) as proxy:
        yield proxy


@pytest.fixture
def one_line(folder, tmp_path):
    """For what does not depend on the server."""
    with web.files(folder) as port, web.proxy(port, tmp_path.with_name(f"{tmp_path.name}-proxy"), SECONDS) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    """Fewer and shorter pauses than there are: commands and workers, processes of their own, have those."""
    monkeypatch.setattr(stored_chunks, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(remote, "TRIES", 1)


@pytest.fixture(autouse=True)
def whole(request):
    """A line that is whole again after each test."""
    yield
    if "line" in request.fixturenames:
        request.getfixturevalue("line").fail({})


@pytest.fixture
def url(line):
    line.requests()
    return f"http://127.0.0.1:{line.port}/sealed.zarr"


@pytest.fixture(scope="module")
def expected(folder):
    return moments(folder / "sealed.zarr")


def moments(source, **options):
    found = streamlr.accumulate(streamlr.open_dataset(source, **options))
    return found.scatter.tobytes(), found.mean.tobytes(), found.n


def run(*arguments, **options):
    command = [sys.executable, "-m", "streamlr.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


class TestOpening:
    @pytest.mark.parametrize("name", ["sealed", "consolidated", "plain", "second%20format", "sharded"])
    def test_same_bits_as_from_disk(self, line, name, expected):
        assert moments(f"http://127.0.0.1:{line.port}/{name}.zarr") == expected
        assert moments(f"http://127.0.0.1:{line.port}/{name}.zarr/") == expected

    @pytest.mark.parametrize("name", ["sealed", "consolidated", "plain"])
    def test_documents_are_asked_for_once_and_together(self, line, name):
        line.requests()
        streamlr.open_dataset(f"http://127.0.0.1:{line.port}/{name}.zarr")
        asked = line.requests()
        assert len({request["path"] for request in asked}) == len(asked) == max(request["under_way"] for request in asked)

    def test_arrays_that_cannot_be_listed_are_found_by_name(self, line, expected):
        url = f"http://127.0.0.1:{line.port}/named.zarr"
        assert moments(url, features="table", target="price") == expected
        with pytest.raises(UsageError, match=r"none of the arrays X, y and weights.*consolidate_metadata"):
            streamlr.open_dataset(url)
        with pytest.raises(UsageError, match=r"no array or column 'cost'.*perhaps others.*consolidate_metadata"):
            streamlr.open_dataset(url, features="table", target="cost")

    def test_an_array_by_itself(self, line, folder):
        dataset = streamlr.open_dataset(f"http://127.0.0.1:{line.port}/sealed.zarr/X")
        assert (dataset.n_rows, dataset.n_features) == (N, P)

    @pytest.mark.parametrize("path", ["", "none.zarr", "sealed.zarr/zarr.json"])
    def test_nothing_there(self, line, path):
        with pytest.raises(PathNotFound, match=rf"nothing is at http://127.0.0.1:{line.port}/{path}.*check the URL"):
            streamlr.open_dataset(f"http://127.0.0.1:{line.port}/{path}")

    @pytest.mark.parametrize("place", ["127.0.0.1:1", "no.such.host.invalid"])
    def test_nobody_there(self, place):
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match=rf"http://{place}/a\.zarr cannot be read.*try again") as caught:
            streamlr.open_dataset(f"http://{place}/a.zarr")
        assert time.monotonic() - began < ENDS
        assert caught.value.exit_status == 5

    def test_nobody_there_is_all_that_a_command_says(self):
        done = run("fit", "http://127.0.0.1:1/a.zarr")
        assert done.returncode == 5
        assert done.stderr.startswith("error: http://127.0.0.1:1/a.zarr cannot be read")
        assert len(done.stderr.splitlines()) == 1, "no task that was left behind complains when the process ends"

    def test_refused(self, line, url):
        line.fail({".json": ("403", None)})
        with pytest.raises(StoreUnreachable, match=r"403.*credentials in the environment"):
            streamlr.open_dataset(url)

    def test_metadata_that_fail_for_a_moment(self, line, url, expected):
        line.fail({"sealed.zarr/zarr.json": ("503", 1), "X/zarr.json": ("cut", 1), "y/zarr.json": ("close", 1)})
        assert moments(url) == expected

    def test_metadata_that_were_altered(self, line, folder, server, tmp_path):
        shutil.copytree(folder / "sealed.zarr", folder / "altered.zarr", dirs_exist_ok=True)
        text = (folder / "altered.zarr/X/zarr.json").read_text()
        (folder / "altered.zarr/X/zarr.json").write_text(text.replace("24000", "23000"))
        with pytest.raises(StoreIncomplete, match="altered"):
            streamlr.open_dataset(f"http://127.0.0.1:{line.port}/altered.zarr")
        (folder / "altered.zarr/X/zarr.json").write_text(text[:-20])
        with pytest.raises(StoreIncomplete, match="metadata"):
            streamlr.open_dataset(f"http://127.0.0.1:{line.port}/altered.zarr")

    def test_nothing_is_written_to_a_url(self, url, line, tmp_path):
        dataset = streamlr.open_dataset(url)
        model = streamlr.fit(dataset)
        for write in (lambda: streamlr.predict(model, dataset, url), lambda: model.save(url)):
            with pytest.raises(UsageError, match="local disk"):
                write()
        assert not (tmp_path / "http:").exists()


class TestAhead:
    """What makes the rate: requests are under way together, and each chunk is asked for once."""

    def test_requests_share_their_latency(self, line, url, expected):
        dataset = streamlr.open_dataset(url)
        line.requests()
        with dask.config.set(num_workers=1):
            began = time.monotonic()
            streamlr.accumulate(dataset)
            took = time.monotonic() - began
        passed = line.requests()
        chunks = [request["path"] for request in passed if "/c/" in request["path"]]
        assert len(chunks) == len(set(chunks)) == N // CHUNK + -(-N // (8 * CHUNK))
        assert max(request["under_way"] for request in passed) >= 32
        assert took < len(passed) * SECONDS / 3  # one after the other they would take all of it

    def test_verification_too(self, line, url):
        line.requests()
        assert verify(url).problems == []
        assert max(request["under_way"] for request in line.requests()) >= 16

    def test_connections_are_kept(self, line, url, expected):
        store = RemoteStore(url)
        assert pickle.loads(pickle.dumps(store)) is pickle.loads(pickle.dumps(store))  # one pool for the tasks of a worker
        assert pickle.loads(pickle.dumps(store)) == store


class TestFaults:
    @pytest.mark.parametrize("fault", ["cut", "close", "500", "503"])
    def test_a_moment(self, line, url, expected, fault):
        dataset = streamlr.open_dataset(url)
        line.fail({"X/c/7/0": (fault, 2), "y/c/3": (fault, 1)})
        found = streamlr.accumulate(dataset)
        assert (found.scatter.tobytes(), found.mean.tobytes(), found.n) == expected
        asked = [request["path"] for request in line.requests()]
        assert sum(path.endswith("X/c/7/0") for path in asked) == 3

    @pytest.mark.parametrize("fault", ["cut", "close", "500", "403", "short"])
    def test_for_good(self, line, url, fault):
        """What came of it is never taken for the chunk; and the rest of the store answers, so that it is the chunk's fault."""
        dataset = streamlr.open_dataset(url)
        line.fail({"X/c/7/0": (fault, None)})
        began = time.monotonic()
        with pytest.raises(ChunkCorrupt, match=r"X/c/7/0|chunk 7\.0 of array 'X'"):
            streamlr.accumulate(dataset)
        assert time.monotonic() - began < ENDS

    def test_a_body_that_ends_early_is_never_the_chunk_where_nothing_checks_it_either(self, line, folder):
        group = zarr.open_group(folder / "raw.zarr", mode="w")
        group.create_array("X", data=np.random.default_rng(0).normal(size=(1_000, 10)), chunks=(100, 10), compressors=None)
        dataset = streamlr.open_dataset(f"http://127.0.0.1:{line.port}/raw.zarr")
        model = streamlr.fit(streamlr.Dataset(np.random.default_rng(1).normal(size=(50, 10)), np.arange(50.0)))
        for fault in ("cut", "short"):
            line.fail({"X/c/3/0": (fault, None)})
            with pytest.raises(ChunkCorrupt, match=r"X/c/3/0|chunk 3\.0"):
                streamlr.predict(model, dataset, folder / "out.zarr")

    def test_absent(self, line, url):
        dataset = streamlr.open_dataset(url)
        line.fail({"X/c/7/0": ("404", None)})
        with pytest.raises(ChunkMissing, match=r"chunk 7\.0 of array 'X' \(rows 2,800 to 3,199\) is missing from http://127"):
            streamlr.accumulate(dataset)

    def test_absent_and_allowed(self, line):
        line.fail({"X/c/7/0": ("404", None)})
        dataset = streamlr.open_dataset(f"http://127.0.0.1:{line.port}/plain.zarr", allow_missing_chunks=True)
        assert streamlr.accumulate(dataset).n == N

    def test_all_of_it_while_it_is_read(self, line, url):
        dataset = streamlr.open_dataset(url)
        began = time.monotonic()
        line.fail({"/c/7/0": ("close", None), "X/zarr.json": ("close", None)})
        with pytest.raises(StoreUnreachable, match="cannot be read"):
            streamlr.accumulate(dataset)
        reader = dataset.reader()
        with pytest.raises(StoreUnreachable, match=r"'X/c/7/0' of array 'X' in http.*nor can its metadata.*run it again"):
            list(reader.blocks(streamlr.dataset.blocks.Span(0, N), lambda tally: None))
        assert time.monotonic() - began < ENDS

    def test_a_server_that_says_nothing(self, line, url, monkeypatch):
        monkeypatch.setattr(remote, "SILENCE", timedelta(seconds=0.3))
        monkeypatch.setattr(remote, "PATIENCE", timedelta(seconds=0.5))
        dataset = streamlr.open_dataset(url)
        line.fail({"X/c/7/0": ("hang", 1)})
        streamlr.accumulate(dataset)
        line.fail({"X/c/7/0": ("hang", None)})
        began = time.monotonic()
        with pytest.raises(ChunkCorrupt, match="X/c/7/0"):
            streamlr.accumulate(dataset)
        assert time.monotonic() - began < ENDS

    def test_a_store_that_changes(self, line, folder):
        shutil.copytree(folder / "plain.zarr", folder / "growing.zarr", dirs_exist_ok=True)
        dataset = streamlr.open_dataset(f"http://127.0.0.1:{line.port}/growing.zarr")
        zarr.open_group(folder / "growing.zarr")["X"].resize((N + 1, P))
        with pytest.raises(StoreChanged, match=r"http://127.*open it again"):
            streamlr.accumulate(dataset)


class TestInspection:
    def test_inspect_and_verify(self, line, url):
        found = inspect_store(url)
        assert [(array.name, array.n_stored, array.n_missing) for array in found.arrays] == [("X", 60, 0), ("y", 8, 0)]
        line.fail({"X/c/7/0": ("404", None), "X/c/9/0": ("cut", None)})
        assert inspect_store(url).n_missing == 1
        problems = verify(url).problems
        assert [(problem.chunk, problem.kind) for problem in problems] == [("7.0", "ChunkMissing"), ("9.0", "ChunkCorrupt")]

    def test_arrays_that_nobody_can_know_of(self, line):
        for look in (inspect_store, verify):
            with pytest.raises(UsageError, match=r"not all arrays of http.*consolidate_metadata.*one array"):
                look(f"http://127.0.0.1:{line.port}/plain.zarr")
            look(f"http://127.0.0.1:{line.port}/consolidated.zarr")

    def test_commands(self, one_line, folder, tmp_path):
        line, url = one_line, f"http://127.0.0.1:{one_line.port}/sealed.zarr"
        local = json.loads(run("fit", folder / "sealed.zarr", "--json", cwd=tmp_path).stdout)
        fitted = run("fit", url, "--out", "m.json", "--json", cwd=tmp_path)
        assert fitted.returncode == 0, fitted.stderr
        assert json.loads(fitted.stdout)["coef"] == local["coef"]
        for command in (["inspect", url], ["verify", url], ["evaluate", "m.json", url], ["predict", "m.json", url, "out.zarr"]):
            done = run(*command, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        refused = run("predict", "m.json", url, "s3://bucket/out.zarr", cwd=tmp_path)
        assert (refused.returncode, "local disk" in refused.stderr) == (2, True)
        line.fail({"X/c/7/0": ("cut", None)})
        assert run("fit", url, cwd=tmp_path).returncode == 3
        assert run("fit", "http://127.0.0.1:1/a.zarr", cwd=tmp_path).returncode == 5
        assert run("fit", f"{url}/none", cwd=tmp_path).returncode == 2
        assert sorted(os.listdir(tmp_path)) == ["m.json", "out.zarr"]


class TestSecrets:
    @pytest.mark.parametrize("ending", ["a.zarr?X-Amz-Signature=SECRET", "a.zarr#SECRET"])
    @pytest.mark.parametrize("scheme", ["http", "https", "s3", "ftp"])
    def test_a_url_that_carries_them_is_refused_and_not_shown(self, scheme, ending):
        for url in (f"{scheme}://me:SECRET@127.0.0.1:1/a.zarr", f"{scheme}://SECRET@host/a.zarr", f"{scheme}://host/{ending}"):
            with pytest.raises(UsageError, match="environment") as caught:
                streamlr.open_dataset(url)
            assert "SECRET" not in str(caught.value)

    def test_nor_on_a_terminal(self, tmp_path):
        refused = run("fit", "https://me:SECRET@host/a.zarr?X-Amz-Signature=SECRET", "--json", cwd=tmp_path)
        assert (refused.returncode, "SECRET" in refused.stderr + refused.stdout) == (2, False)

    @pytest.mark.parametrize(
        ("text", "plain"),
        [
            ("<FsspecStore(HTTP, https://me:pw@host/a?b=c)>", "<FsspecStore(HTTP, https://host/a)>"),
            ("s3://bucket/a", "s3://bucket/a"),
            ("/data/a?b@c#d", "/data/a?b@c#d"),
        ],
    )
    def test_what_is_shown(self, text, plain):
        assert shown(text) == plain


KEY, SECRET = "AKIANOTSHOWN", "not-to-be-shown"


@pytest.fixture(scope="module")
def bucket(folder):
    """An S3-compatible server, with stores in a bucket."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
    client.create_bucket(Bucket="rows")
    for name in ("sealed", "plain"):
        for path in (folder / f"{name}.zarr").rglob("*"):
            if path.is_file():
                client.put_object(Bucket="rows", Key=f"some/{path.relative_to(folder)}", Body=path.read_bytes())
    yield endpoint, client
    client.close()
    server.stop()


class TestS3:
    @pytest.fixture(autouse=True)
    def environment(self, bucket, monkeypatch):
        for name, value in {
            "AWS_ENDPOINT_URL": bucket[0],
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)

    @pytest.mark.parametrize("name", ["sealed", "plain"])
    def test_same_bits_as_from_disk(self, name, expected):
        assert moments(f"s3://rows/some/{name}.zarr") == expected
        assert verify(f"s3://rows/some/{name}.zarr").problems == []
        assert inspect_store(f"s3://rows/some/{name}.zarr").n_missing == 0

    def test_absent(self, bucket):
        dataset = streamlr.open_dataset("s3://rows/some/plain.zarr")
        bucket[1].delete_object(Bucket="rows", Key="some/plain.zarr/X/c/7/0")
        with pytest.raises(ChunkMissing, match=r"chunk 7\.0 .* missing from s3://rows/some/plain\.zarr"):
            streamlr.accumulate(dataset)
        assert inspect_store("s3://rows/some/plain.zarr").n_missing == 1
        with pytest.raises(PathNotFound, match="s3://rows/some/none"):
            streamlr.open_dataset("s3://rows/some/none.zarr")

    def test_credentials_stay_in_the_environment(self, tmp_path):
        dataset = streamlr.open_dataset("s3://rows/some/sealed.zarr")
        model = streamlr.fit(dataset, checkpoint=None)
        model.save(tmp_path / "m.json")
        descended = streamlr.fit(dataset, streamlr.Descent("minibatch", max_epochs=1), checkpoint=tmp_path / "c")
        kept = (tmp_path / "m.json").read_bytes() + (tmp_path / "c").read_bytes()
        kept += pickle.dumps(dataset) + pickle.dumps(model) + pickle.dumps(descended) + repr(dataset).encode()
        kept += repr(dataset.features[0]).encode() + dataset.fingerprint.encode()
        assert KEY.encode() not in kept
        assert SECRET.encode() not in kept

    def test_wrong_credentials_are_not_shown(self, bucket, monkeypatch, capfd, caplog):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        caplog.set_level(0)
        with pytest.raises(StoreUnreachable, match="s3://rows/some") as caught:
            streamlr.open_dataset("s3://rows/some/sealed.zarr")
        said = str(caught.value) + repr(caught.value.__cause__) + "".join(capfd.readouterr()) + caplog.text
        assert SECRET not in said
        assert KEY not in said


def test_workers_open_it_themselves(one_line, folder, tmp_path):
    line, url = one_line, f"http://127.0.0.1:{one_line.port}/sealed.zarr"
    distributed = pytest.importorskip("distributed")
    with dask.config.set(num_workers=1):
        expected = streamlr.fit(streamlr.open_dataset(folder / "sealed.zarr"))
        cost = streamlr.evaluate(expected, streamlr.open_dataset(folder / "sealed.zarr"))
    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        dataset = streamlr.open_dataset(url)
        model = streamlr.fit(dataset)
        assert model.coef.tobytes() == expected.coef.tobytes()
        assert streamlr.evaluate(model, dataset).mse == cost.mse
        streamlr.predict(model, dataset, tmp_path / "out.zarr")
        line.fail({"X/c/7/0": ("cut", None)})
        with pytest.raises(ChunkCorrupt, match="X/c/7/0"):
            streamlr.fit(dataset)
        line.fail({"X/c/7/0": ("404", None)})
        with pytest.raises(ChunkMissing, match=r"chunk 7\.0"):
            streamlr.fit(dataset)


def test_importing_the_package_and_reading_a_disk_import_none_of_it(folder):
    code = f"import streamlr, sys; streamlr.open_dataset({str(folder / 'sealed.zarr')!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"obstore", "aiohttp", "s3fs", "boto3"} & set(loaded)


def test_errors_cross_processes():
    for kind in (StoreUnreachable, PathNotFound):
        error = pickle.loads(pickle.dumps(kind("not there")))
        assert (type(error), str(error)) == (kind, "not there")
        assert isinstance(error, StreamlrError | DataError)
