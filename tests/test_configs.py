"""The four stages as data: the paper's numbers, the rounded batch, and what happens to typos."""

import json

import flax.linen as nn
import pytest

from configs.wemmu_3b import STAGES
from wemmu_jax.cli.main import main
from wemmu_jax.ops.remat import remat
from wemmu_jax.training.curriculum import Loss, Remat, Stage, base_config, load_config

PAPER = {  # batch, steps, learning rate, warm-up, resolution (design, section 2)
    "stage1": (2336, 34_000, 1e-4, 1000, 512),
    "stage2": (584, 44_000, 1e-5, 1500, 1024),
    "stage3": (584, 34_000, 1e-5, 1500, 1024),
    "stage4": (244, 18_000, 1e-5, 1500, 1024),
}
BATCH = {"stage1": 2304, "stage2": 512, "stage3": 512, "stage4": 256}
MIXTURE = {
    "stage1": {"Rec": 50, "T2I": 47, "Uncond": 3},
    "stage2": {"Rec": 50, "T2I": 47, "Uncond": 3},
    "stage3": {"S-Edit": 55, "T2I": 25, "Rec": 20, "Uncond": 10},
    "stage4": {"S-Edit": 35, "M-Edit": 20, "T2I": 25, "Rec": 20, "Uncond": 10},
}


def config_of(stage, family="wemmu_3b", **overrides):
    return load_config(f"configs/{family}.py:{stage}", overrides)


@pytest.mark.parametrize("name", PAPER)
def test_paper_numbers(name):
    batch, steps, learning_rate, warmup, resolution = PAPER[name]
    config = config_of(name)
    stage = Stage.from_config(config)
    assert stage.batch == BATCH[name]
    # The paper's samples, to within one batch.
    assert abs(stage.batch * stage.optimizer.steps - batch * steps) < stage.batch
    assert (config.paper.batch, config.paper.steps) == (batch, steps)
    assert (stage.optimizer.learning_rate, stage.optimizer.warmup) == (learning_rate, warmup)
    assert (stage.optimizer.b1, stage.optimizer.b2) == (0.9, 0.95)
    assert (stage.optimizer.weight_decay, stage.optimizer.clip) == (1e-5, 1.0)
    assert config.data.resolution == resolution and config.data.buckets == 9
    assert stage.loss is (Loss.CONTRASTIVE if name == "stage1" else Loss.FLOW_MATCHING)
    assert (stage.contrast, stage.shift, stage.time_law) == (0.05, 3.0, "logit_normal")
    assert stage.draws == 1
    assert {task: w for task, w in config.data.mixture.items() if w} == MIXTURE[name]
    assert stage.ema == 0


@pytest.mark.parametrize("name", PAPER)
def test_batch_divides_a_pod(name):
    config = config_of(name)
    assert config.batch.rows % 128 == 0 and config.validation_rows % 256 == 0


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_about_ten_lines(name):
    assert len(STAGES[name]) <= 10


def flat(config) -> dict:
    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(json.loads(config.to_json()), ""))


def test_stages_differ_where_the_paper_says():
    stages = [flat(config_of(name)) for name in PAPER]
    differing = {key for key in stages[0] if any(s[key] != stages[0][key] for s in stages[1:])}
    assert {key.rpartition(".")[0] or key for key in differing} == (
        {"name", "seed", "data", "data.mixture", "batch", "paper", "optimizer", "loss", "trainable"}
    )
    assert len({stage["seed"] for stage in stages}) == 4  # or a stage repeats the noise of another
    assert {key for key in differing if key.startswith(("data.", "loss.", "optimizer."))} == {
        "data.resolution",
        *(f"data.mixture.{task}" for task in ("T2I", "Uncond", "Rec", "S-Edit", "M-Edit")),
        "loss.kind",
        "optimizer.learning_rate",
        "optimizer.warmup",
        "optimizer.steps",
    }


@pytest.mark.parametrize("name", PAPER)
def test_tiny_is_the_paper_in_small(name):
    tiny, paper = (flat(config_of(name, family)) for family in ("tiny", "wemmu_3b"))
    assert tiny.keys() == paper.keys()
    assert tiny["trainable"] == paper["trainable"]
    same = ("data.mixture.", "loss.", "optimizer.weight_decay", "optimizer.clip")
    differ = {key for key in tiny if key.startswith(same) and tiny[key] != paper[key]}
    shift = {"loss.shift"} if name in ("stage1", "stage2") else set()
    assert differ == {"loss.draws"} | shift
    stage = Stage.from_config(config_of(name, "tiny"))
    assert stage.optimizer.steps >= 50


# -- overrides


