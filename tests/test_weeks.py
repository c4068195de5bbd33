"""The weeks' scripts at the smoke preset, what they say to wrong input, and the promises that the reference
runs must keep.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import pytest

from shared import commandline
from shared.adapters import load_adapter
from shared.course import report, workspace
from shared.data import shards
from shared.models.gpt import GPT
from shared.quantization import quantize
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.ranking import holds_answer
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT

WEEKS = workspace.weeks()
LADDER = WEEKS[:6]  # they train the model; from week 7 on something is done to it
REFERENCE = ROOT / "logs"
TEXT = {"09_lora": "text", "11_rag": "text"}
"""What a week calls the text its model is trained on, where `data` is something else."""


@pytest.fixture
def refuses(output, monkeypatch, capsys):
    """Starts a week's script from the command line: it must end in one line that has `words`, and log
    nothing.
    """

    def start(topic, arguments, words):
        module = report.load_script(topic)
        monkeypatch.setattr("sys.argv", ["run.py", "--preset", "smoke", *arguments])
        with pytest.raises(SystemExit) as stop:
            commandline.cli(module.main, module.PRESETS, module.__doc__)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and lines[-1].startswith("error: ") and words in lines[-1]
        assert not (output / "logs" / topic).exists()

    return start


@pytest.fixture
def text_file(tmp_path):
    """A small text of its own, so that nothing is fetched."""
    path = tmp_path / "rhyme.txt"
    path.write_text(
        "Round about the cauldron go;\nIn the poison'd entrails throw.\nToad, that under cold stone\n" * 200
    )
    return str(path)


def script(topic, preset="smoke", **changes):
    module = report.load_script(topic)
    return module, replace(module.PRESETS[preset], **changes)


def assert_picture(path):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 200 and pixels[..., :3].std() > 0.01, (
        f"{path} is blank"
    )


@pytest.mark.parametrize("topic", WEEKS)
def test_smoke_run_writes_logs_metrics_and_plots(topic, output, text_file):
    module, settings = script(topic, **{TEXT.get(topic, "data"): text_file})
    metrics = module.main(settings)
    logs = output / "logs" / topic / "mine" / "smoke" / "rhyme.txt"
    week = json.loads((logs / "week.json").read_text())
    assert week["preset"] == "smoke" and week["data"] == "rhyme.txt"
    assert metrics and all(math.isfinite(v) for v in metrics.values())
    if topic in (*LADDER, "07_amp"):
        first = metrics.get("first_loss", metrics.get("first_loss_scaled"))
        vocabulary = metrics.get("vocab_size") or len(set((output / "rhyme.txt").read_text()))
        assert abs(first - math.log(vocabulary)) < 0.1
    assert ("bits_per_byte" in metrics) == (topic in LADDER)  # what the ladder shows
    runs = report.read_runs(logs)
    assert runs and all(r.run["state"] == "finished" and r.summary for r in runs.values())
    plots = list((output / "reports" / topic / "mine").glob("*.png"))
    assert len(plots) >= 2
    for plot in plots:
        assert_picture(plot)


@pytest.mark.parametrize("topic", [w for w in WEEKS if w != "01_bigram"])
def test_studies_run(topic, output, text_file):
    module, settings = script(topic, **{TEXT.get(topic, "data"): text_file})
    studies = {
        "02_mlp": ["window"],
        "03_attention": [],
        "04_mini_gpt": ["speedrun", "ablation", "seeds", "cache"],
        "05_bpe": ["vocab"],
        "06_gpt2": ["shape", "cost", "smollm2"],
        "07_amp": ["batch", "profile"],
        "08_quantization": ["smollm2"],
        "09_lora": ["compare"],
        "10_ppo_dpo": ["frontier", "hacking", "smollm2"],
        "11_rag": ["answers", "windows", "index", "own"],
        "12_deploy": ["smollm2", "smollm2-programs"],
    }[topic]
    if "cache" in studies:  # reads the headline's checkpoint
        module.main(settings)
    logs, before = output / "logs" / topic / "mine" / "smoke" / "rhyme.txt", set()
    for study in studies:
        module.main(replace(settings, study=study))
        runs = report.read_runs(logs)
        assert runs.keys() > before and all(r.run["state"] == "finished" and r.summary for r in runs.values())
        before = runs.keys()


@pytest.mark.parametrize("topic", ["04_mini_gpt", "10_ppo_dpo"])
def test_resuming_a_finished_week_changes_nothing(topic, output, text_file):
    module, settings = script(topic, data=text_file)
    once = module.main(settings)
    again = module.main(replace(settings, resume=True))
    same = [k for k in once if k not in ("train_seconds", "wall_seconds")]
    assert {k: once[k] for k in same} == {k: again[k] for k in same}


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_week_10_goes_on_where_it_was_interrupted(method, output, text_file, monkeypatch):
    module, settings = script("10_ppo_dpo", data=text_file)
    whole, measure, seen = module.main(settings), module.measure_policy, []

    def interrupted(policy, start, settings, log=None):
        seen.append(log)
        if (
            len(seen) == 1 + 3 * ["ppo", "grpo", "dpo"].index(method) + 2
        ):  # the base, three of each method before, this one's second
            raise KeyboardInterrupt
        return measure(policy, start, settings, log)

    policies = sys.modules["weeks.10_ppo_dpo.policies"]  # where the methods' runs look it up
    monkeypatch.setattr(module, "measure_policy", interrupted)
    monkeypatch.setattr(policies, "measure_policy", interrupted)
    for path in (output / "checkpoints" / "10_ppo_dpo").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        module.main(settings)
    logs = output / "logs" / "10_ppo_dpo" / "mine" / "smoke" / "rhyme.txt"
    assert report.read_runs(logs)[method].run["state"] == "interrupted"
    monkeypatch.setattr(module, "measure_policy", measure)
    monkeypatch.setattr(policies, "measure_policy", measure)
    assert module.main(replace(settings, resume=True)) == whole


def test_week_10_without_preferences_says_so(output, text_file):
    module, settings = script("10_ppo_dpo", data=text_file, min_words=99)
    with pytest.raises(ValueError, match="answers that score alike, so there is no preference to learn from"):
        module.main(settings)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rows=9), "rows=9: must be even"),
        (dict(mark="ab"), "mark='ab'"),
        (dict(answers=1), "answers=1: must be at least 2"),
        (dict(dpo_betas=(0.0,)), "dpo_betas: betas must be above 0"),
    ],
)
def test_week_10_refuses_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        script("10_ppo_dpo", **changes)


WRONG = {
    "unknown preset": (["--preset", "huge"], "no preset is called 'huge'"),
    "unknown setting": (["--preset", "smoke", "--train.lrr", "1"], "--train.lrr"),
    "a value of another type": (["--preset", "smoke", "--train.steps", "many"], "--train.steps"),
    "a value out of range": (["--preset", "smoke", "--train.lr", "-1"], "lr=-1.0"),
    "a seed out of range": (["--preset", "smoke", "--train.seed", "-5"], "seed -5"),
    "unknown data": (["--preset", "smoke", "--data", "moby-dick"], "moby-dick"),
    "unknown device": (["--preset", "smoke", "--device", "abacus"], "abacus"),
    "an empty text": (["--preset", "smoke", "--data", "EMPTY"], "is empty"),
    "a block longer than the text": (["--preset", "smoke", "--data", "SHORT"], "block_size"),
    "a text that is not UTF-8": (["--preset", "smoke", "--data", "LATIN"], "not UTF-8"),
}


@pytest.mark.parametrize("topic", WEEKS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_and_leaves_nothing(topic, case, output, tmp_path, monkeypatch, capsys):
    arguments, words = WRONG[case]
    if topic in TEXT:  # `data` is another thing
        arguments = [a.replace("--data", f"--{TEXT[topic]}") for a in arguments]
    if topic == "09_lora":  # no group `train`
        *arguments, words = (a.replace("--train.", "--") for a in (*arguments, words))
    files = {"EMPTY": b" \n", "SHORT": b"to be or not", "LATIN": "café au lait ".encode("latin-1") * 50}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    arguments = [str(tmp_path / a) if a in files else a for a in arguments]
    module = report.load_script(topic)
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        commandline.cli(module.main, module.PRESETS, module.__doc__)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not (output / "logs").exists() and not (output / "checkpoints").exists()


def test_week_6_takes_the_flags_that_people_know():
    module = report.load_script("06_gpt2")
    flags = [
        "--preset",
        "smoke",
        "--compile_model=True",
        "--dtype=bfloat16",
        "--grad_accum_steps=8",
        "--n_layer=3",
        "--lr",
        "1e-4",
    ]
    settings = commandline.parse(module.PRESETS, flags)
    assert (
        settings.compile_model,
        settings.dtype,
        settings.train.grad_accum_steps,
        settings.model.n_layer,
    ) == (True, "bfloat16", 8, 3)
    assert settings.train.lr == 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_run_week_6_and_only_the_first_speaks(parallel, output, text_file):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "weeks" / "06_gpt2" / "run.py"),
    ]
    flags = [
        "--preset",
        "smoke",
        "--device",
        "cpu",
        "--data",
        text_file,
        "--parallel",
        parallel,
        "--dtype=bfloat16",
        "--steps=4",
    ]
    done = subprocess.run(
        command + flags,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2, over gloo") == 1 and done.stdout.count("hardware: ") == 1
    assert (output / "logs" / "06_gpt2" / "mine" / "smoke" / "rhyme.txt" / "week.json").exists()


def test_week_6_trains_on_shards(output, tmp_path):
    documents = [
        f"Line {i}: toil and trouble, fire burn and cauldron bubble, number {i * i}.\n" * 5 for i in range(60)
    ]
    tokenizer = BPETokenizer.train("".join(documents), 300, special_tokens=[END_OF_TEXT])
    (tmp_path / "documents.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents))
    shards.build(
        shards.ShardConfig(
            str(tmp_path / "documents.txt"),
            str(tmp_path / "shards"),
            val_tokens=500,
            shard_tokens=2000,
            workers=1,
        ),
        tokenizer,
    )
    module, settings = script("06_gpt2", data=str(tmp_path / "shards"))
    assert module.main(settings)["vocab_size"] == tokenizer.vocab_size


def test_week_6_without_its_shards_says_how_to_make_them(monkeypatch, tmp_path, capsys):
    module = report.load_script("06_gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="python -m shared.data.shards --source fineweb-edu --out data/fineweb-edu"
    ):
        module.main(replace(module.PRESETS["gpu"], device="cpu"))


WRONG_IN_WEEK_9 = {
    "a broken line": (["--data", "BROKEN"], "line 2: expected an object with"),
    "no such file": (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    "one example only": (["--data", "ONE"], "cannot be split"),
    "nothing fits": (["--block-size", "20"], "no training example fits into a context of 20 tokens"),
    "targets that are not there": (
        ["--adapter.target-modules", "query"],
        "no linear layer is called 'query'; there are: down_proj, ",
    ),
    "a rank of 0": (["--adapter.r", "0"], "r=0: must be at least 1"),
    "an unknown scheme": (["--method", "qlora", "--scheme", "int3"], "int3"),
    "a prompt that fills the context": (["--method", "prompt", "--virtual-tokens", "256"], "256"),
    "no such model": (["--model", "nothing-here"], "there is no model 'nothing-here'"),
    "a row that is none": (["--compared", "lora-x"], "'lora-x' is none of"),
}


@pytest.mark.parametrize("case", WRONG_IN_WEEK_9)
def test_week_9_says_what_is_wrong(case, refuses, text_file, tmp_path):
    arguments, words = WRONG_IN_WEEK_9[case]
    one = '{"prompt": "Who?", "response": "I."}\n'
    for name, content in {"BROKEN": one + '{"question": "Who?"}\n', "ONE": one}.items():
        (tmp_path / name).write_text(content)
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    refuses("09_lora", ["--text", text_file, *arguments], words)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "prompt"])
def test_week_9_resumes_and_keeps_what_can_be_loaded(method, output, text_file, tmp_path):
    data = tmp_path / "talks.jsonl"
    data.write_text(
        "".join(
            json.dumps({"instruction": f"Who is {n}?", "output": "Toad, that under cold stone."}) + "\n"
            for n in range(20)
        )
    )
    module, settings = script("09_lora", text=text_file, data=str(data), method=method, steps=4)
    once = module.main(settings)
    again = module.main(replace(settings, resume=True))
    assert {k: v for k, v in once.items() if "second" not in k and "memory" not in k} == {
        k: v for k, v in again.items() if "second" not in k and "memory" not in k
    }
    folder = output / "checkpoints" / "09_lora" / "smoke" / "rhyme.txt" / settings.run
    steps = report.load_script("09_lora", "fine_tuning")
    base, corpus = steps.load_base(settings)
    if method == "qlora":
        base = quantize(base, settings.scheme)
    if method == "full":
        model = GPT.from_checkpoint(folder / "model")
    else:
        model = load_adapter(folder / "adapter", base)
    perplexity = steps.text_perplexity(model.eval(), corpus, settings)
    assert perplexity == pytest.approx(once["text_perplexity"], rel=1e-5)


def test_week_9_goes_on_with_a_checkpoint_of_its_own(output, text_file):
    module, settings = script("09_lora", text=text_file, method="full", steps=3)
    first = module.main(settings)
    folder = output / "checkpoints" / "09_lora" / "smoke" / "rhyme.txt" / "course-full" / "model"
    second = module.main(replace(settings, model=str(folder), method="lora"))
    assert second["base_loss"] == pytest.approx(first["best_val_loss"], rel=1e-5)
    assert (
        output
        / "checkpoints"
        / "09_lora"
        / "smoke"
        / "rhyme.txt"
        / "model-lora-8"
        / "adapter"
        / "adapter_config.json"
    ).exists()


WRONG_IN_WEEK_11 = {
    "no such folder": (["--data", "nowhere", "--ask", "Who?"], "nowhere does not exist: give a folder"),
    "an empty folder": (["--data", "EMPTY", "--ask", "Who?"], "has no files in it: put documents there"),
    "nothing that can be read": (
        ["--data", "BINARY", "--ask", "Who?"],
        "no document that can be read: noise.txt: it is",
    ),
    "a folder without known answers": (["--data", "GOOD"], "no questions with known answers on"),
    "an unknown store": (
        ["--store", "shelf"],
        "no store is called 'shelf'; there are: flat, ivf, hnsw, pq, qdrant",
    ),
    "no questions": (["--questions", "0"], "questions=0: must be at least 1"),
    "chunks that only overlap": (
        ["--size", "20", "--overlap", "20"],
        "chunks of 20 tokens with 20 of overlap",
    ),
    "pq learns from too little": (["--data", "GOOD", "--store", "pq", "--ask", "Who?"], "too few: use flat"),
    "no question": (["--data", "GOOD", "--ask", " "], "a search needs a question"),
}


@pytest.fixture
def folders(tmp_path):
    """Documents in a folder each: none, one that is noise, one that can be read among such."""
    for name in ("EMPTY", "BINARY", "GOOD"):
        (tmp_path / name).mkdir()
    for name in ("BINARY", "GOOD"):
        (tmp_path / name / "noise.txt").write_bytes(bytes(range(256)))
    (tmp_path / "GOOD" / "boats.md").write_text(
        "# Boats\n\nThe captain of the green boat is Basil Thornquist.\n"
    )
    return tmp_path


@pytest.mark.parametrize("case", WRONG_IN_WEEK_11)
def test_week_11_says_what_is_wrong(case, refuses, text_file, folders):
    arguments, words = WRONG_IN_WEEK_11[case]
    arguments = [str(folders / a) if a.isupper() else a for a in arguments]
    refuses("11_rag", ["--text", text_file, *arguments], words)


@pytest.mark.parametrize("store", ["flat", "qdrant"])
def test_week_11_answers_from_a_folder_and_names_what_it_leaves_out(store, output, folders, capsys):
    module, settings = script(
        "11_rag",
        data=str(folders / "GOOD"),
        ask="Who is the captain of the green boat?",
        store=store,
        max_new_tokens=16,
    )
    module.main(settings)
    said = capsys.readouterr().out
    assert "left out: noise.txt: it is" in said and "1 added" in said
    assert "Basil Thornquist" in said and said.endswith("\n  [1] boats.md\n")
    (folders / "GOOD" / "boats.md").write_text("# Boats\n\nThe captain of the green boat is Edmund Molloy.\n")
    module.main(settings)  # the index is kept, and what changed is changed in it
    said = capsys.readouterr().out
    assert "0 added, 1 changed" in said and "Edmund Molloy" in said


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(output, monkeypatch, capsys, text_file):
    module = report.load_script("04_mini_gpt")
    monkeypatch.setattr(
        "sys.argv",
        [
            "run.py",
            "--preset",
            "smoke",
            "--data",
            text_file,
            "--train.lr",
            "1e30",
            "--train.optimizer",
            "adamw",
        ],
    )
    with pytest.raises(SystemExit) as stop:
        commandline.cli(module.main, module.PRESETS, module.__doc__)
    assert stop.value.code == 2 and "is not finite" in capsys.readouterr().err.strip().splitlines()[-1]


def test_week_6s_studies_take_a_text_where_the_preset_has_shards(monkeypatch, capsys):
    module = report.load_script("06_gpt2")
    monkeypatch.setattr(module, "read_text", lambda name: (name, "text"))
    assert module.study_text(module.PRESETS["gpu"]) == ("tinyshakespeare", "text")
    assert "shards, which hold no text" in capsys.readouterr().out
    assert module.study_text(module.PRESETS["laptop"])[0] == module.PRESETS["laptop"].data


def test_week_11_refuses_an_index_of_another_model(output, folders, text_file):
    module, settings = script(
        "11_rag",
        data=str(folders / "GOOD"),
        ask="Who?",
        text=text_file,
        index=str(folders / "index"),
        max_new_tokens=2,
    )
    module.main(settings)
    with pytest.raises(
        ValueError,
        match=r"made with the embedder all-MiniLM-L6-v2 \(384 numbers\), and cannot be searched with week 6",
    ):
        module.main(replace(settings, embedder="own"))
    before = {path.name: path.read_bytes() for path in (folders / "index").iterdir()}
    (folders / "GOOD" / "boats.md").write_text("# Boats\n\nThere are none.\n")
    with pytest.raises(ValueError, match="is kept in flat, not hnsw: choose that store, or another folder"):
        module.main(replace(settings, store="hnsw"))
    assert before == {path.name: path.read_bytes() for path in (folders / "index").iterdir()}


def test_week_11_keeps_a_section_of_pythons_reference_once(tmp_path):
    from pydoc_data.topics import topics

    week = report.load_script("11_rag", "library")
    week.write_python_reference(tmp_path)
    documents = load_documents(tmp_path).documents
    texts = [tuple(s.text.split()) for d in documents for s in d.sections]
    assert len(set(texts)) == len(texts) and len(documents) > 0.9 * len(topics)
    chunks = chunk_documents(documents, gpt2_tokenizer())
    asked, _ = week.read_questions("python", chunks)
    library = week.Library("python", chunks, None, asked, [])
    assert len(asked) >= 40 and all(holds_answer(library.right(q).text, q["answers"]) for q in asked)


def test_resuming_on_another_text_is_refused(output, tmp_path, text_file):
    module, settings = script("01_bigram", data=text_file)
    module.main(settings)
    (tmp_path / "rhyme.txt").write_text("0123456789 " * 400)
    with pytest.raises(ValueError, match="tokenizer"):
        module.main(replace(settings, resume=True))


# ---- what the committed reference runs must show


def reference(topic, data="tinyshakespeare"):
    return json.loads((REFERENCE / topic / "reference" / data / "week.json").read_text())["metrics"]


@pytest.mark.parametrize("data", ["tinyshakespeare", "shakespeare"])
def test_bits_per_byte_fall_every_week(data):
    ladder = [reference(t, data)["bits_per_byte"] for t in LADDER]
    assert ladder == sorted(ladder, reverse=True) and len(set(ladder)) == len(ladder)


def test_week_1_network_learns_the_table_that_counting_gives():
    metrics = reference("01_bigram")
    assert abs(metrics["network_minus_counts"]) < 0.01
    assert abs(metrics["first_loss"] - metrics["ln_vocab_size"]) < 0.05


def test_week_2_first_values_matter():
    metrics = reference("02_mlp")
    assert (
        abs(metrics["first_loss_scaled"] - math.log(65)) < 0.05 < metrics["first_loss_naive"] - math.log(65)
    )


def test_week_3_attention_beats_the_window_at_equal_parameters():
    metrics = reference("03_attention")
    assert 0 <= metrics["parameters"] - metrics["window_mlp_parameters"] < 500
    assert metrics["val_loss"] < metrics["window_mlp_val_loss"]


def test_week_4_headline_and_speedrun():
    runs = report.read_runs(REFERENCE / "04_mini_gpt" / "reference" / "tinyshakespeare")
    headline = [r.summary for n, r in runs.items() if n == "headline" or n.startswith("seed-")]
    assert len(headline) == 3 and len({s["steps"] for s in headline}) == 1
    assert all(s["best_val_loss"] <= 1.53 for s in headline)
    assert all(s["wall_seconds"] <= 300 for s in headline)
    assert runs["speedrun"].summary["ratio"] >= 5


def test_week_6_trains_in_five_minutes_and_reads_what_others_trained():
    assert reference("06_gpt2")["wall_seconds"] <= 300
    runs = {
        name: run.summary
        for name, run in report.read_runs(REFERENCE / "06_gpt2" / "reference" / "tinyshakespeare").items()
    }
    kept, recomputed = runs["cost-float32"], runs["cost-float32-recomputed"]
    assert recomputed["first_loss"] == kept["first_loss"] and recomputed["last_loss"] == pytest.approx(
        kept["last_loss"], abs=1e-4
    )
    assert (
        recomputed["kept_gigabytes"] < kept["kept_gigabytes"] / 3
        and recomputed["gigabytes"] < kept["gigabytes"]
    )
    smol = runs["smollm2"]
    assert (
        abs(smol["piqa_acc_norm"] - 0.669) < 2 * smol["piqa_acc_norm_error"]
    )  # as published, on all examples


@pytest.mark.parametrize("data", ["tinyshakespeare", "shakespeare"])
def test_week_7_measures_every_format_and_trick_and_the_loss_stays(data):
    runs = {
        name: run.summary for name, run in report.read_runs(REFERENCE / "07_amp" / "reference" / data).items()
    }
    formats = {name: runs[f"format-{name}"] for name in ("fp32", "bf16", "fp16")}
    ladder = [name for name, _ in report.load_script("07_amp").LADDER]
    rows = {name: runs[f"ladder-{name.replace(' ', '-')}"] for name in ladder}
    assert all(
        0 < row["mfu"] < 1 and row["bytes"] > 0 and row["tokens_per_second"] > 0
        for row in (*formats.values(), *rows.values())
    )
    for row in (
        *formats.values(),
        *(rows[name] for name in ladder if name not in ("larger batch", "gradient checkpointing")),
    ):
        assert abs(row["loss"] - formats["fp32"]["loss"]) < row["spread"]  # less than the seeds differ by
    assert (
        abs(rows["gradient checkpointing"]["loss"] - rows["larger batch"]["loss"])
        < rows["larger batch"]["spread"]
    )
    assert rows["gradient checkpointing"]["bytes"] < rows["larger batch"]["bytes"]
    metrics = reference("07_amp", data)
    assert metrics["bf16_units"] or metrics["bf16_time_over_fp32"] > 1


def test_week_8_is_small_good_and_fast_on_a_real_model():
    runs = report.read_runs(REFERENCE / "08_quantization" / "reference" / "tinyshakespeare")
    smol = {
        name.removeprefix("smollm2-"): run.summary
        for name, run in runs.items()
        if name.startswith("smollm2-")
    }
    assert smol["int8-groups"]["of_fp32"] <= 0.27 and smol["int8-groups"]["worse"] <= 0.005
    assert smol["int4"]["of_fp32"] <= 0.16 and smol["int4"]["worse"] <= 0.08
    # The small text's model loses so little that chance decides (its figures are in the log): the larger
    # one's is held to the promise.
    large = report.read_runs(REFERENCE / "08_quantization" / "reference" / "shakespeare")
    assert all(
        row["recovered"] >= 0.5
        for row in (smol["int4-gptq"], large["int4-gptq"].summary, large["int4-wide-gptq"].summary)
    )
    assert smol["fp32"]["over_transformers"] >= 1.5 and smol["int8"]["over_transformers"] >= 2.5
    assert all(row["decode_tokens_per_second"] < row["memory_limit"] for row in smol.values())
    assert {"bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"} <= smol.keys()


@pytest.mark.parametrize("data", ["tinyshakespeare", "shakespeare"])
def test_week_10_all_three_methods_earn_more_and_stay_readable(data):
    logs = REFERENCE / "10_ppo_dpo" / "reference" / data
    runs = {name: run.summary for name, run in report.read_runs(logs).items()}
    assert runs["reward"]["held_out_accuracy"] - 2 * runs["reward"]["held_out_accuracy_error"] > 0.9
    assert (
        len({runs[method]["policy_backward_tokens"] for method in ("ppo", "grpo", "dpo")}) == 1
    )  # the same budget
    for row in (runs[method] for method in ("ppo", "grpo", "dpo")):
        assert row["reward"] - runs["base"]["reward"] > 10 * math.hypot(
            row["reward_error"], runs["base"]["reward_error"]
        )
        assert (
            0 < row["kl_error"] < 0.03 * row["kl"] and row["known_words"] > runs["base"]["known_words"] - 0.05
        )


def test_week_10_takes_less_than_five_minutes():
    for text in ("tinyshakespeare", "shakespeare"):
        assert (
            json.loads((REFERENCE / "10_ppo_dpo" / "reference" / text / "week.json").read_text())["seconds"]
            <= 300
        )


def test_week_10_studies_show_the_frontier_the_hacking_and_a_model_that_is_brief():
    runs = {
        name: run.summary
        for name, run in report.read_runs(REFERENCE / "10_ppo_dpo" / "reference" / "tinyshakespeare").items()
    }
    for method in ("ppo", "grpo", "dpo"):
        betas = sorted(
            (row for name, row in runs.items() if name == method or name.startswith(f"{method}-")),
            key=lambda row: row["beta"],
        )
        assert len(betas) >= 3 and [row["kl"] for row in betas] == sorted(
            (row["kl"] for row in betas), reverse=True
        )
    held, free = runs["hacking-held"], runs["hacking-free"]
    assert (
        free["learned"] > held["learned"] and free["reward"] < held["reward"] / 2
    )  # the proxy rises, and what was meant falls
    assert free["kl"] > 3 * held["kl"] and free["known_words"] < held["known_words"] - 0.1
    smol = runs["smollm2"]
    assert (
        smol["after_length"] < 0.75 * smol["before_length"]
        and smol["after_short"] > smol["before_short"] + 0.25
    )


def test_week_11_finds_and_answers_from_what_it_found():
    logs = REFERENCE / "11_rag" / "reference" / "tinyshakespeare"
    runs = {name: run.summary for name, run in report.read_runs(logs).items()}
    assert runs["handbook-find-dense"]["questions"] == 160 and runs["python-find-dense"]["questions"] >= 40
    assert runs["handbook-find-dense"]["recall@5"] >= 0.95
    assert (
        0.9 <= runs["handbook-windows"]["recall@5"] <= runs["handbook-find-dense"]["recall@5"]
    )  # windows chosen on other questions: a little less
    assert (
        runs["handbook-find-own"]["recall@5"]
        < runs["handbook-find-bm25"]["recall@5"]
        < runs["handbook-find-dense"]["recall@5"]
    )
    for data in ("handbook", "python"):
        for measure in ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"):
            assert all(
                run[f"{measure}_low"] <= run[measure] <= run[f"{measure}_high"]
                for n, run in runs.items()
                if n.startswith(f"{data}-find-")
            )
    without, retrieved, right = (
        runs[f"handbook-all-answer-{name}"] for name in ("without", "retrieved", "right")
    )
    assert (
        without["questions"] == 160
        and runs["handbook-all-abstain"]["unanswerable"] == 40
        and runs["handbook-all-swaps"]["swaps"] == 30
    )
    for measure in ("exact", "f1", "holds"):
        assert retrieved[measure] >= 5 * without[measure] and retrieved[measure] >= right[measure] - 0.15
    assert json.loads((logs / "week.json").read_text())["seconds"] <= 300


def test_week_11_studies_show_what_an_index_costs_and_what_a_small_model_learns():
    runs = {
        name: run.summary
        for name, run in report.read_runs(REFERENCE / "11_rag" / "reference" / "tinyshakespeare").items()
    }
    assert runs["index-flat"]["vectors"] >= 100_000 and runs["index-flat"]["recall"] == 1
    for kind, efforts in report.load_script("11_rag", "names").EFFORTS.items():
        recalls = [runs[f"index-{kind}-{effort}"]["recall"] for effort in efforts if effort]
        assert recalls == sorted(recalls) and (not recalls or recalls[-1] > 0.95)
    assert (
        runs["index-pq"]["bytes"] < runs["index-flat"]["bytes"] / 10
        and runs["index-ivf-16"]["milliseconds"] < runs["index-flat"]["milliseconds"]
    )
    own = {name: runs[f"handbook-own-{name}"] for name in ("untrained", "right", "rule", "smollm2")}
    assert (
        own["right"]["kind"] > own["untrained"]["kind"] + 0.1
    )  # it learns what kind of answer is wanted, and hardly to read
    assert own["right"]["f1"] < own["rule"]["f1"] < own["smollm2"]["f1"]


def test_week_9_teaches_a_form_with_few_numbers():
    runs = {
        name: run.summary
        for name, run in report.read_runs(REFERENCE / "09_lora" / "reference" / "tinyshakespeare").items()
    }
    rows = ("full", "lora-2", "lora-8", "lora-32", "qlora-nf4-8", "dora-8", "prompt-16")
    assert {f"{model}-{row}" for model in ("course", "smollm2") for row in rows} <= runs.keys()
    assert all(row["best_val_loss"] < row["base_loss"] - 0.5 for row in runs.values())
    for model, qlora in (
        ("course", "qlora-nf4-8"),
        ("smollm2", "qlora-int8-8"),
    ):  # SmolLM2's file has 4 bits already: NF4 would round twice
        assert runs[f"{model}-{qlora}"]["best_val_loss"] <= 1.02 * runs[f"{model}-lora-8"]["best_val_loss"]
    assert all(
        runs[f"{model}-lora-8"]["in_form"] >= 0.9 and runs[f"{model}-lora-8"]["in_form_before"] == 0
        for model in ("course", "smollm2")
    )
    assert runs["course-lora-8"]["share_trainable"] < 0.1 and runs["smollm2-lora-8"]["share_trainable"] < 0.02


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(shared_tokens=31), "shared_tokens=31: must be at least 32"),
        (dict(new_tokens=1), "new_tokens=1: must be at least 2"),
        (dict(rounds=0), "rounds=0"),
    ],
)
def test_week_12_refuses_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        script("12_deploy", **changes)


def test_week_12_serves_many_at_once_and_other_programs_write_the_same():
    logs = REFERENCE / "12_deploy" / "reference" / "tinyshakespeare"
    runs = {name: run.summary for name, run in report.read_runs(logs).items()}
    for name in ("own", "smollm2", "smollm2-int8"):
        row = runs[name]
        assert row["at_once"] == 8 and row["ratio"] >= 2.5 and row["many"] > row["one"]
        assert row["first_p50"] <= row["first_p95"] and row["between_p50"] <= row["between_p95"]
        assert row["reused"] < row["fresh"] / 2
    for name in ("own", "smollm2"):
        assert runs[f"{name}-alone"]["same"] == runs[f"{name}-alone"]["texts"] == 8
        for program in ("pytorch", "transformers", "onnx", "llama.cpp-F32"):
            assert runs[f"{name}-{program}"]["alike"] == runs[f"{name}-{program}"]["new_tokens"] == 64, (
                name,
                program,
            )
    assert runs["slots"]["four_slots"] < runs["slots"]["one_slot"]
    assert json.loads((logs / "week.json").read_text())["seconds"] <= 240


@pytest.mark.parametrize("path", report.documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_in_prose_come_from_the_logs(path):
    text = path.read_text(encoding="utf-8")
    assert report.refill(text) == text, (
        f"{path.relative_to(ROOT)} is not what the logs say: run python -m shared.course.report"
    )


@pytest.mark.parametrize("text", ["tinyshakespeare", "shakespeare"])
@pytest.mark.parametrize("topic", ["06_gpt2", "08_quantization", "09_lora", "10_ppo_dpo"])
def test_model_cards_are_what_the_logs_say(topic, text, tmp_path):
    week = report.load_script(topic)
    logs, settings = REFERENCE / topic / "reference" / text, week.PRESETS["laptop"]
    kept = ROOT / "checkpoints" / topic / "laptop" / text
    card = {
        "06_gpt2": lambda: week.write_base_card(report.read_runs(logs)["gpt2"], text, tmp_path),
        "08_quantization": lambda: week.write_card(logs, tmp_path, settings.scheme, kept / settings.scheme),
        "09_lora": lambda: week.write_adapter_card(logs, tmp_path, settings, kept / settings.run / "adapter"),
        "10_ppo_dpo": lambda: week.write_aligned_card(logs, tmp_path, settings, kept / settings.keep),
    }[topic]()
    committed = ROOT / "reports" / topic / ("" if text == "tinyshakespeare" else text) / "model_card.md"
    assert card.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
