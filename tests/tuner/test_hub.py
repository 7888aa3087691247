"""Adapters pushed to a Hub and loaded back from it.

`huggingface_hub` reads its endpoint when it is imported, so the clients are two processes that read it anew. They share
nothing but the server. What they computed comes back in files, and the tests compare that and what lies on the server.
"""

import importlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from processes import run_function

BASE, BASE_BF16 = "tester/base", "tester/base-bf16"
PUSHED, PUSHED_BF16 = "tester/adapter", "tester/adapter-bf16"
TRAINED = "tester/trained"
UPLOADED = "tester/uploaded"
NATIVE = "tester/native"
GRADES = "tester/grades"
ADAPTERS = (PUSHED, PUSHED_BF16, TRAINED, UPLOADED)
SECOND = "blocks"
IMPORT = "import lreg_peft"
PARTS = ("projection.weight", "projection.bias", "coefficients.weight", "encoder.nodes")

# In bfloat16 the neighbours 0.9 and 0.9005 become 0.8984 and 0.9023, and 1/3 becomes 0.3340.
MESH = torch.tensor([[0, 0.3, 0.9, 0.9005, 1], [0, 1 / 3, 0.5, 0.75, 1]])
SECOND_MESH = torch.tensor([[0, 0.1, 1]] * 3)

# Every way to load an adapter.
WAYS = ("PeftModel", "AutoPeftModelForCausalLM", "load_adapter", "AutoModelForCausalLM")


@dataclass
class Hub:
    """The server after both clients are done, and what they computed."""

    server: HubServer
    published: dict[str, Any]
    loaded: dict[str, Any]

    def tensors(self, path: str, repo_id: str) -> dict[str, torch.Tensor]:
        return safetensors.torch.load(self.server.read(repo_id, path))

    def card(self, repo_id: str) -> str:
        return self.server.read(repo_id, "README.md").decode()

    def card_data(self, repo_id: str, folder: Path) -> ModelCardData:
        """Metadata of the card, read as the Hub reads it."""
        path = folder / "README.md"
        path.write_text(self.card(repo_id), encoding="utf-8")
        return ModelCardData(**metadata_load(path))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(folder / "server") as server:
        published = _run_client("publish", server, folder)
        loaded = _run_client("load", server, folder)
        yield Hub(server, published, loaded)


