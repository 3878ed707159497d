"""Batches of every form, taken apart by one function for whoever accepts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from surgery_kernels.merging import diagonal_fisher, entropy_objective, gram_matrices
from surgery_kernels.modules.pools import batches_of, pool_of
from surgery_kernels.surgery import collect_features, representation_bias
from tests.cases import assert_same
from tests.encoders import Encoder, bert, made, perturbed, ragged, samples
from tests.fits import Samples, refusal

pytestmark = pytest.mark.any_isa

X = samples(10, 5, 3)


class Mappings(Dataset):
    """Entries by name, with a label and a text beside them."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**{name: x[number] for name, x in self.tensors.items()}, "label": 1, "text": "a"}


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "mapping": lambda: {"samples": X, "labels": torch.zeros(10)},
    "dataset of tuples": lambda: Samples(X),
    "dataset of mappings": lambda: Mappings(samples=X),
    "TensorDataset": lambda: TensorDataset(X, torch.zeros(10)),
    "DataLoader": lambda: DataLoader(TensorDataset(X, torch.zeros(10)), batch_size=4),
    "DataLoader of mappings": lambda: DataLoader(Mappings(samples=X), batch_size=4),
    "iterator of tuples": lambda: ((x, torch.zeros(len(x))) for x in X.split(4)),
    "iterator of mappings": lambda: ({"samples": x, "label": torch.zeros(len(x))} for x in X.split(4)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def encoder() -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder().eval()


def whole(batches: Iterator[Any]) -> Tensor:
    return torch.cat([batch["samples"] if isinstance(batch, dict) else batch for batch in batches])


@every_form
def test_the_samples_are_the_same(form: Callable[[], Any]) -> None:
    assert_same(whole(batches_of("batches", form(), 4)), X)
    assert_same(whole(pool_of("batches", form()).stream([torch.arange(3), torch.arange(3, 10)])), X)


@every_form
def test_who_takes_batches(form: Callable[[], Any]) -> None:
    model, expert = encoder(), perturbed(encoder(), 1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for of_batches in (
        lambda batches: gram_matrices(model, batches),
        lambda batches: diagonal_fisher(model, batches),
        lambda batches: {"loss": entropy_objective(model, {"a": batches}, batch_size=4)(parameters, 0)},
        lambda batches: representation_bias(model, expert, batches),
        lambda batches: collect_features(model, batches),
    ):
        expected = of_batches(X)
        for name, value in of_batches(form()).items():
            torch.testing.assert_close(value, expected[name], msg=name)


def test_an_iterable_is_read_as_far_as_it_is_asked() -> None:
    read = []
    batches = batches_of("batches", (read.append(1) or x for x in X.split(2)))
    next(batches)
    assert len(read) == 1


def text_classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_classifier_of_hugging_face() -> None:
    """Its logits are found, and the labels of its dataset, of another head, are left out."""
    model, inputs = text_classifier()
    dataset = Mappings(**inputs)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(**inputs).logits
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(entropy_objective(model, {"a": dataset}, batch_size=6)(parameters, 0), entropy)
        explicit = entropy_objective(model, {"a": inputs}, lambda outputs, _: outputs.logits, batch_size=6)
        torch.testing.assert_close(explicit(parameters, 0), entropy)
    fisher, plain = (diagonal_fisher(model, x) for x in (dataset, inputs))
    assert all(torch.equal(value, plain[name]) for name, value in fisher.items())
    assert "bert.encoder.layer.0.output.dense.weight" in gram_matrices(model, dataset)


@pytest.mark.parametrize("on_the_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("pad", [0, 3])
def test_batches_as_long_as_their_own_longest_are_padded_as_they_are(on_the_left: bool, pad: int) -> None:
    together, own = ragged(on_the_left, pad)
    assert len({batch["input_ids"].shape for batch in own}) == 3
    (read,) = pool_of("batches", own).stream([torch.arange(6)])
    for name, x in together.items():
        assert_same(read[name], x)


def test_features_of_batches_that_were_padded() -> None:
    it = made(bert)
    together, own = ragged(False, 0)
    final = collect_features(it.model, own)[""]
    assert_same(final, collect_features(it.model, together)[""])
    with torch.no_grad():
        alone = torch.cat([it.model(**batch).pooler_output for batch in own])
    torch.testing.assert_close(final, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            [{"ids": X[:4]}, {"ids": X[4:, :3]}],
            "batches must hold samples of one shape, got {'ids': (5, 3)} and {'ids': (3, 3)}",
        ),
        (
            [{"ids": torch.zeros(2, 4), "attention_mask": torch.ones(2, 3)}, {"attention_mask": torch.ones(2, 4)}],
            "batches must hold samples of one shape, got {'ids': (4,), 'attention_mask': (3,)} and "
            "{'attention_mask': (4,)}",
        ),
        (
            [(torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [1, 0, 0]]))],
            "batches must be mappings where the model takes a mask beside its tokens, got a tuple of both",
        ),
        (
            [{"text": ["a", "b"]}],
            "batches must be tensors, tuples that start with one or mappings of tensors, got dict",
        ),
        (7, "batches must be a tensor, a mapping of tensors, a dataset or an iterable of batches, got int"),
    ],
    ids=["shapes", "names", "mask", "no tensor", "no form"],
)
def test_refused(batches: Any, message: str) -> None:
    assert refusal(lambda: pool_of("batches", batches)) == message
    if "one shape" not in message:  # whoever takes batch after batch does not put them together
        for of_batches in (gram_matrices, diagonal_fisher, lambda _, x: list(batches_of("batches", x))):
            with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
                of_batches(encoder(), batches)


def test_labels_that_are_as_long_as_their_tokens_are_no_mask() -> None:
    ids = torch.arange(6).view(2, 3)
    for labels in (ids, ids.float(), torch.tensor([1, 0])):
        (read,) = pool_of("batches", [(ids, labels)]).stream([torch.arange(2)])
        assert_same(read, ids)
