"""Checkpoints: a descent that is killed at any moment, and started again, ends with the bits of one that was not."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import streamlr
from streamlr.aggregates.cost import Residuals
from streamlr.descent.checkpoint import FORMAT, VERSION, Checkpoint
from streamlr.descent.loop import State
from streamlr.descent.seen import Seen
from streamlr.descent.steps import Iterate
from streamlr.descent.stopping import Record
from streamlr.descent.updates import AdamState, Average, Best, MomentumState
from streamlr.errors import BadFile, OutputExists, PathNotFound, UsageError
from streamlr.files import held, read_json, write_json

N, P = 30_000, 12
OPTIONS = {
    "minibatch": {
        "update": "momentum",
        "average": True,
        "scale": "whiten",
        "validation": 0.2,
        "batch_size": 32,
        "log_every": 9_000,
    },
    "adam": {"update": "adam", "scale": "standard"},
    "as stored": {"shuffle": False, "batch_size": 100},
    "sgd": {"average": True, "learning_rate": 0.01},
    "sgd as stored": {"shuffle": False},
    "gd": {"update": "momentum", "gradient_tol": 0.0, "max_epochs": 150, "validation": 0.2},
}


def options_of(name: str, **changed) -> streamlr.Descent:
    mode = name if name in ("sgd", "gd") else "sgd" if name.startswith("sgd") else "minibatch"
    epochs = {} if mode == "gd" else {"max_epochs": 3, "tol": 0.0, "buffer_rows": 4_000 if "stored" not in name else None}
    return streamlr.Descent(mode, **({"checkpoint_every": 2_000} | epochs | OPTIONS[name] | changed))


def make_rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, P)) @ rng.normal(size=(P, P))
    return x, np.column_stack([x @ np.arange(P), x[:, 0]]) + rng.normal(size=(N, 2))


def make_dataset() -> streamlr.Dataset:
    return streamlr.Dataset(*make_rows())


@pytest.fixture(scope="module")
def dataset() -> streamlr.Dataset:
    return make_dataset()


def bits(model: streamlr.FittedModel) -> str:
    """Everything that a descent leaves but the time that it took."""
    history = [record.to_dict() | {"seconds": None} for record in model.history]
    cost = model.cost.to_dict()
    return json.dumps([model.coef.tobytes().hex(), model.intercept.tobytes().hex(), cost, history, model.stopped])


@pytest.fixture(scope="module")
def uninterrupted(dataset):
    """The bits of each descent, made once."""
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in found:
            found[name] = bits(streamlr.fit(dataset, options_of(name, checkpoint_every=None), ridge=0.01))
        return found[name]

    return of


def version(path: Path) -> tuple[int, int]:
    """What changes when a file is written, and not when it is read."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


class Stop(BaseException):
    """Ends a descent where a test wants it to."""


def interrupted(dataset, options, path: Path, writes: int, **given) -> bool:
    """Fit until a checkpoint was written so often; whether it came to an end before that."""
    write, count = Checkpoint.save, [0]

    def save(self, state, *, now=False):
        if now:  # as a kill would have it, which leaves no time to write
            return
        before = path.stat().st_ino if path.exists() else None
        write(self, state)
        count[0] += path.exists() and path.stat().st_ino != before
        if count[0] == writes:
            raise Stop

    Checkpoint.save = save
    try:
        streamlr.fit(dataset, options, checkpoint=path, **given)
    except Stop:
        return False
    finally:
        Checkpoint.save = write
    return True


