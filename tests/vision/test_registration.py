"""The Auto classes know the V-MoE whatever was imported first; ``import lit_moe`` stays light."""

import subprocess
import sys

import pytest

from lit_moe.testing.vision import tiny_vmoe

AFTER = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "lit_moe.vmoe.configuration"
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert type(model).__module__ == "lit_moe.vmoe.modeling", type(model)
assert type(AutoModel.from_pretrained(sys.argv[1])).__name__ == "VMoEModel"
"""
ORDERS = {
    "lit_moe alone": "import lit_moe, sys\nassert not {'torch', 'transformers'} & set(sys.modules)",
    "auto classes first": "from transformers import AutoModelForCausalLM\nimport lit_moe",
    "auto config first": "from transformers import AutoConfig\nimport lit_moe",
    "vit after lit_moe": "import lit_moe\nfrom transformers import ViTConfig",
    "our config": "import lit_moe.vmoe.configuration",
    "our model": "import lit_moe.vmoe.modeling",
    "the trainer": "import lit_moe.module",
    "torchmetrics": "import lit_moe\nimport torchmetrics",
}
QUICK = ("lit_moe alone", "vit after lit_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_vmoe().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "order", [o if o in QUICK else pytest.param(o, marks=pytest.mark.slow) for o in ORDERS]
)
def test_auto_classes_know_it(order, folder):
    code = f"{ORDERS[order]}\n{AFTER}"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
