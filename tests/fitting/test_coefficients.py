"""Certified fits of terminal shortcuts: that they reach the optimum of the model's own loss, and what they refuse."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from peft import get_peft_model
from processes import run_on_two
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lreg_peft import FeatureCache, LRegConfig, cache_features, fit_coefficients
from lreg_peft.fitting.output_layer import find_output_layer

RIDGE = 1e-3
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])


def token_batches(n=3, seed=0):
    """Batches with padding and ignored labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(3, tiny.VOCABULARY, (6, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, :3] = -100
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sequence_batches(labels):
    for batch in token_batches():
        yield {**batch, "labels": labels}


def adapted(model, target=None, **options):
    options = {"n_nodes": 4, "n_components": 3, **options}
    torch.manual_seed(5)  # of the projection
    model = get_peft_model(
        model, LRegConfig(preset="paper", target_modules=[target] if target else None, **options)
    ).train()
    spread(model)
    return model


def spread(model):
    """Meshes that are not uniform."""
    for layer in tiny.layers(model):
        for encoder in layer.lreg_encoder.values():
            encoder.nodes.pow_(1.3)


def sequences(kind, labels, **options):
    return (
        lambda **more: adapted(tiny.build(kind, "SEQ_CLS", **options), "classifier", **more),
        lambda: list(sequence_batches(labels)),
    )


MODELS = {
    "causal": (lambda **more: adapted(tiny.gpt2(), **more), lambda: list(token_batches())),
    "masked": (lambda **more: adapted(tiny.build("bert", "MASKED_LM"), **more), lambda: list(token_batches())),
    "tokens": (
        lambda **more: adapted(tiny.build("bert", "TOKEN_CLS", num_labels=tiny.VOCABULARY), "classifier", **more),
        lambda: list(token_batches()),
    ),
    "sequences": sequences("roberta", CLASSES, num_labels=3),
    "labels": sequences(
        "bert", torch.eye(3)[CLASSES] + torch.eye(3)[0], num_labels=3, problem_type="multi_label_classification"
    ),
    "one label": sequences(
        "bert", (CLASSES > 0).float().unsqueeze(1), num_labels=1, problem_type="multi_label_classification"
    ),
    "value": sequences("roberta", CLASSES.float(), num_labels=1),
    "values": sequences("bert", torch.eye(2)[CLASSES % 2], num_labels=2, problem_type="regression"),
}
MODELS["labels"] = (
    MODELS["labels"][0],
    lambda: list(sequence_batches((torch.eye(3)[CLASSES] + torch.eye(3)[0]).clamp_max(1))),
)


def weights_of(layer, adapter="default"):
    return list(layer.lreg_coefficients[adapter].parameters())


def own_objective(model, batches, ridge=RIDGE):
    """The model's own mean loss over all labels, and the ridge: a tensor with a graph."""
    model.eval()
    total = count = 0
    for batch in batches:
        labels = batch["labels"]
        if labels.ndim == 2 and labels.shape == batch["input_ids"].shape:
            shifted = labels[:, 1:] if model.config.model_type == "gpt2" else labels
            n = int((shifted != -100).sum())
        else:
            n = len(labels)
        total, count = total + model(**batch).loss * n, count + n
    (layer,) = tiny.layers(model)
    weights = weights_of(layer)
    return total / count + ridge / 2 * sum(weight.square().sum() for weight in weights), count


@pytest.mark.parametrize("name", MODELS)
def test_the_optimum_of_the_models_own_loss(name):
    """The gradient of the loss that the model itself computes certifies the fit once more."""
    build, batches = MODELS[name]
    model = build()
    fit = fit_coefficients(model, batches(), ridge=RIDGE, tolerance=1e-7, show_progress=False)
    assert fit.status == "converged" and fit.gap <= 1e-7
    objective, count = own_objective(model, batches())
    assert fit.n_rows == count
    assert fit.objective == pytest.approx(objective.item(), rel=2e-6)  # the model sums in fp32
    gradient = torch.autograd.grad(objective, weights_of(tiny.layers(model)[0]))
    # Twice the gap of the fit, and the square of fp32's rounding of a gradient of terms of order one.
    assert parameters_to_vector(gradient).square().sum().item() / (2 * RIDGE) <= 2e-7 + (1e-6) ** 2 / RIDGE


@pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
@pytest.mark.parametrize("name", ["causal", "value"])
def test_every_head_ends_where_gradient_descent_would(weighting, name):
    build, batches = MODELS[name]
    model = build(weighting=weighting)
    (encoder,) = (layer.lreg_encoder["default"] for layer in tiny.layers(model))
    profile = [p.clone() for p in encoder.parameters()]
    fit = fit_coefficients(model, batches(), ridge=RIDGE, tolerance=1e-7, show_progress=False)
    weights = weights_of(tiny.layers(model)[0])
    best = own_objective(model, batches())[0].item()
    assert fit.objective == pytest.approx(best, rel=2e-6)
    fitted = parameters_to_vector(weights).detach().clone()
    for seed in range(3):
        direction = torch.randn(fitted.shape, generator=torch.Generator().manual_seed(seed))
        for size in (-0.1, 0.1):
            vector_to_parameters(fitted + size * direction, weights)
            assert own_objective(model, batches())[0].item() > best
    assert all(map(torch.equal, profile, encoder.parameters()))


def test_a_fit_after_training_begins_there():
    build, batches = MODELS["causal"]
    model = build()
    cold = fit_coefficients(model, batches(), ridge=RIDGE, show_progress=False)
    again = fit_coefficients(model, batches(), ridge=RIDGE, show_progress=False)
    assert again.passes < cold.passes
    assert again.objective == cold.objective and again.iterations == 0


def test_other_active_adapters_belong_to_the_offset():
    build, batches = MODELS["causal"]
    model = build()
    model.add_adapter("second", LRegConfig(preset="paper", n_components=2, n_nodes=3))
    model.base_model.set_adapter(["default", "second"])
    fit = fit_coefficients(model, batches(), ridge=RIDGE, tolerance=1e-7, adapter_name="default", show_progress=False)
    second = fit_coefficients(model, batches(), ridge=RIDGE, tolerance=1e-7, adapter_name="second", show_progress=False)
    loss = own_objective(model, batches(), ridge=0)[0].item()
    first, other = (
        sum(weight.square().sum().item() for weight in weights_of(tiny.layers(model)[0], name))
        for name in ("default", "second")
    )
    assert second.objective == pytest.approx(loss + RIDGE / 2 * other, rel=2e-6)
    assert loss < fit.objective - RIDGE / 2 * first  # the second fitted what the first left


@pytest.mark.parametrize("name", ["causal", "sequences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_gives_the_same_fit(name, dtype, tmp_path, monkeypatch):
    """Wide outputs: the cache is read in every pass. Narrow ones: once."""
    build, batches = MODELS[name]
    model, other = build(), build()
    fit = fit_coefficients(model, iter(batches()), ridge=RIDGE, show_progress=False)  # read once
    cache = cache_features(other, batches(), tmp_path / "cache", dtype=dtype, show_progress=False)
    reads = []
    original = FeatureCache.chunks
    monkeypatch.setattr(FeatureCache, "chunks", lambda self, rows: reads.append(rows) or original(self, rows))
    from_cache = fit_coefficients(other, cache, ridge=RIDGE, show_progress=False)
    assert len(reads) == (1 + from_cache.passes if name == "causal" else 1)
    assert from_cache.n_rows == fit.n_rows
    same = {"abs": 1e-6} if dtype == torch.float32 else {"rel": 1e-2}  # features have two digits in bf16
    assert from_cache.objective == pytest.approx(fit.objective, **same)


def test_memory_per_pass_is_bounded_for_a_large_vocabulary():
    """Offsets of a wide output are made for a few rows at a time."""
    vocabulary, parts = 20_000, list(token_batches())
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    model = adapted(tiny.gpt2(vocab_size=vocabulary))
    seen = []
    head = tiny.layers(model)[0].get_base_layer()
    head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with pytest.warns(RuntimeWarning, match="raise max_passes"):
        fit_coefficients(model, [batch], ridge=RIDGE, max_passes=3, show_progress=False)
    assert seen[:2] == [(18, 12, vocabulary), (180, vocabulary)]  # the batch, in full and in rows
    assert {rows for rows, _ in seen[2:]} == {128, 180 - 128}


def test_the_model_keeps_its_modes_and_its_frozen_part():
    build, batches = MODELS["sequences"]
    model = build()
    before = tiny.state(model)
    modes = [module.training for module in model.modules()]
    fit_coefficients(model, batches(), show_progress=False)
    after = tiny.state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert [name.split(".")[-3] for name in changed] == ["lreg_coefficients"]
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_progress_shows_the_gap(capsys):
    build, batches = MODELS["sequences"]
    fit_coefficients(build(), batches())
    assert "gap=" in capsys.readouterr().err


def nan_features(model):
    tiny.layers(model)[0].get_base_layer()
    next(model.get_base_model().parameters()).data[3:].fill_(torch.nan)


REFUSED = {
    "the data hold no labels": ({"data": []}, None),
    "ridge must be positive, got 0": ({"ridge": 0}, None),
    "ridge must be positive, got -1": ({"ridge": -1}, None),
    "tolerance must be positive": ({"tolerance": 0}, None),
    "max_passes must be at least 3": ({"max_passes": 1}, None),
    "no LReg adapter called 'other'": ({"adapter_name": "other"}, None),
    "must be finite": ({}, nan_features),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_fitted_is_refused_and_nothing_changes(message, case):
    options, spoil = case
    build, batches = MODELS["sequences"]
    model = build()
    if spoil:
        spoil(model)
    before = tiny.state(model)
    arguments = {"data": batches(), "show_progress": False, **options}
    with pytest.raises(ValueError, match=message):
        fit_coefficients(model, **arguments)
    after = tiny.state(model)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_labels_outside_the_classes_are_refused():
    build, _ = MODELS["sequences"]
    batches = [*sequence_batches(CLASSES), *sequence_batches(CLASSES + 1)]
    model = build()
    before = tiny.state(model)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\].*got 3"):
        fit_coefficients(model, batches, show_progress=False)
    assert tiny.same_state(before, tiny.state(model))


def test_shortcuts_inside_the_network_are_refused_with_the_reason():
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"]))
    with pytest.raises(ValueError, match="inside the network"):
        fit_coefficients(model, token_batches(), show_progress=False)
    with pytest.raises(ValueError, match="adapter_name"):
        fit_coefficients(tiny.gpt2(), token_batches(), show_progress=False)


def test_regression_needs_no_ridge():
    build, batches = MODELS["value"]
    fit = fit_coefficients(build(), batches(), ridge=0, show_progress=False)
    assert fit.status == "converged"


def test_a_missing_start_from_data_is_said():
    model = adapted(tiny.build("bert", "SEQ_CLS", num_labels=3), "classifier", init_weights="pca")
    with pytest.warns(UserWarning, match="initialize_lreg_weights"):
        fit_coefficients(model, sequence_batches(CLASSES), show_progress=False)


def test_not_reaching_the_tolerance_is_said():
    build, batches = MODELS["causal"]
    with pytest.warns(RuntimeWarning, match="raise max_passes"):
        fit = fit_coefficients(build(), batches(), max_passes=4, show_progress=False)
    assert fit.status == "iteration_limit" and fit.gap > 1e-6


def test_two_processes_end_with_the_same_weights(tmp_path):
    """Shares of different sizes, one of them empty in the end; and an error on one process is one on both."""
    run_on_two(_share, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("causal", "values", "sequences", "causal, stored"):
        assert torch.equal(first[name][0], second[name][0])
        assert first[name][1:] == second[name][1:]
        build, batches = MODELS[name.removesuffix(", stored")]
        alone = fit_coefficients(build(), batches(), ridge=RIDGE, show_progress=False)
        assert first[name][1] == pytest.approx(alone.objective, abs=1e-6)
        assert first[name][2] == alone.n_rows
    assert first["error"].startswith("process 0 stopped: labels must lie in [0, 2]")
    assert second["error"] == first["error"]


class Stored:
    """All rows, as every process finds them in a cache."""

    def __init__(self, model, batches):
        output = find_output_layer(model)
        self.rows = [output.rows(batch) for batch in batches]

    def chunks(self, rows_per_chunk):
        return self.rows


def _share(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    for name in ("causal", "values", "sequences"):
        build, batches = MODELS[name]
        share = {"causal": [[0, 2], [1]], "values": [[1], [0, 2]], "sequences": [[0, 1, 2], []]}[name][rank]
        model = build()
        fit = fit_coefficients(model, [batches()[i] for i in share], ridge=RIDGE, show_progress=False)
        results[name] = (tiny.layers(model)[0].table("default").detach(), fit.objective, fit.n_rows, fit.passes)
    model = MODELS["causal"][0]()
    fit = fit_coefficients(model, Stored(model, MODELS["causal"][1]()), ridge=RIDGE, show_progress=False)
    results["causal, stored"] = (tiny.layers(model)[0].table("default").detach(), fit.objective, fit.n_rows, fit.passes)
    try:
        fit_coefficients(MODELS["sequences"][0](), sequence_batches(CLASSES + 1 - rank), show_progress=False)
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
