"""Linearised subspace refinement: exact where the problem is convex, never worse elsewhere, no side effects."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiers import slow
from tiny import adapt, build, gpt2, inputs, layers, roberta, same_state, shake, state, trainable
from torch import nn

from lreg_peft import LRegConfig, add_grade, refine_linearized
from lreg_peft.core import evaluate


class Net(nn.Module):
    """Two layers with dropout and batch norm in between; the first one is the place inside the network."""

    def __init__(self, out: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def regression(n_batches: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(40, 2, dtype=torch.float64, generator=generator) for _ in range(n_batches)]
    return [{"x": x, "labels": (2 * x[:, :1]).sin() * x[:, 1:]} for x in xs]


def adapted(targets="last", out: int = 1, **options):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(out).double(), LRegConfig(target_modules=[targets], n_components=3, n_nodes=5, **options)
    )
    shake(model)
    return model.eval()


def mean_loss(model, batches) -> float:
    with torch.no_grad():
        return torch.cat([(model(x=b["x"]) - b["labels"]).square() for b in batches]).mean().item()


def refine(model, batches, **options):
    return refine_linearized(model, batches, show_progress=False, **{"rank": 1000, "damping": 1e-12, **options})


class TestConvex:
    @pytest.mark.parametrize("weighting", ["full", "reduced"])
    def test_a_fixed_encoder_at_the_output_gives_least_squares(self, weighting):
        batches = regression()
        model = adapted(weighting=weighting, train_projection=False)
        (layer,) = layers(model)
        x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(x=x)
            rest = y - layer.base_layer(seen[0])
            basis = torch.eye(15, dtype=torch.float64).view(3, 5, 15)
            columns = evaluate(layer.coords("default", seen[0]), layer.lreg_encoder["default"].nodes, basis)
        solution = torch.linalg.lstsq(columns, rest, driver="gelsd").solution
        optimum = (columns @ solution - rest).square().mean().item()
        result = refine(model, batches)
        assert result.loss_before > 2 * optimum
        assert result.loss_after == pytest.approx(optimum, rel=1e-9)
        assert mean_loss(model, batches) == pytest.approx(optimum, rel=1e-9)
        assert [(step.factor, step.rank) for step in result.steps] == [(1.0, trainable(model))]

    def test_at_the_minimum_no_step_is_taken(self):
        model = adapted()
        batches = regression()
        with torch.no_grad():
            batches = [{"x": batch["x"], "labels": model(x=batch["x"])} for batch in batches]
        before = state(model)
        result = refine(model, batches, n_rounds=3)
        assert (result.status, result.steps) == ("no_descent", ())
        assert same_state(before, state(model))


def dense_gauss_newton(model, batches) -> torch.Tensor:
    """J^T H J of the mean cross-entropy, one output at a time, in reverse mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, n = 0, sum(len(batch["labels"]) for batch in batches)
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits  # [batch, classes]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)]).double()
            for value in logits.flatten()
        ]
        jacobian = torch.stack(rows).view(*logits.shape, -1)
        p = logits.detach().double().softmax(-1)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        total = total + torch.einsum("bip,bij,bjq->pq", jacobian, hessian, jacobian) / n
    return total


def classification() -> list[dict[str, torch.Tensor]]:
    batch = inputs("roberta")
    return [
        {**batch, "labels": torch.tensor([0, 1, 1])},
        {key: value[:2].flip(0) for key, value in batch.items()} | {"labels": torch.tensor([1, 0])},
    ]


class TestInsideANetwork:
    @pytest.mark.parametrize("n_nodes", [2, 8, 16])  # the last one is evaluated by another form outside of transforms
    @pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
    def test_the_step_is_that_of_the_dense_matrix(self, n_nodes, weighting):
        options = {"n_nodes": n_nodes, "weighting": weighting, "target_modules": ["layer.0.attention.self.query"]}
        model = adapt(roberta("SEQ_CLS"), n_components=1, **options)
        shake(model)
        model.eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = torch.cat([p.detach().flatten() for p in parameters]).double()
        matrix = dense_gauss_newton(model, classification())
        total = sum(model(**b).loss * len(b["labels"]) / 5 for b in classification())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]).double()
        result = refine(model, classification(), damping=0.1)
        damping = 0.1 * torch.linalg.eigvalsh(matrix)[-1]
        expected = -torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), gradient)
        step = torch.cat([p.detach().flatten() for p in parameters]).double() - before
        # The model computes in fp32.
        scaled = result.steps[0].factor * expected
        torch.testing.assert_close(step, scaled, rtol=0, atol=1e-3 * step.abs().max().item())


