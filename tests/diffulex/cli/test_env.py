"""`python -m diffulex env`."""

import pytest
import torch
import torch._inductor.config as inductor_config

import diffulex
from diffulex.cli import env
from diffulex.cli.main import main
from lowering.errors import ReasonCode
from lowering.inductor.identity import fingerprint


def facts(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in lines)}


def test_env_names_versions_device_hooks_and_caches(capsys):
    found = {name: value.strip() for name, value in facts(capsys).items()}
    assert diffulex.__version__ in found["diffulex"] and fingerprint()[:16] in found["diffulex"]
    assert found["torch"].startswith(torch.__version__)
    assert found["DIFFULEX_DISABLE"].startswith("False")
    assert found["Inductor pass"] == "installed"
    assert found["transformers hook"] == "registered as 'diffulex'"
    assert {"triton", "transformers", "generated kernels", "Inductor cache", "Triton cache"} <= found.keys()


def test_env_sees_that_the_pass_was_replaced(capsys):
    with inductor_config.patch(joint_custom_pre_pass=None):
        assert "not installed" in facts(capsys)["Inductor pass"]


def test_env_says_why_there_are_no_generated_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert env.generation_refusal().code is ReasonCode.NOT_CUDA
    with diffulex.disabled():
        assert env.generation_refusal().code is ReasonCode.DISABLED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_75" in str(env.generation_refusal())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert env.generation_refusal() is None


@pytest.mark.parametrize("package", ["torch", "no-such-package"])
def test_versions_are_found_without_importing(package):
    assert (env.version_of(package) == "not installed") == (package != "torch")
