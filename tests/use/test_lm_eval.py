"""lm-evaluation-harness runs its tasks on a compiled model, and scores it as it scores the original."""

import json
import os
from pathlib import Path

import pytest

import slim

lm_eval = pytest.importorskip("lm_eval")

ROWS = [
    {"context": "Once upon a time, there was a little", "choices": [" girl", " fish and the the"], "label": 0},
    {"context": "Lily and Tom went to the", "choices": [" park", " xyz qq"], "label": 0},
    {"context": "Tom was very", "choices": [" lll", " happy"], "label": 1},
]
TASKS = {
    "slim_choice": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "slim_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "slim_generate": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks over a local file; nothing of them comes from the network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", os.fspath(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
    for name, body in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{body}")
    return tmp_path


@pytest.mark.slow
def test_its_tasks_score_a_compiled_model_as_the_original(shared: Path, tasks: Path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        found = lm_eval.simple_evaluate(harness, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        texts = [sample["resps"] for sample in found["samples"]["slim_generate"]]
        return found["results"], texts

    found, texts = evaluate(slim.compile(directory, target="eager"))
    expected, expected_texts = evaluate(AutoModelForCausalLM.from_pretrained(directory))
    assert texts == expected_texts
    assert found["slim_choice"]["acc,none"] == expected["slim_choice"]["acc,none"] >= 2 / 3
    perplexity = "word_perplexity,none"
    assert found["slim_text"][perplexity] == pytest.approx(expected["slim_text"][perplexity], rel=1e-4)
