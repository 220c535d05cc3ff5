import pytest
import torch

from agentopd import models
from agentopd.config.load import load_run_config
from agentopd.errors import ConfigError
from agentopd.runs import _settled


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "float32"), ({"avx512_f": True, "avx512_bf16": False}, "float32"), ({"amx_bf16": True}, "bfloat16")],
)
def test_auto_is_bfloat16_only_where_the_cpu_computes_in_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.settle_dtype("auto") == expected
    assert models.load_model("micro/student", "auto").dtype == getattr(torch, expected)


def test_a_dtype_that_is_named_is_taken() -> None:
    assert [models.settle_dtype(name) for name in ("bfloat16", "float32")] == ["bfloat16", "float32"]


def test_a_run_records_the_dtype_it_computes_in() -> None:
    config = _settled(load_run_config("configs/quickstart.toml", []))
    assert {config.model.dtype, config.teachers["default"].dtype} == {models.settle_dtype("auto")}


def test_a_run_in_the_place_of_its_student_and_a_misspelt_alias_are_named(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run: its student is"):
        models.resolve_model(str(tmp_path))
    assert models.resolve_model(str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="did you mean 'micro/student'"):
        models.resolve_model("micro/studnt")
    assert models.resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