class TestResume:
    @pytest.mark.parametrize("name", ["minibatch", "adam", "as stored", "sgd", "gd"])
    @pytest.mark.parametrize("writes", [3])
    def test_same_bits(self, dataset, uninterrupted, tmp_path, name, writes):
        runs = 1
        while not interrupted(dataset, options_of(name), tmp_path / "ck.json", writes, ridge=0.01):
            runs += 1
            if name == "gd" and runs > 5:
                break
        assert runs > 2
        assert bits(streamlr.fit(dataset, options_of(name), ridge=0.01, checkpoint=tmp_path / "ck.json")) == uninterrupted(name)
        assert [file.name for file in tmp_path.iterdir()] == ["ck.json"]

    @pytest.mark.parametrize("name", ["sgd as stored", "as stored"])
    def test_the_end_of_an_epoch_is_a_place_too(self, tmp_path, name):
        """Rows in stored order whose last stretch is shorter, but long enough to be kept."""
        x = np.random.default_rng(0).normal(size=(18_000, 12))
        dataset = streamlr.Dataset(x, x.sum(axis=1) + x[:, 0] ** 2)
        options = options_of(name, checkpoint_every=1)
        whole = bits_of_one(streamlr.fit(dataset, options_of(name, checkpoint_every=None)))
        assert any(interrupted(dataset, options, tmp_path / "ck.json", 1) for _ in range(30)), "it goes round in circles"
        assert bits_of_one(streamlr.fit(dataset, options, checkpoint=tmp_path / "ck.json")) == whole

    def test_a_target_that_is_constant(self, tmp_path):
        dataset = streamlr.Dataset(np.random.default_rng(0).normal(size=(20_000, 3)), np.full(20_000, 7.0))
        options = options_of("minibatch", max_epochs=4)
        assert not interrupted(dataset, options, tmp_path / "ck.json", 2)
        model = streamlr.fit(dataset, options, checkpoint=tmp_path / "ck.json")
        assert bits_of_one(model) == bits_of_one(streamlr.fit(dataset, replace(options, checkpoint_every=None)))

    @pytest.mark.parametrize("name", ["minibatch", "gd"])
    def test_a_finished_one_returns_the_model_at_once(self, dataset, uninterrupted, tmp_path, name):
        streamlr.fit(dataset, options_of(name), ridge=0.01, checkpoint=tmp_path / "ck.json")
        written = version(tmp_path / "ck.json")
        tasks = set()
        model = streamlr.fit(
            dataset, options_of(name), ridge=0.01, checkpoint=tmp_path / "ck.json", progress=lambda event: tasks.add(event.task)
        )
        assert bits(model) == uninterrupted(name)
        assert "minibatch" not in tasks
        assert version(tmp_path / "ck.json") == written

    @pytest.mark.parametrize("name", ["minibatch", "gd"])
    def test_written_as_often_as_asked_for(self, dataset, tmp_path, name):
        """By rows, also where each step takes all of them; when it is written changes nothing in it."""
        few = options_of(name, checkpoint_every=10 * N, max_epochs=30)
        count = 0
        while not interrupted(dataset, few, tmp_path / "ck.json", 1):
            count += 1
        assert count == pytest.approx(3 if name == "gd" else 2, abs=1)
        assert "nothing" not in bits(streamlr.fit(dataset, options_of(name, max_epochs=30), checkpoint=tmp_path / "ck.json"))

    def test_through_a_link(self, dataset, uninterrupted, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "ck.json").symlink_to("elsewhere/real.json")
        interrupted(dataset, options_of("sgd"), tmp_path / "ck.json", 3, ridge=0.01)
        assert (tmp_path / "elsewhere/real.json").is_file()
        assert bits(streamlr.fit(dataset, options_of("sgd"), ridge=0.01, checkpoint=tmp_path / "ck.json")) == uninterrupted("sgd")
        assert (tmp_path / "ck.json").is_symlink()


def bits_of_one(model: streamlr.FittedModel) -> str:
    history = [record.to_dict() | {"seconds": None} for record in model.history]
    return json.dumps([model.coef.tobytes().hex(), model.intercept.hex(), history, model.stopped])


