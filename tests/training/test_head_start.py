"""The start of a classifier or regression head: at the optimum of frozen features where that pays, else left out."""

from itertools import product

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiers import slow
from torch import nn

from lreg_peft import LRegConfig, initialize_lreg_weights
from lreg_peft.training.head_start import RIDGES, start_head

INSIDE = {"bert": ["query", "dense"], "roberta": ["query", "intermediate.dense"], "gpt2": ["c_attn"]}


def adapted(model_type="bert", task="SEQ_CLS", dtype=torch.float32, **options):
    base = tiny.build(model_type, task, **options).to(dtype)
    config = LRegConfig(task_type=task, target_modules=INSIDE[model_type], n_nodes=4, init_weights="gradient")
    torch.manual_seed(0)
    return get_peft_model(base, config).eval()


def head(model):
    """The last linear layer of the head that is trained."""
    names = [n for n, m in model.named_modules() if "modules_to_save.default" in n and isinstance(m, nn.Linear)]
    return model.get_submodule(names[-1])


def texts(n_batches=4, batch=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_batches):
        ids = torch.randint(3, tiny.VOCABULARY, (batch, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 6:], ids[::3, 6:] = 0, tiny.SIZES["bert"]["pad_token_id"]
        yield {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def labelled(model, make, **options):
    """Batches whose labels are made of what the last linear layer sees, `[batch, width]`."""
    seen = []
    hook = head(model).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    batches = []
    for batch in texts(**options):
        model(**batch)
        features = seen[-1].float()
        if features.ndim == 3 and model.peft_config["default"].task_type != "TOKEN_CLS":
            features = features[torch.arange(len(features)), batch["attention_mask"].sum(1) - 1]
        batches.append({**batch, "labels": make(features)})
    hook.remove()
    return batches


def scores(features):
    return 3.5 + features[..., 0] - features[..., 1]


def thirds(features):
    return torch.bucketize(features[..., 0] - features[..., 1], torch.tensor([-0.5, 0.5]))


def yes_or_no(features):
    return (features[..., :3] > 0.2).float()


@torch.no_grad()
def loss_on(model, batches):
    return sum(model.eval()(**batch).loss.double().item() for batch in batches) / len(batches)


def start(model, batches, **options):
    return initialize_lreg_weights(model, batches, show_progress=False, **options)


REGRESSION = {"num_labels": 1, "problem_type": "regression"}
CLASSES = {"num_labels": 3, "problem_type": "single_label_classification"}
LABELS = {"num_labels": 3, "problem_type": "multi_label_classification"}
KINDS = {"regression": (REGRESSION, scores), "classes": (CLASSES, thirds), "labels": (LABELS, yes_or_no)}


FIRST = [("bert", "regression"), ("roberta", "classes"), ("gpt2", "labels")]


@pytest.mark.parametrize(
    ("model_type", "kind"), [*FIRST, *slow(*(pair for pair in product(INSIDE, KINDS) if pair not in FIRST))]
)
def test_lowers_the_loss_and_says_by_how_much(model_type, kind):
    """One linear layer, two of which the first stays, one without a bias that reads the last token."""
    options, make = KINDS[kind]
    model = adapted(model_type, **options)
    batches = labelled(model, make)
    others = {name: weight for name, weight in tiny.state(model).items() if "lreg" not in name}
    before = loss_on(model, batches)
    report = start(model, batches)
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(loss_on(model, batches), rel=1e-5, abs=1e-6)
    assert report.loss_after < report.heldout_after < report.loss_before
    assert report.ridge in RIDGES
    assert report.n_rows == 64
    # The certificate is about the penalised loss: an upper bound, and a small one.
    assert 0 <= report.gap < 2e-3 * max(before, 1)
    unseen = labelled(model, make, seed=9)
    assert loss_on(model, unseen) < loss_on(adapted(model_type, **options), unseen)
    changed = [name for name, weight in others.items() if not torch.equal(model.state_dict()[name], weight)]
    own = [id(parameter) for parameter in head(model).parameters()]
    assert {id(model.get_parameter(name)) for name in changed} == set(own)


def test_is_the_ridge_solution():
    """The weights of least squares, by the normal equations, on centred features with a free bias."""
    model = adapted(**REGRESSION)
    batches = labelled(model, scores)
    seen = []
    hook = head(model).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for batch in batches:
        model(**batch)
    hook.remove()
    x, made = (torch.cat(part).double() for part in zip(*seen, strict=True))
    report = start(model, batches)
    centred = x - x.mean(0)
    length = centred.square().sum(1).mean().sqrt()
    residual = torch.cat([batch["labels"] for batch in batches]).double().unsqueeze(1) - made
    design = torch.cat((centred / length, torch.full((len(x), 1), 10.0)), dim=1)
    gram = 2 * design.T @ design / len(x) + report.ridge * torch.eye(design.shape[1])
    expected = design @ torch.linalg.solve(gram, 2 * design.T @ residual / len(x)) + made
    with torch.no_grad():
        after = torch.cat([model(**batch).logits for batch in batches])
    # Rounding of the stored weights in fp32.
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-4)


def test_tokens_each_have_a_label():
    model = adapted(task="TOKEN_CLS", num_labels=3)

    def make(features):
        labels = thirds(features)
        labels[:, 0] = -100
        return labels

    batches = labelled(model, make)
    report = start(model, batches)
    assert report.n_rows == 64 * 8
    assert report.loss_after == pytest.approx(loss_on(model, batches), rel=1e-5, abs=1e-6)
    assert report.loss_after < report.heldout_after < report.loss_before - 0.1


def test_no_pass_is_added():
    model = adapted(**CLASSES)
    passes = []
    hook = model.get_base_model().bert.register_forward_hook(lambda *args: passes.append(1))
    batches = labelled(model, thirds)
    passes.clear()
    assert start(model, batches) is not None
    hook.remove()
    assert len(passes) == len(batches)
    assert not head(model)._forward_hooks


@pytest.mark.parametrize("options", [REGRESSION, CLASSES])
def test_noise_does_not_get_in(options):
    """Where labels have nothing to do with the features, what one half says is worse on the other, but for the mean."""
    model = adapted(**options)
    generator = torch.Generator().manual_seed(3)

    def make(features):
        if options is CLASSES:
            return torch.randint(3, (len(features),), generator=generator)
        return torch.randn(len(features), generator=generator)

    batches, unseen = labelled(model, make), labelled(model, make, seed=9, n_batches=16)
    before = loss_on(model, unseen)
    report = start(model, batches)
    # 64 labels: what they say of means and frequencies is right to some tenths.
    assert loss_on(model, unseen) < before + 0.2
    assert report.ridge is None or report.ridge >= 0.1


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_one_class_says_nothing_of_the_others(model_type):
    model = adapted(model_type, **CLASSES)
    batches = labelled(model, lambda features: torch.ones(len(features), dtype=torch.long))
    before = tiny.outputs(model)
    report = start(model, batches)
    assert report.ridge is None
    assert report.loss_after == report.heldout_after == report.loss_before
    assert torch.equal(tiny.outputs(model), before)


def test_constant_targets_go_into_the_bias():
    model = adapted(**REGRESSION)
    batches = labelled(model, lambda features: torch.full((len(features),), 700.0))
    report = start(model, batches)
    # A bias of 700 in one step; what is left is the spread of the head as it was, and a ridge of 1e-4.
    assert report.loss_after < 1e-4 * report.loss_before
    assert tiny.outputs(model) == pytest.approx(700, rel=1e-2)


@pytest.mark.parametrize("n", [2, 5])
def test_fewer_rows_than_features(n):
    model = adapted(**REGRESSION)
    batches = labelled(model, scores, n_batches=1, batch=n)
    report = start(model, batches)
    assert report.n_rows == n
    assert report.loss_after < report.loss_before
    assert loss_on(model, labelled(model, scores, seed=9)) < 20


def test_weights_in_half_precision():
    model = adapted(dtype=torch.bfloat16, **CLASSES)
    batches = labelled(model, thirds)
    report = start(model, batches)
    assert report.loss_after < report.heldout_after < report.loss_before
    assert head(model).weight.dtype == torch.bfloat16
    # The model rounds features, sums and logits to three digits.
    assert report.loss_after == pytest.approx(loss_on(model, batches), rel=3e-2)


def test_asked_not_to():
    model = adapted(**REGRESSION)
    batches = labelled(model, scores)
    before = tiny.outputs(model)
    assert start(model, batches, start_head=False) is None
    assert torch.equal(tiny.outputs(model), before)


class TestBadInput:
    @pytest.mark.parametrize("method", ["pca", "gradient"])
    def test_labels_that_are_no_numbers(self, method):
        model = adapted(**REGRESSION)
        batches = labelled(model, scores)
        batches[1]["labels"][3] = float("nan")
        before = tiny.state(model)
        with pytest.raises(ValueError, match=r"must be finite, got nan|labels of '.*classifier.*' must be finite"):
            start(model, batches, method=method)
        assert tiny.same_state(before, tiny.state(model))
        assert all("default" in layer.needs_data_init for layer in tiny.layers(model))

    def test_features_that_are_no_numbers(self):
        model = adapted(**CLASSES)
        batches = labelled(model, thirds)
        with torch.no_grad():
            model.get_base_model().bert.pooler.dense.bias[0] = float("inf")
            model.get_base_model().bert.pooler.activation = nn.Identity()
        before = tiny.state(model)
        with pytest.raises(ValueError, match=r"features of '.*classifier.*' must be finite, got NaN"):
            start(model, batches, method="pca")
        assert tiny.same_state(before, tiny.state(model))

    def test_without_labels_the_head_stays_unless_it_was_asked_for(self):
        model = adapted(**CLASSES)
        batches = list(texts())
        before = tiny.outputs(model)
        assert start(model, batches, method="pca") is None
        assert torch.equal(tiny.outputs(model), before)
        with pytest.raises(ValueError, match=r"start of '.*classifier.*' needs labels.*start_head=False"):
            start(model, batches, method="pca", start_head=True)

    def test_a_loss_of_another_kind(self):
        model = adapted(**CLASSES)
        inner = model.get_base_model()
        batches = labelled(model, thirds)

        def double(module, args, output):
            output.loss = None if output.loss is None else 2 * output.loss
            return output

        inner.register_forward_hook(double)
        before = tiny.state(model)
        with pytest.raises(ValueError, match=r"loss of BertForSequenceClassification is not the cross entropy"):
            start(model, batches, start_head=True)
        assert tiny.same_state(before, tiny.state(model))
        outputs = tiny.outputs(model)
        assert start(model, batches) is None
        assert torch.equal(tiny.outputs(model), outputs)

    def test_no_head(self):
        config = LRegConfig(target_modules=["query"], n_nodes=4)
        model = get_peft_model(tiny.build("bert", "SEQ_CLS", **CLASSES), config)
        batches = [{**batch, "labels": torch.arange(16) % 3} for batch in texts()]
        with pytest.raises(ValueError, match=r"start_head=True is about .* new head in modules_to_save"):
            start(model, batches, start_head=True)
        with pytest.raises(ValueError, match=r"no new head: name it in modules_to_save"):
            start_head(model, batches)


def test_for_other_adapters():
    """The same start for LoRA, in a pass of its own."""
    base = tiny.build("roberta", "SEQ_CLS", **REGRESSION)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    batches = labelled(model, scores)
    ours = adapted("roberta", **REGRESSION)
    expected = start(ours, batches)
    found = start_head(model, batches)
    assert (found.loss_after, found.ridge) == pytest.approx((expected.loss_after, expected.ridge), rel=1e-5)
    torch.testing.assert_close(tiny.outputs(model), tiny.outputs(ours), rtol=1e-4, atol=1e-4)