class TestDescent:
    @pytest.mark.parametrize(
        ("targets", "weighting"),
        [
            ("first", "full"),
            ("last", "factored"),
            *slow(("first", "reduced"), ("first", "factored"), ("last", "full"), ("last", "reduced")),
        ],
    )
    def test_the_loss_falls_from_round_to_round(self, weighting, targets):
        model = adapted(targets, weighting=weighting)
        batches = regression()
        result = refine(model, batches, n_rounds=4, damping=[1e-6, 1e-4, 1e-2])
        losses = [result.loss_before, *(step.loss for step in result.steps)]
        assert all(later < earlier for earlier, later in itertools.pairwise(losses))
        assert result.loss_after == losses[-1] < 0.8 * result.loss_before
        assert mean_loss(model, batches) == pytest.approx(result.loss_after, rel=1e-12)

    @pytest.mark.slow
    def test_it_goes_on_where_gradient_training_has_stalled(self):
        model, batches = adapted("first"), regression()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(150):
            for batch in batches:
                optimizer.zero_grad()
                (model(x=batch["x"]) - batch["labels"]).square().mean().backward()
                optimizer.step()
        result = refine(model, batches, n_rounds=5, damping=[1e-6, 1e-3])
        assert result.loss_after < 0.9 * result.loss_before

    def test_the_rank_is_chosen_on_held_out_data(self):
        model, train, held = adapted(), regression(2), regression(2, seed=9)
        before = state(model)
        result = refine(model, train, rank=[2, 5, 500], eval_data=held, damping=[1e-2, 1e-6])
        (only,) = result.steps
        alone = {}
        for rank, damping in itertools.product([2, 5, 500], [1e-6, 1e-2]):
            tried = refine(adapted(), train, rank=rank, eval_data=held, damping=damping)
            alone[min(rank, trainable(model)), damping] = tried.heldout_after
        assert (only.rank, only.damping) == min(alone, key=alone.get)
        assert mean_loss(model, held) == pytest.approx(result.heldout_after, rel=1e-12)
        assert mean_loss(model, train) == pytest.approx(result.loss_after, rel=1e-12)
        assert result.heldout_after < result.heldout_before
        assert not same_state(before, state(model))

    def test_batches_are_held_out_without_a_loader(self):
        batches = regression(7)
        result = refine(adapted(), batches, rank=[2, 4])
        model = adapted()
        assert result.heldout_before == pytest.approx(mean_loss(model, batches[4:5]))
        assert result.loss_before == pytest.approx(mean_loss(model, [*batches[:4], *batches[5:]]))

    def test_no_step_that_raises_the_held_out_loss(self):
        model, batches = adapted(), regression()
        with torch.no_grad():
            held = [{"x": batch["x"], "labels": model(x=batch["x"])} for batch in batches]  # fitted already
        before = state(model)
        result = refine(model, batches, eval_data=held, n_rounds=2)
        assert (result.status, result.steps) == ("heldout_rose", ())
        assert result.loss_after == result.loss_before
        assert same_state(before, state(model))

    def test_only_the_last_grade_moves(self):
        model = adapted()
        name = add_grade(model, form="composed")
        before = state(model)
        assert refine(model, regression(), damping=1e-6).status == "improved"
        changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
        assert changed
        assert all(name in key.split(".") for key in changed)


def causal() -> dict[str, torch.Tensor]:
    batch = inputs("gpt2")
    labels = batch["input_ids"].clone()
    labels[0, 4:] = -100
    return {**batch, "labels": labels}


class TestModels:
    @pytest.mark.parametrize(
        ("build_model", "options", "batch"),
        [
            (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["lm_head", "mlp"]}, causal),
            (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "init_weights": False}, causal),
            (lambda: roberta("SEQ_CLS"), {"task_type": "SEQ_CLS"}, lambda: classification()[0]),
            (
                lambda: roberta("SEQ_CLS", num_labels=1),
                {"target_modules": ["classifier"]},
                lambda: {**inputs("roberta"), "labels": torch.tensor([0.5, -1.0, 2.0])},
            ),
            (
                lambda: roberta("SEQ_CLS", num_labels=3, problem_type="multi_label_classification"),
                {"target_modules": ["classifier"]},
                lambda: {**inputs("roberta"), "labels": torch.eye(3)},
            ),
            (
                lambda: build("t5", "SEQ_2_SEQ_LM"),
                {"task_type": "SEQ_2_SEQ_LM"},
                lambda: {"input_ids": inputs("t5")["input_ids"], "labels": inputs("t5")["input_ids"].flip(1)},
            ),
            (
                lambda: build("vit", "IMAGE_CLS"),
                {"target_modules": ["classifier"]},
                lambda: {**inputs("vit"), "labels": torch.tensor([0, 1, 0])},
            ),
        ],
        ids=["causal", "attention", "modules_to_save", "regression", "multi_label", "seq2seq", "vision"],
    )
    def test_loss_is_the_models_own(self, build_model, options, batch):
        model = adapt(build_model(), n_nodes=4, **options)
        model.train()
        batch = batch()
        result = refine(model, [batch], rank=6, damping=1e-3)
        model.eval()
        with torch.no_grad():
            assert model(**batch).loss.item() == pytest.approx(result.loss_after, rel=1e-4)
        assert result.status == "improved"
        assert result.loss_after < result.loss_before

    def test_batches_count_by_their_rows(self):
        model = adapt(gpt2(), task_type="CAUSAL_LM", n_nodes=3)
        whole, unlabelled = causal(), {**causal(), "labels": torch.full((3, 9), -100)}
        parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 3))]
        one = refine(model, [whole], rank=3).loss_before
        model = adapt(gpt2(), task_type="CAUSAL_LM", n_nodes=3)
        assert refine(model, [*parts, unlabelled], rank=3).loss_before == pytest.approx(one, rel=1e-5)