def _run_client(task: str, server: HubServer, folder: Path) -> dict[str, Any]:
    environment = {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": TOKEN,
        # One per client: an empty cache makes the second download what the first one pushed.
        "HF_HOME": str(folder / f"home-{task}"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    results = folder / f"{task}.pt"
    try:
        run_function(_client, task, results, environment)
    except AssertionError as error:
        pytest.fail(
            f"the client {task!r} failed. Requests that the server does not know: {server.unknown}\n{error}",
            pytrace=False,
        )
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_the_same_after_the_round_trip(hub: Hub, way: str):
    expected = hub.published["logits"][PUSHED]
    assert torch.equal(hub.loaded["logits"][f"{PUSHED} {way}"], expected)
    # The comparison says something: the adapter is no identity.
    assert not torch.allclose(hub.published["logits"][BASE], expected, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_the_same_on_a_bfloat16_base(hub: Hub, way: str):
    expected = hub.published["logits"][PUSHED_BF16]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(hub.loaded["logits"][f"{PUSHED_BF16} {way}"], expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("repo_id", [PUSHED, PUSHED_BF16])
def test_moved_nodes_survive_exactly(hub: Hub, repo_id: str, way: str):
    nodes = hub.loaded["nodes"][f"{repo_id} {way}"]
    assert nodes.dtype == torch.float32
    assert torch.equal(nodes, MESH)


def test_a_second_adapter_travels_in_its_own_folder(hub: Hub):
    key = f"{PUSHED} {SECOND}"
    assert torch.equal(hub.loaded["nodes"][key], SECOND_MESH)
    assert torch.equal(hub.loaded["logits"][key], hub.published["logits"][key])
    assert not torch.equal(hub.published["logits"][key], hub.published["logits"][PUSHED])


def test_a_stack_of_grades_loads_back(hub: Hub):
    assert torch.equal(hub.loaded["logits"][GRADES], hub.published["logits"][GRADES])
    assert torch.equal(hub.loaded["logits"][f"{GRADES} default"], hub.published["logits"][f"{GRADES} default"])
    assert not torch.equal(hub.published["logits"][GRADES], hub.published["logits"][f"{GRADES} default"])
    assert 'lreg_peft.load_grades(base_model, "' in hub.card(GRADES)
    assert "load_grades" not in hub.card(PUSHED)


@pytest.mark.parametrize("repo_id", [TRAINED, UPLOADED])
def test_adapters_from_trainer_and_from_a_folder_load_back(hub: Hub, repo_id: str):
    assert torch.equal(hub.loaded["logits"][repo_id], hub.published["logits"][repo_id])
    assert torch.equal(hub.loaded["nodes"][repo_id], MESH)


@pytest.mark.parametrize("repo_id", ADAPTERS)
def test_the_file_holds_the_adapter_and_nothing_else(hub: Hub, repo_id: str):
    prefix = "base_model.model.lm_head.lreg_"
    tensors = hub.tensors("adapter_model.safetensors", repo_id)
    assert set(tensors) == {f"{prefix}{name}" for name in PARTS}
    assert tensors[f"{prefix}encoder.nodes"].dtype == torch.float32
    assert torch.equal(tensors[f"{prefix}encoder.nodes"], MESH)


def test_the_second_adapter_has_only_its_own_tensors(hub: Hub):
    tensors = hub.tensors(f"{SECOND}/adapter_model.safetensors", PUSHED)
    assert set(tensors) == {
        f"base_model.model.transformer.h.{block}.mlp.lreg_{name}" for block in range(2) for name in PARTS
    }


@pytest.mark.parametrize("repo_id", ADAPTERS)
def test_no_file_of_the_base_model_is_pushed(hub: Hub, repo_id: str):
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    if repo_id == PUSHED:
        own |= {f"{SECOND}/adapter_config.json", f"{SECOND}/adapter_model.safetensors"}
    if repo_id == TRAINED:
        own.add("training_args.bin")
    assert set(hub.server.files(repo_id)) == own


def test_configuration_survives(hub: Hub):
    loaded = hub.loaded["config"]
    assert loaded == hub.published["config"]
    assert loaded["peft_type"] == "LREG" and loaded["base_model_name_or_path"] == BASE
    assert hub.loaded["config_class"] == "lreg_peft.tuner.config.LRegConfig"


@pytest.mark.parametrize("repo_id", [PUSHED, UPLOADED, TRAINED, NATIVE])
def test_card_has_the_tag_and_the_base_model(hub: Hub, tmp_path: Path, repo_id: str):
    data = hub.card_data(repo_id, tmp_path)
    assert "lreg" in data.tags
    assert data.base_model == BASE
    assert data["library_name"] == "peft"


@pytest.mark.parametrize("repo_id", [PUSHED, UPLOADED, TRAINED, NATIVE])
def test_card_has_the_import_line_once(hub: Hub, repo_id: str):
    assert hub.card(repo_id).count(IMPORT) == 1


def test_pushing_again_keeps_the_card(hub: Hub):
    first, last = (hub.published["commits"][step] for step in ("upload", "push"))
    assert first != last
    for path, changes in (("README.md", False), ("adapter_model.safetensors", True)):
        contents = {hub.server.read(UPLOADED, path, revision) for revision in (first, last)}
        assert (len(contents) == 2) == changes


# The clients


def _publish() -> dict[str, Any]:
    from huggingface_hub import HfApi
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    import lreg_peft
    from lreg_peft.tuner.model_card import push_model_card

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    base.push_to_hub(BASE)
    logits = {BASE: _logits(base)}
    base.to(torch.bfloat16).push_to_hub(BASE_BF16)

    def adapted(base_id: str) -> PeftModel:
        config = lreg_peft.LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=MESH.shape[1], init_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_id), config).eval()
        _set_nodes(model, "default", MESH)
        return model

    bf16 = adapted(BASE_BF16)
    bf16.push_to_hub(PUSHED_BF16)
    logits[PUSHED_BF16] = _logits(bf16)

    model = adapted(BASE)
    blocks = {"n_components": SECOND_MESH.shape[0], "n_nodes": SECOND_MESH.shape[1], "target_modules": ["mlp"]}
    model.add_adapter(SECOND, lreg_peft.LRegConfig(preset="paper", task_type="CAUSAL_LM", init_weights=False, **blocks))
    _set_nodes(model, SECOND, SECOND_MESH)
    model.push_to_hub(PUSHED)
    push_model_card(model, PUSHED)
    logits[PUSHED] = _logits(model)
    config = {**_plain(model.peft_config["default"]), "inference_mode": True}  # so set by PEFT in what it saves
    model.set_adapter(SECOND)
    logits[f"{PUSHED} {SECOND}"] = _logits(model)

    stack = adapted(BASE)
    logits[f"{GRADES} default"] = _logits(stack)
    grade = lreg_peft.add_grade(stack, form="composed")
    with torch.no_grad():
        _layers(stack)[0].lreg_coefficients[grade].weight.normal_()
    stack.push_to_hub(GRADES)
    push_model_card(stack, GRADES)
    logits[GRADES] = _logits(stack)

    native = AutoModelForCausalLM.from_pretrained(BASE)
    native.add_adapter(lreg_peft.LRegConfig(preset="paper", task_type="CAUSAL_LM"))
    native.push_to_hub(NATIVE)
    for _ in range(2):  # the second call finds nothing left to add
        push_model_card(native, NATIVE)

    # A folder with PEFT's own card. Transformers keeps a card that is on the Hub when the model is pushed again.
    model = adapted(BASE)
    model.save_pretrained("folder")
    HfApi().create_repo(UPLOADED)
    commits = {"upload": HfApi().upload_folder(repo_id=UPLOADED, folder_path="folder").oid}
    with torch.no_grad():
        _layers(model)[0].lreg_projection["default"].bias.add_(0.5)
    commits["push"] = model.push_to_hub(UPLOADED).oid
    logits[UPLOADED] = _logits(model)

    arguments = TrainingArguments(
        "trainer",
        hub_model_id=TRAINED,
        max_steps=2,
        learning_rate=0.1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    sample = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    model = adapted(BASE)
    trainer = Trainer(model, arguments, train_dataset=[sample] * 4)
    trainer.train()
    trainer.push_to_hub()
    push_model_card(model, TRAINED)
    logits[TRAINED] = _logits(model.eval())
    return {"logits": logits, "config": config, "commits": commits}


def _load() -> dict[str, Any]:
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    import lreg_peft

    logits, nodes = {}, {}

    def keep(key: str, model: torch.nn.Module) -> None:
        logits[key] = _logits(model.eval())
        layer = _layers(model)[0]
        nodes[key] = layer.lreg_encoder[layer.active_adapters[0]].nodes

    for base_id, repo_id in ((BASE, PUSHED), (BASE_BF16, PUSHED_BF16)):
        base = AutoModelForCausalLM.from_pretrained(base_id)
        keep(f"{repo_id} PeftModel", PeftModel.from_pretrained(base, repo_id))
        keep(f"{repo_id} AutoPeftModelForCausalLM", AutoPeftModelForCausalLM.from_pretrained(repo_id))
        native = AutoModelForCausalLM.from_pretrained(base_id)
        native.load_adapter(repo_id)
        keep(f"{repo_id} load_adapter", native)
        keep(f"{repo_id} AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained(repo_id))
    base = AutoModelForCausalLM.from_pretrained(BASE)
    keep(f"{PUSHED} {SECOND}", PeftModel.from_pretrained(base, PUSHED, subfolder=SECOND))
    stack = lreg_peft.load_grades(AutoModelForCausalLM.from_pretrained(BASE), GRADES)
    keep(GRADES, stack)
    stack.set_adapter("default")
    keep(f"{GRADES} default", stack)
    for repo_id in (TRAINED, UPLOADED):
        keep(repo_id, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo_id))
    config = PeftConfig.from_pretrained(PUSHED)
    config_class = f"{type(config).__module__}.{type(config).__name__}"
    return {"logits": logits, "nodes": nodes, "config": _plain(config), "config_class": config_class}


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def _layers(model: torch.nn.Module) -> list[Any]:
    from lreg_peft import LRegLayer

    return [module for module in model.modules() if isinstance(module, LRegLayer)]


def _set_nodes(model: torch.nn.Module, adapter_name: str, nodes: torch.Tensor) -> None:
    for layer in _layers(model):
        if adapter_name in layer.lreg_encoder:
            layer.lreg_encoder[adapter_name].nodes.copy_(nodes)


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON keeps it."""
    return json.loads(json.dumps(config.to_dict()))


def _client(task: str, results: Path, environment: dict[str, str]) -> None:
    # Nothing of the user's own Hub settings gets in, above all neither a token nor a cache.
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT  # behind the functions of the Hub
    os.chdir(results.parent)
    # PEFT reports tensors that a file lacks, or has in excess, as a UserWarning.
    warnings.simplefilter("error", UserWarning)
    torch.save({"publish": _publish, "load": _load}[task](), results)