def test_overrides_take_the_type_of_what_they_replace():
    config = config_of(
        "stage2",
        **{
            "optimizer.steps": "60",
            "optimizer.learning_rate": "1",
            "optimizer.ema": "0.99",
            "optimizer.warmup": "0",
            "data.text_lengths": "[64, 128]",
            "data.sources": '[{"name": "a", "tasks": ["T2I"], "type": "folder", "folder": "/a"}]',
            "model.bridge.vae_stream": "expert",
            "name": "mine",
            "seed": 3,
        },
    )
    assert config.optimizer.steps == 60 and config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.data.text_lengths == (64, 128) and config.data.sources[0]["name"] == "a"
    assert (config.name, config.seed) == ("mine", 3)
    stage = Stage.from_config(config)
    assert stage.bridge.vae_stream == "expert" and stage.optimizer.steps == 60


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.stepz", "steps"),
        ("optimiser.steps", "optimizer"),
        ("model.bridge.vae_streams", "vae_stream"),
        ("data.mixture.S-Edits", "S-Edit"),
        ("sed", "seed"),
    ],
)
def test_a_typo_is_an_error_that_suggests(key, suggestion):
    with pytest.raises(ValueError, match="has no key") as error:
        config_of("stage1", **{key: "1"})
    assert key in str(error.value)
    assert f'"{suggestion}"' in str(error.value)


def test_no_stage_trains_on_conversations(tmp_path):
    message = "data.mixture: no stage trains on VQA, because the VLM.* is frozen.*pretrain vlm"
    with pytest.raises(ValueError, match=message):
        config_of("stage3", "tiny", **{"data.mixture.VQA": "20"})
    head = "from configs import tiny\ndef get_config(stage):\n    config = tiny.get_config(stage)\n"
    for line in ("config.data.mixture.VQA = 1.0", "config.data.update({'mixture': {'VQA': 1.0}})"):
        (tmp_path / "mine.py").write_text(f"{head}    {line}\n    return config\n")
        with pytest.raises(ValueError, match=message):
            load_config(f"{tmp_path}/mine.py:stage3")
    config = config_of("stage3", "tiny")
    with config.unlocked():
        config.data.mixture.VQA = 1.0
    with pytest.raises(ValueError, match=message):
        Stage.from_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.steps", "many"),
        ("optimizer.steps", "1.5"),
        ("optimizer.steps", "true"),
        ("optimizer.ema", "true"),
        ("optimizer.ema", "none"),
        ("optimizer", "3"),
        ("optimizer.steps.more", "3"),
        ("optimizer.steps", 1.5),
        ("data.text_lengths", "128"),
        ("data.text_lengths", "(128)"),
        ("data.text_lengths", '"abc"'),
        ("data.sources", '{"name": "a"}'),
        ("optimizer.clip", "9" * 400),
        ("seed", "null"),
        ("name", 3),
    ],
)
def test_a_wrong_type_is_an_error(key, value):
    with pytest.raises(ValueError, match=key):
        config_of("stage1", **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("loss.kind", "contrastiv", "contrastive"),
        ("loss.time_law", "logitnormal", "logit_normal"),
        ("loss.contrast", "1.0", "loss.contrast"),
        ("loss.shift", "0", "loss.shift"),
        ("model.dtype", "bf16", "bfloat16"),
        ("model.bridge.queries", "noise", "noisy"),
        ("batch.rows", "1", "batch.rows"),
        ("batch.rows", "0", "batch.rows"),
        ("batch.micro_batches", "0", "micro_batches"),
        ("optimizer.learning_rate", "NaN", "learning_rate"),
        ("optimizer.learning_rate", "-1e-4", "learning_rate"),
        ("optimizer.warmup", "100000", "warm-up of 100000 steps does not fit"),
        ("optimizer.ema", "1.0", "optimizer.ema"),
        ("model.attention", "foo", r"model\.attention='foo'; expected one of \['auto', 'xla'"),
        (
            "model.remat",
            "foo",
            r"model\.remat='foo'; expected one of \['none', 'unrolled', .*'without_up', 'offload'\]",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error(key, value, named):
    config = config_of("stage1", **{key: value})
    with pytest.raises(ValueError, match=named):
        Stage.from_config(config)


NONSENSE = {
    "seed": ["-1", "99999999999999999999", str(2**32)],
    "data.threads": ["-1"],
    "data.workers": ["-1"],
    "data.bad_share": ["-0.1", "1", "NaN"],
    "data.text_lengths": [
        '["a"]',
        "[128, 64]",
        "[64, 64]",
        "[0, 64]",
        "[64.5]",
        "[true]",
        "[]",
        "[256, 1024]",
    ],
    "data.pad_multiple": ["0", "-4"],
    "data.max_aspect": ["NaN", "Infinity", "0.5"],
    "data.mixture.T2I": ["-1", "NaN", "Infinity", "1e-9"],
    "data.mixture.M-Edit": ["-1"],
    "data.sources": ["[1]", '["a", 1]', "[[]]"],
    "data.held_out": ["[1]"],
    "batch.rows": ["0"],
    "batch.micro_batches": ["-1"],
    "optimizer.learning_rate": ["0", "Infinity"],
    "optimizer.weight_decay": ["-1e-5", "NaN", "Infinity"],
    "optimizer.clip": ["-1.0", "NaN", "Infinity"],
    "optimizer.ema": ["-0.1", "NaN"],
    "loss.contrast": ["NaN", "-0.1", "1.0"],
    "loss.shift": ["0", "NaN"],
    "loss.draws": ["0", "-1"],
    "trainable": ["[1]", '["ab"]', '[[".*"]]', '[[".*", true, 1]]'],
    "mesh.data": ["-1"],
    "mesh.fsdp": ["0"],
    "mesh.sequence": ["0"],
    "mesh.tensor": ["0", "-2"],
    "every.log": ["-1"],
    "every.checkpoint": ["-1"],
    "every.validate": ["-1"],
    "every.sample": ["-1"],
    "keep_checkpoints": ["0", "-1"],
    "validation_rows": ["0", "-8"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values]
)
def test_a_nonsense_value_is_named_with_what_is_expected(key, value):
    """Under either loss: a value is looked at even where it is not used."""
    for stage in ("stage1", "stage2"):
        config = config_of(stage, **{key: value})
        with pytest.raises(ValueError, match="; found ") as error:
            Stage.from_config(config)
        assert str(error.value).startswith(f"{key} must be ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", str(2**32 - 1)),
        ("data.threads", "0"),
        ("data.bad_share", "0"),
        ("data.sources", '["sets.yaml"]'),
        ("data.text_lengths", "[1]"),
        ("data.mixture.T2I", "0"),
        ("data.mixture.T2I", "1e-6"),
        ("optimizer.clip", "0"),
        ("optimizer.weight_decay", "0"),
        ("loss.contrast", "0"),
        ("every.log", "0"),
        ("keep_checkpoints", "1"),
        ("model.bridge.distillation", "0"),
        ("model.bridge.noise_scale", "0"),
    ],
)
def test_a_value_at_the_edge_is_taken(key, value):
    Stage.from_config(config_of("stage1", **{key: value}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[["(", true]]', r"trainable: '\(' is no regex"),
        ("[[1, true]]", "trainable: 1 is no regex"),
        ('[[".*", "false"]]', r"trainable: '\.\*' must have true or false; found 'false'"),
    ],
)
def test_a_bad_rule_of_what_learns(value, message):
    config = config_of("stage1", trainable=value)
    with pytest.raises(ValueError, match=message):
        Stage.from_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, value)
            for key in ("fixed_grid", "max_grid", "position_mlp_hidden", "connector_heads")
            for value in ("0", "-1")
        ],
        ("distillation", "-1.0"),
        ("distillation", "NaN"),
        ("noise_scale", "-0.5"),
    ],
)
def test_a_bridge_that_makes_no_sense(key, value):
    config = config_of("stage1", **{f"model.bridge.{key}": value})
    with pytest.raises(ValueError, match=f"bridge config: {key} must be .*; found (nan|{value})"):
        Stage.from_config(config)


