"""The card that PEFT saves beside an adapter also says how to load it."""

import tiny
from huggingface_hub import ModelCard


def saved_card(model, path) -> ModelCard:
    model.save_pretrained(path)
    return ModelCard.load(path / "README.md")


def test_it_says_how_to_load_the_adapter_once(tmp_path):
    model = tiny.adapt(tiny.gpt2(), target_modules=["mlp", "c_attn"], modules_to_save=["ln_f"], n_nodes=5)
    text = saved_card(model, tmp_path).text
    assert "base_model = ...  # the model that the adapter was trained on\n" in text
    assert 'model = PeftModel.from_pretrained(base_model, "' in text
    assert text.rstrip() == saved_card(model, tmp_path).text.rstrip()
    assert text.count("## How to load this adapter") == text.count("import lreg_peft") == 1
    assert saved_card(model, tmp_path).data.to_dict()["tags"].count("lreg") == 1


def test_the_card_of_a_named_adapter_lies_above_it(tmp_path):
    model = tiny.adapt(tiny.gpt2(), "mine", target_modules=["mlp"])
    assert "import lreg_peft" in saved_card(model, tmp_path).text
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


def test_a_card_of_others_in_the_folder_stays_as_it_is(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    before = (tmp_path / "README.md").read_text()
    tiny.adapt(tiny.gpt2(), target_modules=["mlp"]).peft_config["default"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_a_named_base_is(tmp_path):
    base = tiny.gpt2()
    base.name_or_path = base.config._name_or_path = "some/base"
    model = tiny.adapt(base, target_modules=["mlp"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or PEFT looks the base up on the Hub
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert "base_model = ...  # some/base\n" in card.text
    assert data["base_model"] == "some/base"
    assert "base_model:adapter:some/base" in data["tags"]


def test_a_card_that_somebody_wrote_stays_as_it_is(tmp_path):
    model = tiny.adapt(tiny.gpt2(), target_modules=["mlp"])
    card = saved_card(model, tmp_path)
    card.text += "\n## Data\n\nMy own.\n"
    card.save(tmp_path / "README.md")
    before = (tmp_path / "README.md").read_text().rstrip()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().rstrip() == before