KILLED = r"""
import os, pickle, random, signal, sys, time
from pathlib import Path
import test_checkpoint as t
import streamlr, streamlr.training, zarr, scipy.linalg

name, path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
dataset, dice, kills = t.make_dataset(), random.Random(int(sys.argv[4])), 0

def seen():
    return path.stat().st_ino if path.exists() else None

while not out.exists():
    child = os.fork()
    if not child:
        model = streamlr.fit(dataset, t.options_of(name), ridge=0.01, checkpoint=path)
        out.with_suffix(".part").write_text(t.bits(model))
        os.replace(out.with_suffix(".part"), out)
        os._exit(0)
    before, ended = seen(), 0
    while kills < 20 and dice.random() < 0.8 and seen() == before and not ended:  # mostly after some progress
        time.sleep(0.0005)
        ended = os.waitpid(child, os.WNOHANG)[0]
    if kills < 20 and not ended:
        time.sleep(dice.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    elif not ended:
        os.waitpid(child, 0)
print(kills)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("name", ["minibatch", "sgd", "gd"])
def test_killed_at_twenty_random_moments(uninterrupted, tmp_path, name):
    """Processes that the system kills, while they read, work or write; each goes on where the one before had come."""
    folder = tmp_path / "kept"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "OPENBLAS_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", KILLED, name, str(folder / "ck.json"), str(tmp_path / "out"), "5"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert (tmp_path / "out").read_text() == uninterrupted(name)
    assert [file.name for file in folder.iterdir()] == ["ck.json"], "nothing half written is left"


class TestRefusals:
    @pytest.fixture
    def path(self, dataset, tmp_path):
        assert not interrupted(dataset, options_of("minibatch"), tmp_path / "ck.json", 5)
        return tmp_path / "ck.json"

    @pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
    def test_truncated(self, dataset, path, keep):
        text = path.read_bytes()
        path.write_bytes(text[: int(keep * len(text))])
        with pytest.raises(BadFile, match=r"ck\.json is not a streamlr checkpoint file"):
            streamlr.fit(dataset, options_of("minibatch"), checkpoint=path)

    def test_flipped_bits(self, dataset, path):
        text, rng = path.read_bytes(), np.random.default_rng(0)
        for _ in range(40):
            damaged = bytearray(text)
            damaged[rng.integers(len(text))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            if json_of(damaged) == json_of(text):
                continue  # white space
            with pytest.raises(BadFile, match=r"ck\.json"):
                Checkpoint(path, {}, None).load(())

    @pytest.mark.parametrize(
        ("version", "words"), [(VERSION + 1, "upgrade streamlr"), (0, "format version 0"), ("1", "format version 1")]
    )
    def test_another_version(self, dataset, path, version, words):
        write_json(path, FORMAT, version, {"identity": {}, "state": {}}, overwrite=True)
        with pytest.raises(BadFile, match=words):
            streamlr.fit(dataset, options_of("minibatch"), checkpoint=path)

    def test_a_file_of_another_kind(self, dataset, path, tmp_path):
        model = streamlr.fit(dataset)
        model.save(tmp_path / "m.json")
        (tmp_path / "notes.txt").write_text("not ours")
        for other in ("m.json", "notes.txt"):
            before = (tmp_path / other).read_bytes()
            with pytest.raises(BadFile, match="is not a streamlr checkpoint file"):
                streamlr.fit(dataset, options_of("minibatch"), checkpoint=tmp_path / other)
            assert (tmp_path / other).read_bytes() == before

    def test_a_state_of_another_form(self, dataset, path):
        content = read_json(path, FORMAT, VERSION)
        for change in ({"here": 3}, {"best": None}, {"history": [{}]}, {"history": 5}, {"position": 1}, {"rows": "many"}):
            write_json(path, FORMAT, VERSION, {**content, "state": {**content["state"], **change}}, overwrite=True)
            with pytest.raises(BadFile, match="lacks what a checkpoint needs"):
                streamlr.fit(dataset, options_of("minibatch"), ridge=0.0, checkpoint=path)

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"batch_size": 64}, "batch_size was 32 and is 64"),
            ({"update": streamlr.descent.updates.Momentum(0.8)}, r"update was \['Momentum', 0.9\] and is \['Momentum', 0.8\]"),
            ({"learning_rate": 0.1}, "learning_rate was 'auto' and is 0.1"),
            ({"max_epochs": 4}, "max_epochs was 3 and is 4"),
        ],
    )
    def test_other_options(self, dataset, path, changed, words):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=f"checkpoint of another descent: {words}; give the same"):
            streamlr.fit(dataset, options_of("minibatch", **changed), checkpoint=path)
        assert path.read_bytes() == before

    def test_other_data_ridge_intercept_or_mode(self, dataset, path):
        x, y = make_rows()
        x[5, 5] += 1e-9
        for words, data, options, others in (
            ("the data are others, or have changed since", streamlr.Dataset(x, y), {}, {}),
            ("the data are others", dataset.split(0.5)[0], {}, {}),
            ("ridge was 0.0 and is 0.1", dataset, {}, {"ridge": 0.1}),
            ("fit_intercept was True and is False", dataset, {}, {"fit_intercept": False}),
        ):
            with pytest.raises(UsageError, match=words):
                streamlr.fit(data, options_of("minibatch", **options), checkpoint=path, **others)
        with pytest.raises(UsageError, match=r"was .* and is"):
            streamlr.fit(dataset, "gd", checkpoint=path)

    def test_when_it_is_written_may_change(self, dataset, path):
        model = streamlr.fit(dataset, options_of("minibatch", checkpoint_every=None), checkpoint=path)
        assert bits(model) == bits(streamlr.fit(dataset, options_of("minibatch", checkpoint_every=None)))


def json_of(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_one_that_is_larger_than_other_files_may_be_is_read_back(dataset, tmp_path, monkeypatch):
    path = tmp_path / "ck.json"
    model = streamlr.fit(dataset, options_of("minibatch"), checkpoint=path)
    monkeypatch.setattr("streamlr.descent.checkpoint.MAX_JSON_BYTES", path.stat().st_size - 1_000)
    assert bits(streamlr.fit(dataset, options_of("minibatch"), checkpoint=path)) == bits(model)


class TestPlaces:
    def test_no_such_folder(self, dataset, tmp_path):
        with pytest.raises(PathNotFound, match=r"there is no folder .*nowhere; create it first"):
            streamlr.fit(dataset, options_of("sgd"), checkpoint=tmp_path / "nowhere/ck.json")

    def test_a_folder(self, dataset, tmp_path):
        with pytest.raises(OutputExists, match="is an empty folder"):
            streamlr.fit(dataset, options_of("sgd"), checkpoint=tmp_path)
        assert not list(tmp_path.iterdir())
        assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root may write")
    def test_a_folder_that_may_not_be_written(self, dataset):
        with pytest.raises(OSError, match=r"/proc/self/ck\.json cannot be written there; choose another path"):
            streamlr.fit(dataset, options_of("sgd"), checkpoint="/proc/self/ck.json")

    def test_a_disk_that_is_full(self, tmp_path):
        """As the system says it of a file that may not grow: what was written before stays."""
        script = (
            "import test_checkpoint as t, streamlr, resource, sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n"
            "d = t.make_dataset()\n"
            "t.interrupted(d, t.options_of('minibatch'), path, 3); before = path.read_bytes()\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))\n"
            "try: streamlr.fit(d, t.options_of('minibatch'), checkpoint=path)\n"
            "except OSError as error: print(error)\n"
            "assert path.read_bytes() == before"
        )
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "ck.json")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "ck.json cannot be written, and stays as it was; make room, and run it again to go on" in done.stdout
        assert [file.name for file in tmp_path.iterdir()] == ["ck.json"]


HOLD = """
import sys, time
from streamlr.files import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