@pytest.mark.parametrize("template", ["", "a picture", "{caption} or {caption}"])
def test_a_template_has_one_place_for_the_caption(template):
    config = config_of("stage1", **{"model.bridge.caption_template": template})
    with pytest.raises(ValueError, match=r"caption_template must have \{caption\} in it once"):
        Stage.from_config(config)


def test_the_remat_policies_are_those_of_ops():
    for policy in Remat:
        remat(nn.Dense, policy)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.remat", "foo"), ("optimizer.clip", "-1.0"), ("seed", "-1"), ("trainable", "[1]")],
)
def test_a_refused_config_leaves_no_workdir(key, value, tmp_path, capsys):
    workdir = tmp_path / "run"
    words = ["train", "--config", "configs/tiny.py:stage1", f"--config.{key}={value}"]
    assert main([*words, "--init", str(tmp_path), "--workdir", str(workdir)]) == 2
    assert capsys.readouterr().err.startswith(f"wemmu train: {key}")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.md", "# Notes", r"is no config file; expected FILE\.py:STAGE"),
        ("a.py", "steps = 3", r"must define get_config\(stage\)"),
        ("a.py", "def get_config(stage:", "SyntaxError: .*line 1"),
        ("a.py", "import no_such_module", "ModuleNotFoundError: .*no_such_module"),
        ("a.py", "def get_config(): pass", "TypeError: get_config"),
        ("a.py", "def get_config(stage): return {}", r"must return a ConfigDict, found \{\}"),
    ],
    ids=["markdown", "no function", "syntax", "import", "no stage", "no config"],
)
def test_a_file_that_is_no_config(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(f"{tmp_path / name}:stage1")
    assert str(error.value).startswith(str(tmp_path / name))


def test_no_such_file_or_stage():
    with pytest.raises(FileNotFoundError, match=r"configs/wemmu_4b\.py"):
        config_of("stage1", "wemmu_4b")
    with pytest.raises(ValueError, match=r"no stage 'stage5'.*stage1"):
        config_of("stage5")
    with pytest.raises(ValueError, match="no stage ''"):
        load_config("configs/wemmu_3b.py")


def test_the_base_has_no_steps_of_its_own():
    with pytest.raises(ValueError, match="does not fit in 0 steps"):
        Stage.from_config(base_config())
