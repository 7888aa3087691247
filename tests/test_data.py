"""Data sets in place of batches: functions that read data take both."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader

import lreg_peft
from lreg_peft import LRegConfig
from lreg_peft.rows import batches_of


def samples(n=12):
    ids = torch.randint(3, tiny.VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return len(samples())

    def __getitem__(self, index):
        return samples()[index]


DATA_SETS = {"torch": Samples, "datasets": lambda: Dataset.from_list(samples())}


@pytest.mark.parametrize("kind", DATA_SETS)
def test_a_data_set_becomes_batches_of_all_its_samples_in_one_random_order(kind):
    first, again = (list(batches_of(DATA_SETS[kind](), batch_size=5)) for _ in range(2))
    assert [len(batch["input_ids"]) for batch in first] == [5, 5, 2]
    rows = torch.cat([batch["input_ids"] for batch in first])
    assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in again]))
    expected = torch.tensor([sample["input_ids"] for sample in samples()])
    assert not torch.equal(rows, expected)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_a_stream_is_read_in_its_own_order():
    batches = list(batches_of(Dataset.from_list(samples()).to_iterable_dataset()))
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == [s["input_ids"] for s in samples()]


def test_batches_stay_as_they_are():
    loader = DataLoader(Samples(), batch_size=4)
    batches = [{"input_ids": torch.ones(2, 3)}]
    assert batches_of(loader) is loader and batches_of(batches) is batches


@pytest.mark.parametrize(
    ("data", "advice"), [(3, "DataLoader, got a int"), ({"input_ids": torch.ones(2, 3)}, "a single batch into a list")]
)
def test_what_gives_no_batches_is_refused(data, advice):
    with pytest.raises(TypeError, match=advice):
        batches_of(data)


@pytest.mark.parametrize("kind", DATA_SETS)
def test_every_function_that_reads_data_takes_a_data_set(kind):
    data, quiet = DATA_SETS[kind](), {"show_progress": False}
    model = get_peft_model(tiny.gpt2(), LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], n_nodes=3))
    lreg_peft.initialize_lreg_weights(model, data, **quiet)
    fit = lreg_peft.fit_coefficients(model, data, ridge=1e-2, **quiet)
    assert fit.n_rows == 12 * 5 and fit.status == "converged"
    _, _, report = lreg_peft.convert_to_lora(model, data, max_rise=1.0, **quiet)
    assert report.loss_before > 0
    assert lreg_peft.match_token_frequencies(model, data, **quiet).loss_before > 0
    assert lreg_peft.refine_linearized(model, data, rank=2, **quiet).loss_before > 0
    assert lreg_peft.plot_meshes(model, data=data).axes


@pytest.mark.parametrize(("as_tensors", "what"), [(False, "as a list"), (True, r"of shape \[6\]")])
def test_a_list_of_samples_is_no_list_of_batches(as_tensors, what):
    data = [{key: torch.tensor(value) if as_tensors else value for key, value in s.items()} for s in samples()]
    model = tiny.adapt(tiny.gpt2(), task_type="CAUSAL_LM", target_modules=["lm_head"])
    before = tiny.state(model)
    for call in (lreg_peft.initialize_lreg_weights, lreg_peft.match_token_frequencies, lreg_peft.convert_to_lora):
        with pytest.raises(ValueError, match=f"{what}, as a sample has: put the samples into a DataLoader"):
            call(model, data, show_progress=False)
    assert tiny.same_state(before, tiny.state(model))
