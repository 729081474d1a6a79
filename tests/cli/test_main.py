"""The frame around the commands: speed, exit codes, messages."""

import dataclasses
import errno
import inspect
import subprocess
import sys
import time

import pytest

import wemmu_jax
from wemmu_jax.cli import chat
from wemmu_jax.cli.main import COMMANDS, main
from wemmu_jax.cli.overrides import take_overrides
from wemmu_jax.cli.requests import GUIDANCE, STEPS
from wemmu_jax.diffusion.guidance import Scales


@pytest.mark.parametrize("words", [["--help"], ["chat", "--help"], ["train", "--help"]])
def test_help_answers_at_once(words):
    program = (
        "import sys\nfrom wemmu_jax.cli.main import main\ntry:\n  main(sys.argv[1:])\n"
        "finally:\n  assert not {'jax', 'transformers', 'PIL'} & set(sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: wemmu" in done.stdout
    assert time.monotonic() - started < 5  # 0.1 s on an idle machine


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "wemmu_jax", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"wemmu {wemmu_jax.__version__}\n"


def test_help_names_every_command(wemmu):
    text = wemmu("--help").out
    assert all(f"    {command} " in text or f"    {command}\n" in text for command in COMMANDS)


@pytest.mark.parametrize(
    "words", [[], ["paint"], ["chat", "--checkpoint", "x", "hi", "--sed", "1"]]
)
def test_wrong_words_are_usage_errors(wemmu, words):
    result = wemmu(*words)
    assert result.code == 2
    assert "error:" in result.err


def test_a_command_without_a_config_takes_no_key_of_one(wemmu):
    result = wemmu("chat", "hi", "--checkpoint", "x", "--config.seed=1")
    assert result.code == 2
    assert "seed" in result.err


def test_debug_shows_the_traceback(monkeypatch):
    words = ["chat", "hi", "--checkpoint", "nowhere"]
    for debug in (["--debug", *words], [*words, "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(debug)
    monkeypatch.setenv("WEMMU_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(words)


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def run(args):
        raise KeyError("a bug")

    monkeypatch.setattr(chat, "run", run)
    with pytest.raises(KeyError):
        main(["chat", "hi", "--checkpoint", "x"])


def test_interrupted(monkeypatch, wemmu):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "run", run)
    result = wemmu("chat", "hi", "--checkpoint", "x")
    assert (result.code, result.err) == (130, "wemmu chat: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TimeoutError("a bucket that does not answer"), 75),
        (ConnectionResetError(errno.ECONNRESET, "by the peer"), 75),
        (OSError(errno.EIO, "of a disk behind a network"), 75),
        (OSError(errno.ESTALE, "of NFS"), 75),
        (OSError(errno.ENOTCONN, "of a mounted bucket"), 75),
        (FileNotFoundError(errno.ENOENT, "not there"), 2),
        (PermissionError(errno.EACCES, "not allowed"), 2),
        (NotADirectoryError(errno.ENOTDIR, "a file"), 2),
        (IsADirectoryError(errno.EISDIR, "a folder"), 2),
        (OSError(errno.ENOSPC, "full"), 2),
        (OSError("without a number"), 2),
        (ValueError("a key"), 2),
    ],
    ids=repr,
)
def test_errors_of_the_moment_ask_for_another_try(error, code, monkeypatch, wemmu):
    """Launch scripts start again whatever does not exit with 2."""

    def run(args):
        raise error

    monkeypatch.setattr(chat, "run", run)
    result = wemmu("chat", "hi", "--checkpoint", "x")
    assert (result.code, result.err) == (code, f"wemmu chat: {error}\n")


@pytest.mark.parametrize(
    "words",
    [
        "train --config configs/tiny.py:stage1 --init x --workdir gs://b/run",
        "train --config configs/tiny.py:stage1 --workdir x --init gs://b/run",
        "convert --vlm x --sana y --out gs://b/run",
        "export --checkpoint x --out s3://b/run",
        "generate hi --checkpoint gs://b/run",
        "miniworld pretrain vlm --out gs://b/run --workdir x",
        "data pack sets.yaml --out gs://b/run",
        "demo --out gs://b/run",
    ],
)
def test_a_url_is_no_local_folder(words, refused, monkeypatch, tmp_path):
    """It would be one, `gs:`, made where the command runs."""
    monkeypatch.chdir(tmp_path)
    command, *rest = words.split()
    assert "/run: expected a local path" in refused(command, *rest)
    assert not any(tmp_path.iterdir())


def test_overrides_are_taken_in_both_forms():
    words = [
        "train",
        "--config.a.b=1=2",
        "--workdir",
        "w",
        "--config.c",
        "-3",
        "--",
        "--config.d=4",
    ]
    left, overrides = take_overrides(words)
    assert left == ["train", "--workdir", "w", "--", "--config.d=4"]
    assert overrides == {"a.b": "1=2", "c": "-3"}


@pytest.mark.parametrize(
    "words", [["--config.a"], ["--config.=1"], ["--config.a=1", "--config.a=2"]]
)
def test_overrides_without_key_or_value(words, capsys):
    with pytest.raises(SystemExit) as stop:
        take_overrides(words)
    assert stop.value.code == 2, "as after any words that cannot be understood"
    assert "wemmu: --config" in capsys.readouterr().err


def test_options_are_those_of_the_class():
    for task, scales in GUIDANCE.items():
        parameters = inspect.signature(getattr(wemmu_jax.WeMMU, task)).parameters
        assert parameters["steps"].default == STEPS
        assert [name for name in parameters if name.endswith("guidance")] == list(scales)
    fields = [field for scales in GUIDANCE.values() for field in scales.values()]
    assert sorted(fields) == sorted(field.name for field in dataclasses.fields(Scales))


def test_evaluate_prints_a_table(monkeypatch, wemmu, converted):
    import types

    def evaluate(model, out, *, count, seed, steps):
        return {"colour": {"score": 0.25, "count": count}, "seed": seed, "steps": steps}

    module = types.SimpleNamespace(evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "wemmu_jax.evaluation.miniworld", module)
    words = ["--checkpoint", converted, "--out", "x", "--count", 5, "--seed", 3, "--steps", 2]
    result = wemmu("evaluate", "miniworld", *words)
    assert result.code == 0, result
    rows = dict(line.rsplit(None, 1) for line in result.out.splitlines())
    assert rows == {"colour / score": "0.250", "colour / count": "5", "seed": "3", "steps": "2"}


def test_train_hands_on_what_it_was_asked(tmp_path, monkeypatch):
    asked = []

    def train(config, workdir, **options):
        asked.append((config.init, config.seed, workdir, options))

    monkeypatch.setattr("wemmu_jax.training.loop.train", train)
    monkeypatch.setattr("wemmu_jax.cli.train._keep_programs", lambda folder: None)
    words = ["--config", "configs/tiny.py:stage1", "--workdir", "run", "--config.seed=7"]
    assert main(["train", *words, "--init", str(tmp_path), "--profile"]) == 0
    assert asked == [(str(tmp_path), 7, "run", {"profile": True})]


def test_data_encode_hands_on_what_it_was_asked(tmp_path, monkeypatch, capsys):
    def encode(config, folder, **options):
        del options["progress"]
        asked = {"shard": 2, "shards": 8, "batch": 3, "threads": 5}
        assert (config.init, config.seed, folder, options) == ("weights", 7, tmp_path, asked)
        return 4, False

    monkeypatch.setattr("wemmu_jax.training.features.encode_features", encode)
    words = ["configs/tiny.py:stage1", "--init", "weights", "--out", str(tmp_path)]
    options = ["--shard", "2/8", "--batch", "3", "--threads", "5", "--config.seed=7"]
    assert main(["data", "encode", *words, *options]) == 0
    said = capsys.readouterr().out
    assert said == f"{tmp_path}: other shards are missing; 4 pictures could not be read\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "sets.yaml", "--config.seed=1"], "--config.seed is for a stage's config"),
        (
            ["show", "configs/tiny.py:stage1", "--out", "a.html", "--set", "scenes"],
            "--set and --resolution are for a YAML file",
        ),
        (
            ["show", "configs/tiny.py:stage1", "--out", "a.html", "--resolution", "64"],
            "--set and --resolution are for a YAML file",
        ),
    ],
)
def test_options_of_data_that_would_do_nothing(words, message, capsys):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err
