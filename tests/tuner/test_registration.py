"""How PEFT comes to know the method, here and on other interpreters."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import mapping
from peft.utils.peft_types import PeftType
from processes import run_program

import lreg_peft
from lreg_peft.tuner import registration

SOURCE = Path(registration.__file__)


class TestMember:
    def test_behaves_like_one_from_the_class_body(self):
        member = PeftType.LREG
        assert isinstance(member, PeftType)
        assert isinstance(member, str)
        assert member == "LREG"
        assert (member.name, member.value) == ("LREG", "LREG")
        assert PeftType("LREG") is PeftType["LREG"] is member
        assert member in PeftType
        assert list(PeftType).count(member) == 1
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member
        assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "LREG"}
        assert repr(member) == repr(PeftType.LORA).replace("LORA", "LREG")
        assert hash(member) == hash("LREG")

    def test_the_others_are_untouched(self):
        assert PeftType("LORA") is PeftType.LORA
        assert PeftType.LORA is not PeftType.LREG
        with pytest.raises(ValueError, match="NOPE"):
            PeftType("NOPE")

    def test_adding_twice_gives_the_same_member(self):
        assert registration.add_enum_member(PeftType, "LREG") is PeftType.LREG
        assert list(PeftType).count("LREG") == 1

    def test_tables(self):
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LREG] is lreg_peft.LRegConfig
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LREG] is lreg_peft.LRegModel
        assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LREG] == "lreg_" == lreg_peft.LRegModel.prefix


# Plain Python: executes the module alone and exercises the enum, without torch or PEFT.
STANDALONE = """
import copy, enum, importlib.util, json, pickle, sys
spec = importlib.util.spec_from_file_location("registration", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Kind(str, enum.Enum):
    LORA = "LORA"
    OTHER = "OTHER"

member = module.add_enum_member(Kind, "LREG")
assert module.add_enum_member(Kind, "LREG") is member
assert Kind.LREG is Kind("LREG") is Kind["LREG"] is member
assert isinstance(member, Kind) and member == "LREG" and (member.name, member.value) == ("LREG", "LREG")
assert list(Kind) == ["LORA", "OTHER", "LREG"] and member in Kind and len(Kind) == 3
assert [m for m in reversed(Kind)][0] is member and "LREG" in Kind.__members__ and "LREG" in dir(Kind)
assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
assert all(pickle.loads(pickle.dumps(member, p)) is member for p in range(2, pickle.HIGHEST_PROTOCOL + 1))
assert json.dumps([member]) == '["LREG"]' and repr(member) == "<Kind.LREG: 'LREG'>"
assert Kind("LORA") is Kind.LORA and str(Kind.LORA).replace("LORA", "LREG") == str(member)
assert hash(member) == hash(Kind["LREG"]) and {member: 1}[Kind.LREG] == 1
print("fine on", sys.version.split()[0])
"""


def other_interpreters() -> list[str]:
    """Interpreters of 3.11 and later at hand, one of each version but the running one."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = sorted(pyenv.glob("3.*/bin/python"))
    candidates += [Path(p) for v in range(11, 20) if (p := shutil.which(f"python3.{v}"))]
    for path in candidates:
        try:
            version = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=20).stdout
        except OSError:
            continue
        match = re.match(r"Python 3\.(\d+)\.", version)  # a pyenv shim without its version prints none
        if match and int(match[1]) >= 11 and int(match[1]) != sys.version_info.minor:
            found.setdefault(int(match[1]), str(path))
    return list(found.values())


INTERPRETERS = other_interpreters()


class TestInterpreters:
    def test_this_one(self):
        assert "fine on" in run_program(STANDALONE, str(SOURCE))

    @pytest.mark.skipif(not INTERPRETERS, reason="no other interpreter of Python 3.11 or later at hand")
    @pytest.mark.parametrize("interpreter", INTERPRETERS)
    def test_others(self, interpreter):
        done = subprocess.run([interpreter, "-c", STANDALONE, str(SOURCE)], capture_output=True, text=True, timeout=120)
        assert "fine on" in done.stdout, done.stderr