class TestSideEffects:
    def test_modes_buffers_gradients_and_the_generator(self):
        model = adapted("first")
        model.train()
        model.get_base_model().norm.eval()
        model.get_base_model().drop.train()
        modes = [module.training for module in model.modules()]
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        trained = [p.requires_grad for p in model.parameters()]
        rng = torch.get_rng_state()
        refine(model, regression(), rank=5)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
        assert [p.requires_grad for p in model.parameters()] == trained
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), rng)

    def test_dropout_is_off(self):
        losses = set()
        for mode in (True, False):
            model = adapted()
            model.get_base_model().drop.train(mode)
            losses.add(refine(model, regression(), rank=5).loss_after)
        assert len(losses) == 1

    def test_an_error_in_the_second_round_leaves_everything(self):
        passes = []
        for n_rounds in (1, 2):
            model, calls = adapted("first"), []
            model.get_base_model().register_forward_hook(lambda *_, calls=calls: calls.append(1))
            refine(model, regression(), n_rounds=n_rounds, damping=1e-4, rank=10)
            passes.append(len(calls))
        model, calls = adapted("first"), []
        model.train()
        before, modes = state(model), [module.training for module in model.modules()]

        def fail_later(*_):
            calls.append(1)
            if len(calls) == passes[1] - 1:  # the steps of the second round are being tried
                raise KeyboardInterrupt

        assert passes[1] > passes[0] + 2
        model.get_base_model().register_forward_hook(fail_later)
        with pytest.raises(KeyboardInterrupt):
            refine(model, regression(), n_rounds=3, damping=1e-4, rank=10)
        assert same_state(before, state(model))
        assert [module.training for module in model.modules()] == modes

    def test_progress_bar(self, capfd):
        refine_linearized(adapted(), regression(), rank=4)
        assert "LReg refinement:" in capfd.readouterr().err


def flagged(**changes):
    batch = {**classification()[0], **changes}
    return [{key: value for key, value in batch.items() if value is not None}]


class Smoothed(nn.Module):
    """A model with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.out(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, label_smoothing=0.3)}


class TestBadInput:
    @pytest.mark.parametrize(
        ("batches", "options", "error", "message"),
        [
            ([], {}, ValueError, "the data are empty"),
            ([torch.zeros(3)], {}, TypeError, "a batch must be a dictionary"),
            (flagged(labels=None), {}, ValueError, "a batch needs 'labels', a tensor"),
            (flagged(labels=torch.tensor([0, 1, 2])), {}, ValueError, r"labels must lie in \[0, 1\].*got 2"),
            (flagged(labels=torch.tensor([0, 1])), {}, ValueError, "do not fit outputs of shape"),
            (flagged(labels=torch.full((3,), -100)), {}, ValueError, "no row with a label"),
            (flagged(), {"rank": [2, 4]}, ValueError, "there is one batch: give eval_data or one rank"),
            (flagged(), {"damping": [0.1, float("nan")]}, ValueError, "damping must be at least 0"),
        ],
    )
    def test_refuses(self, batches, options, error, message):
        model = adapt(roberta("SEQ_CLS"), target_modules=["query"])
        before = state(model)
        with pytest.raises(error, match=message):
            refine(model, batches, **options)
        assert same_state(before, state(model))

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="has no LReg adapter that is being trained"):
            refine(roberta("SEQ_CLS"), classification())
        model = adapt(roberta("SEQ_CLS"), target_modules=["query"])
        model.set_adapter("default", inference_mode=True)
        with pytest.raises(ValueError, match="activate one by set_adapter"):
            refine(model, classification())

    def test_loss_that_is_not_known(self):
        model = get_peft_model(Smoothed(), LRegConfig(target_modules=["out"]))
        with pytest.raises(ValueError, match="is not the cross entropy of its outputs averaged over the labels"):
            refine(model, [{"x": torch.randn(4, 2), "labels": torch.tensor([0, 1, 2, 0])}])

    def test_loss_that_is_not_finite(self):
        model = adapted()
        model.get_base_model().last.base_layer.bias.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="the training loss is nan before any step"):
            refine(model, regression())

    def test_several_processes(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        with pytest.raises(RuntimeError, match="runs in one process"):
            refine(adapted(), regression())