class TestHeld:
    """One run at a time."""

    @pytest.fixture
    def holder(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "ck.json")], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()
        process.communicate()

    def test_another_process_is_refused(self, dataset, tmp_path, holder):
        (tmp_path / "other").symlink_to(tmp_path)
        for path in (tmp_path / "ck.json", tmp_path / "other/ck.json"):
            with pytest.raises(UsageError, match=r"ck\.json is being written by another run; wait until it has ended, or choose"):
                streamlr.fit(dataset, options_of("sgd"), checkpoint=path)
        with held(tmp_path / "ck2.json"):
            pass

    def test_a_killed_holder_is_no_obstacle(self, tmp_path, holder):
        (tmp_path / ".ck.json.partial-0123abcd").write_text("half wr")
        (tmp_path / ".ck.json.bak.partial-0123abcd").write_text("another's")
        holder.kill()
        holder.wait()
        with held(tmp_path / "ck.json"):
            assert (tmp_path / ".ck.json.lock").exists()
        assert [file.name for file in tmp_path.iterdir()] == [".ck.json.bak.partial-0123abcd"]

    def test_let_go_of_after_an_error(self, tmp_path):
        for _ in range(2):
            with pytest.raises(LookupError), held(tmp_path / "ck.json"):
                raise LookupError
        assert not list(tmp_path.iterdir())

    def test_never_two_at_once(self, tmp_path):
        """Four processes take and leave it as fast as they can; each marks its stay by a file that must not be there yet."""
        script = (
            "import os, sys, time\nfrom streamlr.files import held\nfrom streamlr.errors import UsageError\n"
            "mark, count, until = sys.argv[1] + '.mark', 0, time.monotonic() + 30\n"
            "while count < 300 and time.monotonic() < until:\n"
            "    try:\n"
            "        with held(sys.argv[1]):\n"
            "            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
            "            os.unlink(mark)\n"
            "            count += 1\n"
            "    except UsageError: pass\n"
            "print(count)"
        )
        arguments = [sys.executable, "-c", script, str(tmp_path / "ck.json")]
        processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        for process in processes:
            out, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert int(out) == 300
        assert not list(tmp_path.iterdir())

    def test_without_locks(self, tmp_path, monkeypatch):
        """What a file system without locks answers."""

        def flock(descriptor, operation):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".ck.json.partial-0123abcd").write_text("perhaps of one that runs")
        with held(tmp_path / "ck.json"), held(tmp_path / "ck.json"):
            pass
        assert [file.name for file in tmp_path.iterdir()] == [".ck.json.partial-0123abcd"]


