"""What a mask says is done, or refused: linear layers must not quietly see what softmax layers do not."""

import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, tiny_model, tokens


LAYERS = {"all_linear": [LINEAR] * 2, "hybrid": [LINEAR, SLIDING, LINEAR, FULL], "softmax": [FULL]}
LENGTHS = [5, 1, 4]


def packed(*gaps: int):
    """The documents in one row, and behind each of them as much padding as `gaps` says."""
    documents = [tokens(1, length, seed=length) for length in LENGTHS]
    ids, mask, positions = [], [], []
    for document, gap in zip(documents, gaps, strict=True):
        ids += [document, torch.zeros(1, gap, dtype=torch.long)]
        mask += [torch.ones_like(document), torch.zeros(1, gap, dtype=torch.long)]
        # padding goes on counting, or stands still, as collators do
        positions += [torch.arange(document.shape[1])[None], torch.ones(1, gap, dtype=torch.long)]
    row = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return documents, {name: torch.cat(parts, dim=1) for name, parts in row.items()}


@torch.no_grad()
@pytest.mark.parametrize("gaps", [(0, 0, 0), (0, 0, 3), (2, 0, 1)], ids=["all_ones", "right", "between"])
@pytest.mark.parametrize("layers", LAYERS)
def test_documents_beside_a_mask_stay_apart(layers, gaps):
    """A collator that sends `attention_mask` with its `position_ids` would let documents run into each other."""
    model = tiny_model(layer_types=LAYERS[layers])
    documents, row = packed(*gaps)
    both = {name: torch.cat((x, x.flip(0) if name == "input_ids" else x)) for name, x in row.items()}
    for batch in (row, both):
        logits = model(**batch).logits[:, batch["attention_mask"][0].bool()]
        expected = torch.cat([model(document).logits for document in documents], dim=1)
        torch.testing.assert_close(logits, expected.expand_as(logits))


@torch.no_grad()
def test_padding_alone_is_not_packing():
    """Rows padded on the left, whose positions start at their first token, would be cut apart."""
    model, x = tiny_model(), tokens(1, 8)
    row = {
        "input_ids": torch.cat((torch.zeros(1, 3, dtype=torch.long), x), dim=1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 8]),
        "position_ids": torch.tensor([[1] * 3 + list(range(8))]),
    }
    for positions in (row["position_ids"], torch.arange(11)[None]):
        logits = model(**row | {"position_ids": positions}).logits[:, 3:]
        torch.testing.assert_close(logits, model(x).logits)


def test_padding_within_a_packed_document_is_refused():
    """A document whose tokens stand on both sides of padding would lose its beginning."""
    row = {
        "input_ids": tokens(1, 6),
        "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 1, 2, 0, 1]]),
    }
    with pytest.raises(ValueError, match="padding within a document"):
        tiny_model()(**row)


@pytest.mark.parametrize("layers", ["all_linear", "hybrid"])
def test_a_mask_of_four_dimensions_is_refused(layers):
    """Padding, or a tree of drafts, would be hidden from softmax layers and read by linear ones."""
    model, x = tiny_model(layer_types=LAYERS[layers]), tokens(1, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask[..., 0] = False
    for attention_mask in (mask, dict.fromkeys(LAYERS[layers], mask)):
        with pytest.raises(ValueError, match=r"must be \[B, T\], got \[1, 1, 6, 6\]"):
            model(x, attention_mask=attention_mask)


@torch.no_grad()
def test_softmax_layers_take_a_mask_of_four_dimensions():
    """A hybrid could not be given its softmax layers' own masks, nor a model without linear layers any."""
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    x = tokens(1, 6)
    model = tiny_model(layer_types=LAYERS["softmax"])
    torch.testing.assert_close(model(x, attention_mask=mask).logits, model(x).logits)
    model = tiny_model()
    masks = {LINEAR: None, SLIDING: mask & mask.new_ones(6, 6).triu(-4), FULL: mask}
    torch.testing.assert_close(model(x, attention_mask=masks).logits, model(x).logits)
