"""The card that is saved beside an adapter says what is known, and nothing else."""

import tiny
from huggingface_hub import ModelCard

PLACEHOLDER = "[More Information Needed]"


def saved_card(model, path) -> ModelCard:
    model.save_pretrained(path)
    return ModelCard.load(path / "README.md")


def test_it_describes_the_adapter_and_keeps_no_empty_section(tmp_path):
    model = tiny.adapt(tiny.gpt2(), target_modules=["mlp", "c_attn"], modules_to_save=["ln_f"], dof=5)
    text = saved_card(model, tmp_path).text
    assert PLACEHOLDER not in text
    assert "<!--" not in text
    # (16 + 1) * 2 + 2 * 5 * 16 around an mlp and (16 + 1) * 2 + 2 * 5 * 48 around a c_attn, two of each.
    expected = "4 piecewise-linear shortcuts with 1,416 parameters around `mlp`, `c_attn`, and ln_f trained in full"
    assert expected in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# LReg adapter", "### Framework versions", "## How to load this adapter"]


def test_a_base_without_a_name_is_not_named(tmp_path):
    data = saved_card(tiny.adapt(tiny.gpt2(), target_modules=["mlp"]), tmp_path).data.to_dict()
    assert "base_model" not in data
    assert data["tags"] == ["lreg", "transformers"]


def test_a_named_base_is(tmp_path):
    base = tiny.gpt2()
    base.name_or_path = base.config._name_or_path = "some/base"
    model = tiny.adapt(base, target_modules=["mlp"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or PEFT looks the base up on the Hub
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "some/base"
    assert "base_model:adapter:some/base" in data["tags"]


def test_a_card_that_somebody_wrote_stays_as_it_is(tmp_path):
    model = tiny.adapt(tiny.gpt2(), target_modules=["mlp"])
    card = saved_card(model, tmp_path)
    card.text += f"\n## Data\n\nMy own.\n\n## Licence\n\n{PLACEHOLDER}\n"
    card.save(tmp_path / "README.md")
    before = (tmp_path / "README.md").read_text().rstrip()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().rstrip() == before