class TestVersions:
    @pytest.mark.parametrize(("installed", "is_untested"), [("5.24.1", False), ("5.25.0", True), ("6.0.0.dev0", True)])
    def test_later_ones_than_tested_are_named(self, monkeypatch, installed, is_untested):
        versions = {"transformers": installed, "peft": "0.21.2"}
        monkeypatch.setattr(registration, "version", versions.get)
        monkeypatch.setattr(registration, "TESTED", {"transformers": (5, 24), "peft": (0, 21)})
        found = registration.untested_versions()
        assert found == ([f"transformers {installed} (tested: up to 5.24)"] if is_untested else [])

    def test_a_warning_says_so_once_and_registers_all_the_same(self, monkeypatch):
        monkeypatch.setattr(registration, "TESTED", {"transformers": (4, 0)})
        with pytest.warns(
            UserWarning, match=r"lreg_peft was tested with earlier versions than transformers .* \(tested: "
        ):
            assert registration.register(lreg_peft.LRegConfig, lreg_peft.LRegModel)


class TestImporting:
    def test_again_and_after_forgetting_the_modules(self):
        """A second import makes new classes; PEFT goes on with those, and adapters of before still work."""
        out = run_program(
            """
import importlib, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
import torch, lreg_peft
from peft import get_peft_model, mapping
from peft.utils.peft_types import PeftType

def adapt(config_class):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    return get_peft_model(net, config_class(target_modules=["0"]))

first, member = adapt(lreg_peft.LRegConfig), PeftType.LREG
importlib.reload(lreg_peft)
adapt(lreg_peft.LRegConfig)
for name in [name for name in sys.modules if name.partition(".")[0] == "lreg_peft"]:
    del sys.modules[name]
import lreg_peft as again
assert again.LRegConfig is not type(first.peft_config["default"])
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LREG] is again.LRegConfig
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LREG] is again.LRegModel
assert PeftType.LREG is member and list(PeftType).count("LREG") == 1
second = adapt(again.LRegConfig)
x = torch.randn(2, 3)
assert torch.isfinite(first(x)).all() and torch.isfinite(second(x)).all()
print("fine")
"""
        )
        assert out.strip() == "fine"

    def test_saved_adapter_without_the_import_names_the_method(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LREG", "target_modules": ["0"]}))
        out = run_program(
            """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
import lreg_peft
print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)
""",
            str(tmp_path),
        )
        assert "LREG" in out.splitlines()[0]
        assert out.splitlines()[-1] == "LRegConfig"

    def test_steps_aside_for_a_peft_with_its_own_lreg(self):
        out = run_program(
            """
import warnings
from dataclasses import dataclass
import peft
from peft import PeftConfig, mapping
from peft.tuners.lora import LoraModel
from peft.utils import peft_types, register_peft_method
import importlib.util, sys

# As a release of PEFT would have it: the member, and classes from a module of PEFT.
spec = importlib.util.find_spec("lreg_peft")
source = spec.origin.replace("__init__.py", "tuner/registration.py")
loader = importlib.util.spec_from_file_location("somewhere_else", source)
module = importlib.util.module_from_spec(loader)
loader.loader.exec_module(module)
module.add_enum_member(peft_types.PeftType, "LREG")

@dataclass
class LRegConfig(PeftConfig):
    pass

class LRegModel(LoraModel):
    prefix = "lreg_"

LRegConfig.__module__ = LRegModel.__module__ = "peft.tuners.lreg"
register_peft_method(name="lreg", config_cls=LRegConfig, model_cls=LRegModel)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lreg_peft
assert [w for w in caught if "ships its own LREG" in str(w.message)], [str(w.message) for w in caught]
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_types.PeftType.LREG] is LRegConfig
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_types.PeftType.LREG] is LRegModel
try:
    lreg_peft.LRegConfig(preset="paper")
except RuntimeError as error:
    assert "Use peft.LRegConfig" in str(error)
else:
    raise AssertionError("our configuration would have been run by PEFT's tuner")
print("fine")
"""
        )
        assert out.strip() == "fine"
