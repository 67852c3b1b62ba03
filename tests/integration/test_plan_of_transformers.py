"""`plan --hf-config`: what Transformers describes is planned as Transformers builds it, without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from sharded_adamax import cli

TIED: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 64, "n_head": 2,
    "vocab_size": 500,
}  # fmt: skip
UNTIED: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("config", [TIED, UNTIED, {**UNTIED, "architectures": None}], ids=["tied", "untied", "no head"])
def test_a_config_is_planned_as_transformers_builds_it(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    build = transformers.AutoModelForCausalLM if config["architectures"] else transformers.AutoModel
    model = build.from_config(loaded)
    for argument in (path, tmp_path):
        assert cli.main(["plan", "--hf-config", str(argument), "--world-sizes", "2", "--json"]) == cli.WHOLE
        found = json.loads(capsys.readouterr().out)
        assert found["num_params"] == sum(param.numel() for param in model.parameters())
        assert found["plans"][0]["rows"][0]["ddp"]["parameters"] == sum(param.nbytes for param in model.parameters())


def test_a_config_of_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "absent"}')
    assert cli.main(["plan", "--hf-config", str(tmp_path)]) == cli.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: Transformers cannot use") and "absent" in captured.err