floats = st.floats(allow_nan=True, allow_infinity=True, width=64)


def arrays(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=floats)


@st.composite
def states(draw: st.DrawFn) -> State:
    """States of a descent of two features and an intercept, one target."""
    b = arrays(3, 1)
    memory = draw(st.sampled_from([MomentumState(draw(b)), AdamState(draw(b), draw(b), draw(arrays(2)))]))
    transform = draw(st.one_of(st.none(), arrays(3, 3)))
    here = Iterate(draw(b), transform, memory, Average(draw(b), draw(st.floats(0, 1e9))), draw(b), draw(st.integers(0, 10**12)))
    moments = strategies.moments_of(draw(strategies.matrices(min_rows=3, min_columns=2, max_columns=2)))
    count = st.integers(0, 10**9)
    seen = Seen(draw(count), draw(count), draw(st.floats(0, 1e9)), draw(arrays(1)), draw(arrays(4, 1)))
    cost = Residuals(np.ones(1), moments.spread).cost()
    number = st.floats(0, 1e9)
    record = Record(1, 2, 3, draw(number), cost, draw(st.sampled_from([None, cost])), draw(number), None, "whiten", draw(number))
    position = draw(st.sampled_from([(), (1, 2, 3, 4)]))
    best = Best(draw(b), draw(st.one_of(st.just(np.inf), number)))
    return State(here, best, 1, 2, position, seen, draw(number), draw(number), (record,) * draw(st.integers(0, 2)), "")


@given(states())
def test_a_state_comes_back_bit_for_bit(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("law") / "ck.json"
    Checkpoint(path, {"a": (1, np.float64(2.0))}, 1).save(state)
    again = Checkpoint(path, {"a": [1, 2.0]}, 1).load(state._replace(rows=0, position=(), history=()))
    assert described(again) == described(state)
    assert type(again.here.memory) is type(state.here.memory)
    again.here.b[:] = 0.0  # it may be written to


def described(value: object) -> object:
    """Everything in a state, with arrays as their bytes."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(described(one) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        return tuple((name, described(getattr(value, name))) for name in value.__dataclass_fields__)
    return value


def test_nothing_is_written_before_it_is_time(tmp_path):
    state = State(None, None, 0, 10, (), None, 0.0, 0.0, (), "")
    kept = Checkpoint(tmp_path / "ck.json", {}, 11)
    kept.save(state)
    assert not (tmp_path / "ck.json").exists()
    kept.save(state._replace(rows=11))
    written = version(tmp_path / "ck.json")
    kept.save(state._replace(rows=21))
    assert version(tmp_path / "ck.json") == written
    kept.save(state._replace(rows=21, stopped="done"))
    assert version(tmp_path / "ck.json") != written
